"""math-verify in a worker, with no rules of ours before it and no time limit of its own: the worst case."""

from __future__ import annotations

import logging


def warm() -> None:
    logging.disable()
    compare("x+1", r"\sqrt{2}")


def compare(gold: str, answer: str) -> bool:
    from math_verify import parse, verify

    parsed = [parse(f"${text}$", parsing_timeout=None) for text in (gold, answer)]
    return verify(parsed[0], parsed[1], timeout_seconds=None)
