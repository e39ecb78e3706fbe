r"""Refusals: what an answer may not be, whatever it is worth. Linear in the length; nothing is evaluated."""

from __future__ import annotations

import re

from mulligan.verify.forms import cut, depth_of
from mulligan.verify.typography import GREEK, untext

MAX_DEPTH = 24  # of brackets within brackets
MAX_DIGITS = 300
MAX_EXPONENT_DIGITS = 4
MAX_FACTORIAL_DIGITS = 3

_OPERATOR = re.compile(
    r"\\(sum|prod|coprod|int|iint|iiint|oint|lim|limsup|liminf|gcd|lcm|max|min|sup|inf|binom|choose|bmod|mod|pmod|det|deg"
    r"|operatorname|frac\{d\}|partial|nabla|to|rightarrow|Rightarrow|implies|iff|therefore|because)(?![A-Za-z])"
    r"|(?<![\\A-Za-z])(gcd|lcm|max|min|mod|lim|sum|floor|ceil|det)(?![A-Za-z])"
)
_FAMILIES = {
    "a trigonometric function": re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])"),
    "an inverse function": re.compile(r"\\arc(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])"),
    "a hyperbolic function": re.compile(r"\\(?:sinh|cosh|tanh)(?![A-Za-z])"),
    "a logarithm": re.compile(r"\\(?:log|ln|lg)(?![A-Za-z])"),
    "a factorial": re.compile(r"!"),
    "rounding": re.compile(r"\\l(?:floor|ceil)(?![A-Za-z])"),
    "an absolute value": re.compile(r"\|"),
}
_OPEN_WORDS = """
either maybe perhaps possibly probably likely approximately approx about around roughly nearly almost not unless guess
could might false incorrect wrong
"""
HEDGES = frozenset(_OPEN_WORDS.split())
_DANGLING = re.compile(
    r"(?:[-+*/^_=<>,]|\\(?:cdot|times|le|ge|ne|pm|mp|cup|in|frac|sqrt))$|^(?:[*/^_=<>,]|\\(?:cdot|times|cup)(?![A-Za-z]))"
)


# Signs that would have been read as something else, had they been where they belong.
_SEVERAL = {
    ",": "several values",
    ";": "several values",
    ":": "a ratio",
    "\\{": "a set",
    "\\pm": "two values",
    "\\mp": "two values",
    "\\cup": "a union",
    "&": "a table",
    "%": "a percentage",
    "$": "text",
    '"': "text",
    "\\mid": "text",
    "#": "text",
    "=": "an equation",
}


def unevaluated(text: str) -> str:
    """Why a compact text that should be a plain number is not one, where a calculation was left undone; or nothing."""
    if match := _OPERATOR.search(text):
        return f"not evaluated ({match[0]})"
    for name, pattern in _FAMILIES.items():
        if pattern.search(text):
            return f"not evaluated ({name})"
    if not variables(text) and re.search(r"[0-9)}].*(?:[-+*^!]|\\cdot|\\times|\\sqrt|\\pi)|\\sqrt", text):
        return "not evaluated, where a plain number is asked"
    return ""


def hedge(gold: str, answer: str) -> str:
    """What takes an answer back or leaves it open and does not stand in the gold one; or nothing."""
    spoken = {word.lower() for word in _spoken(answer)} & HEDGES
    spoken -= {word.lower() for word in _spoken(gold)}
    if spoken:
        return min(spoken)
    for sign in ("?", "\\approx", "\\sim", "\\simeq"):
        if sign in answer and sign not in gold:
            return sign
    return ""


def _spoken(text: str) -> list[str]:
    return re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", untext(text))


_GREEK = "|".join([name for name in GREEK.values() if name not in ("pi", "Pi")] + ["ell"])


def variables(text: str) -> set[str]:
    r"""The letters and Greek letters of a compact text that stand for themselves; e, i and \pi are constants."""
    greek = set(re.findall(rf"\\(?:{_GREEK})(?![A-Za-z])", text))
    plain = re.sub(r"\\[A-Za-z]+", " ", text)
    return (set(re.findall("[A-Za-z]", plain)) | greek) - {"e", "i"}


def excess(text: str) -> str:
    """What makes a compact text too large to be calculated with; or nothing."""
    if depth_of(text) > MAX_DEPTH:
        return "nested too deeply to be an answer"
    if re.search(rf"[0-9]{{{MAX_DIGITS},}}", text):
        return "a number of too many digits"
    if re.search(
        rf"\^[({{-]*[0-9]{{{MAX_EXPONENT_DIGITS + 1},}}|[0-9]{{{MAX_FACTORIAL_DIGITS + 1},}}[)}}]*!|!!|![)}}]*!", text
    ):
        return "a power or factorial beyond reason"
    if re.search(r"[0-9)}]\^[({]*[0-9]+[)}]*\^|\^[({]*[0-9]+!|\^\{[^{}]*\^\{[^{}]*\^", text):
        return "a tower of powers"
    return ""


def refusal(gold: str, answer: str) -> str:
    """Why an answer is not even compared by algebra with a gold one that is no plain number; or nothing."""
    if (found := excess(answer)) and not excess(gold):
        return found
    if _DANGLING.search(answer) or cut(answer, lambda _: False) is None:
        return "unfinished: an operator or bracket at its end"
    for sign, name in _SEVERAL.items():
        if sign in answer and sign not in gold:
            return f"{name} in place of an expression"
    known = {match[0] for match in _OPERATOR.finditer(gold)}
    for match in _OPERATOR.finditer(answer):
        if match[0] not in known:
            return f"not evaluated ({match[0]})"
    letters = {"".join(sorted(run)) for run in re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", gold)}
    for run in re.findall(r"(?<![\\A-Za-z])[A-Za-z]{4,}", answer):
        if "".join(sorted(run)) not in letters:
            return f"words where mathematics is asked ('{run[:20]}')"
    if re.fullmatch("[A-Za-z]+", gold) and re.fullmatch("[A-Za-z]+", answer):
        return "other letters"  # as words: a product of letters may not be reordered
    if other := variables(answer) - variables(gold):
        return f"{min(other)} does not occur in the gold answer"
    if not variables(gold):
        for name, pattern in _FAMILIES.items():
            if pattern.search(answer) and not pattern.search(gold):
                return f"not evaluated ({name})"
    for sign, pattern in (
        ("a prime", "'"),
        ("a numeral with an index", r"[0-9]_"),
        ("two numbers side by side", r"[0-9] [0-9]"),
    ):
        if re.search(pattern, answer) and not re.search(pattern, gold):
            return f"{sign} that is not in the gold answer"
    return ""
