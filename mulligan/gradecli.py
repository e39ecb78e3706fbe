"""``mulligan grade``: what it reads and what it says."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from mulligan.errors import UserError
from mulligan.tasks.rows import file_records
from mulligan.verify.judgement import Judgement
from mulligan.verify.pool import Pool

_OPTIONS = ("--help", "--jsonl", "--percent", "--workers")


def grade_lines(
    gold: str | None, answer: str | None, *, file: str | None, percent: bool, workers: int | None
) -> Iterator[str]:
    """The lines to print, each as soon as it is known: one sentence for one answer, JSON for a file.

    Args:
        file: JSON lines with ``gold`` and ``answer``; ``-`` is the standard input.

    Raises:
        UserError: what is asked for is unclear, or a row is malformed; before anything is graded.
    """
    if file is not None:
        if gold is not None:
            raise UserError(f"grade takes GOLD and ANSWER or --jsonl, and here are both ('{_short(gold)}')")
        pairs = _read(file)
        with Pool(workers) as pool:
            for judgement in pool.grade_each(pairs, percent=percent):
                yield _row(judgement)
        return
    if gold is None or answer is None:
        raise UserError("grade takes GOLD and ANSWER, or --jsonl FILE with rows of both")
    for text in (gold, answer):
        _no_option(text)
    if workers is not None:
        raise UserError("--workers: there is work for several with --jsonl only")
    with Pool(1) as pool:
        judgement = pool.grade(gold, answer, percent=percent)
    yield f"{judgement.verdict}: {' '.join(judgement.reason.split())}"


def _no_option(text: str) -> None:
    """Answers may begin with a minus sign, so the parser lets unknown options pass as texts; a slip must not."""
    close = difflib.get_close_matches(text, _OPTIONS, n=1, cutoff=0.7) if text.startswith("--") else []
    if close:
        raise UserError(f"'{text}' is no option of grade (did you mean '{close[0]}'?)")


def _read(file: str) -> list[tuple[str, str]]:
    """All rows, so that a bad one is told before hours of grading and not behind them."""
    path = Path("/dev/stdin" if file == "-" else file)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; --jsonl takes a file")
    pairs = [(_text(place, row, "gold"), _text(place, row, "answer")) for place, row in file_records(path)]
    if not pairs:
        raise UserError(f'{path}: holds no rows such as {{"gold": "7", "answer": "7"}}')
    return pairs


def _text(place: str, row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise UserError(f"{place}: '{key}' is missing (the row has {', '.join(map(repr, row)) or 'nothing'})")
    value = row[key]
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{place}: '{key}' must be text or a number, not {_short(json.dumps(value))}")
    return format(Decimal(repr(value)), "f")  # 1e-07 as 0.0000001


def _row(judgement: Judgement) -> str:
    return json.dumps(
        {
            "verdict": judgement.verdict,
            "reason": judgement.reason,
            "seconds": round(judgement.seconds, 6),
            "peak_memory": judgement.peak_memory,
        }
    )


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."
