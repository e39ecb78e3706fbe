"""Answers made to fool, stall or break the verifier: verdict, seconds and peak memory of each.

    python benchmarks/verifier_adversarial.py [--json] [--workers 2]

The table is tests/verify/adversarial.jsonl. ``expected`` is a verdict or several of which any will do; a gold or answer
that is a list stands for its parts joined, where ``["(", 5000]`` is 5,000 parentheses.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mulligan.verify.pool import Pool

TABLE = Path(__file__).resolve().parents[1] / "tests" / "verify" / "adversarial.jsonl"


def read_table() -> list[dict[str, Any]]:
    """The rows, gold and answer written out."""
    rows = [json.loads(line) for line in TABLE.read_text().splitlines()]
    return [
        {
            "row": number,
            "kind": row["kind"],
            "gold": _written_out(row["gold"]),
            "answer": _written_out(row["answer"]),
            "percent": row.get("percent", False),
            "expected": [row["expected"]] if isinstance(row["expected"], str) else row["expected"],
        }
        for number, row in enumerate(rows, start=1)
    ]


def _written_out(text: str | list[Any]) -> str:
    if isinstance(text, str):
        return text
    return "".join(part if isinstance(part, str) else part[0] * part[1] for part in text)


def measure(pool: Pool, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows with what the pool says of them, those of one kind of percentage together."""
    for percent in (False, True):
        chosen = [row for row in rows if row["percent"] is percent]
        found = pool.grade_each([(row["gold"], row["answer"]) for row in chosen], percent=percent)
        for row, judgement in zip(chosen, found, strict=True):
            yield row | {
                "verdict": judgement.verdict,
                "reason": judgement.reason,
                "seconds": judgement.seconds,
                "peak_memory": judgement.peak_memory,
                "as_expected": judgement.verdict in row["expected"],
            }


def _short(text: str, width: int) -> str:
    shown = json.dumps(text)[1:-1]
    return (shown if len(shown) <= width else f"{shown[: width - 3]}...").ljust(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--deadline", type=float, default=5.0, help="seconds")
    parser.add_argument("--json", action="store_true", help="one JSON row each, answers cut at 200 characters")
    chosen = parser.parse_args()
    kinds: dict[str, list[dict[str, Any]]] = {}
    with Pool(chosen.workers, deadline=chosen.deadline) as pool:
        for row in measure(pool, read_table()):
            kinds.setdefault(row["kind"], []).append(row)
            if chosen.json:
                print(json.dumps(row | {"gold": row["gold"][:200], "answer": row["answer"][:200]}), flush=True)
                continue
            mark = " " if row["as_expected"] else "!"
            cells = f"{row['verdict']:10} {row['seconds']:7.3f} s {row['peak_memory'] / 2**20:4.0f} MB"
            place = f"{row['row']:3} {row['kind']:13}"
            print(
                f"{mark} {place} {_short(row['gold'], 12)} {_short(row['answer'], 30)} {cells}  {row['reason'][:60]}",
                flush=True,
            )
    if chosen.json:
        return
    print("\n| kind | rows | correct | wrong | unscorable | not as expected | longest, s | peak, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for kind, rows in kinds.items():
        counts = [sum(row["verdict"] == word for row in rows) for word in ("correct", "wrong", "unscorable")]
        other = sum(not row["as_expected"] for row in rows)
        longest = max(row["seconds"] for row in rows)
        peak = max(row["peak_memory"] for row in rows) / 2**20
        print(f"| {kind} | {len(rows)} | {' | '.join(map(str, counts))} | {other} | {longest:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
