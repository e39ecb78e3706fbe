"""Comparing answers to reasoning-gym's questions: as texts here, by a data set's own scorer in the verifier's worker.

The worker imports this file without the rest of the package, so it holds to the standard library, and to reasoning_gym
inside functions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from mulligan.tasks.gym_table import OWN_SCORER
from mulligan.verify.answer import equal

# What reasoning-gym's scorers pay for any text in the right place. It counts as nothing: among four wrong answers the
# one with 0.01 would be trained as the best.
FLOOR = 0.05
LONGEST = 20_000  # characters of an answer; the longest gold has some thousands

_scorers: dict[str, Callable[[str, Mapping[str, Any]], float]] = {}


def warm() -> None:
    """Import reasoning_gym and make the scorers, before the worker loses its files."""
    from reasoning_gym import get_score_answer_fn

    for dataset in OWN_SCORER:
        scorer: Any = get_score_answer_fn(dataset)  # declared there as if it took no arguments
        _scorers[dataset] = scorer


def score(dataset: str, item: Mapping[str, Any], answer: str) -> float:
    """The data set's own score of an answer. In the worker only.

    Args:
        dataset: one that the table gives its own scorer.
        item: ``question``, ``answer`` and ``metadata`` as the data set made them, through JSON.
        answer: the model's text.

    Returns:
        From 0 to 1. What the scorer stumbles over is wrong, not unscorable: else nonsense could never lose. Only the
        worker's own limits (time, memory, depth) are passed on.
    """
    if len(answer) > LONGEST:
        return 0.0
    try:
        value = float(_scorers[dataset](answer, item))
    except (MemoryError, RecursionError):
        raise
    except Exception:
        return 0.0
    return min(value, 1.0) if math.isfinite(value) and value > FLOOR else 0.0


_DEEPEST = 4  # wrappers around an answer; each costs a walk over the text
_WRAPPERS = (
    re.compile(r"\\(?:text|textbf|textrm|texttt|mathrm|mathtt)\s*\{(.*)\}", re.DOTALL),
    re.compile(r"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]|`(.*)`", re.DOTALL),
)


def bare(answer: str) -> str:
    r"""The answer without the typography around it: blanks, ``\text{...}``, ``$...$`` and the like.

    >>> bare(r" \text{Yes} "), bare(r"$\mathrm{on}$")
    ('Yes', 'on')
    """
    for _ in range(_DEEPEST):
        answer = answer.strip()
        for wrapper in _WRAPPERS:
            match = wrapper.fullmatch(answer)
            inner = next((group for group in match.groups() if group is not None), "") if match else ""
            # `\text{a} or \text{b}` is no wrapped text, and neither is `$a$ or $b$`.
            if match and _balanced(inner) and "$" not in inner and "`" not in inner:
                answer = inner
    return answer.strip()


def _balanced(text: str) -> bool:
    depth = 0
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0


def same(gold: str, answer: str) -> bool:
    """Whether two bare answers are the same text: line by line, case, width of blanks and blanks beside brackets and
    commas aside, and the last period. Single numbers are compared as exact numbers. Nothing is paid for a part.

    >>> same("0 1\\n1 0", "0  1 \\n\\n1 0"), same("[1, 2]", "[1,2]"), same("Yes", "yes"), same("-4", "-4.0")
    (True, True, True, True)
    >>> same("0 1\\n1 0", "0 1 1 0"), same("12", "12 or 13"), same("5, 120", "5120")
    (False, False, False)
    """
    if len(answer) > LONGEST:
        return False
    left, right = _lines(gold), _lines(answer)
    if left == right:
        return bool(left)
    # A comma may separate thousands or members of a list; where the gold has one, only the text decides.
    return len(left) == len(right) == 1 and "," not in left[0] and equal(left[0], right[0])


_LOOSE = re.compile(r" ?([,()\[\]]) ?")


def _lines(text: str) -> list[str]:
    lines = (" ".join(line.split()).casefold() for line in text.rstrip().removesuffix(".").splitlines())
    return [_LOOSE.sub(r"\1", line) for line in lines if line]
