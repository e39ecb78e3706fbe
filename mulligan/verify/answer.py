r"""Final answers of mathematical texts: finding them and comparing them. Nothing is evaluated.

The comparison is strict: numbers are compared exactly, everything else as normalised text. So ``0.5`` is
``\frac{1}{2}``, but ``10\%`` is not ``10``, ``8=7`` is not ``7`` and ``x+1`` is not ``1+x``: a reward that errs should
err towards zero.
"""

from __future__ import annotations

import re
from fractions import Fraction

MAX_LENGTH = 2000  # characters of an answer; no gold answer is longer, and it bounds the work
MAX_NUMBER = 200  # characters of a number
SEVERAL = "several different final answers"

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # `\\.` steps over escaped braces


def boxes(response: str) -> list[str]:
    r"""The contents of all complete ``\boxed{...}`` that are not blank, in order; the inner one where boxes are nested.
    Linear in the length.

    >>> boxes(r"\boxed{3}, so \boxed{\frac{1}{2}} and \boxed{4")
    ['3', '\\frac{1}{2}']
    """
    found: list[tuple[int, int]] = []
    opened: list[int | None] = []  # where a box's content begins, None for any other brace
    for match in _BRACES.finditer(response):
        if match[0] == "{":
            opened.append(None)
        elif match[0].endswith("{") and match[0].startswith("\\boxed"):
            opened.append(match.end())
        elif match[0] == "}" and opened:
            begin = opened.pop()
            if begin is not None and not (found and found[-1][0] > begin):
                found.append((begin, match.start()))
    return [response[begin:end] for begin, end in found if response[begin:end].strip()]


def final_answer(response: str) -> tuple[str | None, str]:
    r"""The final answer of a response, and why there is none.

    It is the content of the last complete ``\boxed{...}``. A response that boxes different answers is hedging: it has
    no final answer, even where the last box is right.

    Returns:
        The answer and ``""``, or None and the reason.
    """
    found = boxes(response)
    if not found:
        return None, "no final answer"
    last = found[-1]
    if any(not equal(last, other) for other in set(found) - {last}):
        return None, SEVERAL
    return last, ""


def equal(gold: str, answer: str) -> bool:
    r"""Whether the answer is the gold one: equal as exact numbers, or as normalised text. Symmetric; never raises.

    Numbers are integers, decimals, ``a/b`` and ``\frac{a}{b}``, with a sign and with thousands separators (``1,000`` or
    ``1, 000``).

    >>> equal("1,000", r"\$1000.00"), equal("0.1", r"10\%"), equal(r"\text{east}", "east")
    (True, False, True)
    """
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return bool(gold.strip()) and gold.strip() == answer.strip()
    left, right = normalise(gold), normalise(answer)
    if not left or not right:
        return False
    if left == right:
        return True
    one, other = number(left), number(right)
    return one is not None and one == other


_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
# `\\\\` comes first, so that the second half of a line break is not taken for a spacing command.
_SPACING = re.compile(r"\\\\|\{,\}|\\!|\\[,;: ]|~|\\q?quad(?![A-Za-z])|\s+")
_SPACES = {"\\\\": "\\\\", "{,}": ",", "\\!": ""}
_SIZES = re.compile(r"\\(?:left|right)(?![A-Za-z])")
_LOOSE_SPACE = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")
_WRAPPERS = (("\\(", "\\)"), ("\\[", "\\]"), ("\\$", ""), ("$", ""), ("", "\\$"), ("", "$"), ("", "."))


def normalise(text: str) -> str:
    r"""The text without what is only typography.

    Dropped: surrounding ``$``, ``\(`` and ``\[``, a leading currency sign, a trailing period, ``\text`` and
    its like (their content stays), ``\left`` and ``\right``, and blanks, except between two letters or digits
    (``1 1/2`` is not ``11/2``). ``\dfrac12`` becomes ``\frac{1}{2}``. Case, units and percent signs count.
    """
    text = _SPACING.sub(lambda match: _SPACES.get(match[0], " "), text.replace("−", "-").replace("\\%", "%"))
    text = _TEXT.sub(r"\1", _SIZES.sub("", text))
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text)
    text = re.sub(r"\\(frac|sqrt) ?([0-9])", r"\\\1{\2}", text)
    text = re.sub(r"(\\frac\{[^{}]*\}) ?([0-9])", r"\1{\2}", text)
    text = re.sub(r"^\s*([-+])\s*\\?\$", r"\1", text)
    peeled = None
    while peeled != text:
        peeled = text
        text = text.strip()
        for left, right in _WRAPPERS:
            if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
                text = text[len(left) : len(text) - len(right)]
    return _LOOSE_SPACE.sub("", re.sub(" +", " ", text))


_INTEGER = r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = re.compile(rf"[-+]?(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)")
_QUOTIENT = re.compile(rf"([-+]?)(?:\\frac\{{([-+]?{_INTEGER})\}}\{{([-+]?{_INTEGER})\}}|({_INTEGER})/({_INTEGER}))")


def number(text: str) -> Fraction | None:
    """The exact value of a normalised text that is a plain number or a simple quotient; None for any other."""
    if len(text) > MAX_NUMBER:
        return None
    if _DECIMAL.fullmatch(text):
        return Fraction(text.replace(",", ""))
    match = _QUOTIENT.fullmatch(text)
    if match is None:
        return None
    upper, lower = (int(part.replace(",", "")) for part in (match[2] or match[4], match[3] or match[5]))
    if lower == 0:
        return None
    return Fraction(-upper if match[1] == "-" else upper, lower)
