"""Reading a model's own judgement: which step of a chain it names as the first wrong one."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\boxed\{\s*(\d{1,4})\s*\}")
_STEP = re.compile(r"\bstep\s+(\d{1,4})\b", re.IGNORECASE)


def parse_step(text: str, steps: int) -> int | None:
    r"""The step named, in 1..steps: the last ``\boxed{k}`` in range, else the last "Step k" in range, else None
    (SRPO, arXiv 2605.25507, falls back to step 1; the caller does that, so that failures can be counted).

    >>> parse_step(r"1+2-\boxed{2}", 5)
    2
    """
    for pattern in (_BOXED, _STEP):
        inside = [k for k in map(int, pattern.findall(text)) if 1 <= k <= steps]
        if inside:
            return inside[-1]
    return None
