"""Grades a second at 1, 2 and 8 workers.

    python benchmarks/verifier_speed.py --data ../shared/data [--repeats 5]

``at sight`` is what a run does: rules in the calling thread, workers for the rest. ``workers`` sends them everything.
Pools are warm; the settings take turns, and each number is the median of its repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mulligan.verify.pool import Pool

WORKERS = (1, 2, 8)
Pairs = list[tuple[str, str]]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def at_sight(pool: Pool, pairs: Pairs) -> None:
    pool.grade_many(pairs)


def by_workers(pool: Pool, pairs: Pairs) -> None:
    pool.run("judge", [{"gold": gold, "answer": answer} for gold, answer in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="with gsm8k/ and math500/")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=None, help="of each data set; all by default")
    chosen = parser.parse_args()
    gsm8k = read(chosen.data / "gsm8k" / "test.jsonl")[: chosen.rows]
    math = read(chosen.data / "math500" / "test.jsonl")[: chosen.rows]
    solved = [(row["answer"].rpartition("####")[2].strip(), row["answer"]) for row in gsm8k]
    golds = [row["answer"] for row in math]
    others = golds[1:] + golds[:1]
    settings: dict[str, tuple[Callable[[Pool, Pairs], None], Pairs]] = {
        "GSM8K gold, solution; at sight": (at_sight, solved),
        "GSM8K gold, solution; workers": (by_workers, solved),
        "MATH-500 gold, solution; workers": (by_workers, [(row["answer"], row["solution"]) for row in math]),
        "MATH-500 gold, gold of the next problem; workers": (by_workers, list(zip(golds, others, strict=True))),
    }
    pools = {workers: Pool(workers) for workers in WORKERS}
    seconds: dict[tuple[str, int], list[float]] = {}
    try:
        for pool in pools.values():
            pool.run("judge", [{"gold": "x+1", "answer": "1+x"}] * 64)
        time.sleep(5)  # until the spare workers are ready too
        for _ in range(chosen.repeats):
            for name, (grade, pairs) in settings.items():
                for workers, pool in pools.items():
                    begun = time.perf_counter()
                    grade(pool, pairs)
                    seconds.setdefault((name, workers), []).append(time.perf_counter() - begun)
    finally:
        for pool in pools.values():
            pool.close()
    print(f"| grades a second | {' | '.join(f'workers: {workers}' for workers in WORKERS)} |")
    print(f"|---|{'---|' * len(WORKERS)}")
    for name, (_, pairs) in settings.items():
        cells = [f"{len(pairs) / statistics.median(seconds[name, workers]):,.0f}" for workers in WORKERS]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
