r"""Judging an answer: by rules first, in any process and at once; by algebra where the rules cannot tell.

``quick`` never loads sympy and is linear in the length of its texts, so it is safe for anything a model writes.
``judge`` may hang or take all memory: it belongs in a process that can be killed. LaTeX is read by the parser of
math-verify and compared by math-verify; what it says is equal must then hold exactly, by numbers of 60 digits
(math-verify itself rounds). No text reaches sympy's own parsers, which evaluate Python.
"""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
import warnings
from functools import lru_cache
from typing import Any

from mulligan.verify.answer import stated_answer
from mulligan.verify.forms import is_words, prepare
from mulligan.verify.judgement import Judgement
from mulligan.verify.refusals import hedge
from mulligan.verify.rules import Comparison, Finding, Kind, words
from mulligan.verify.typography import MAX_LENGTH, clean, normalise

DIGITS = 60  # decimal digits of numeric checks
FINE_DIGITS = 1000  # of a difference that the first check takes for 0
MAX_TEXT = 2_000_000  # characters of a text in which an answer is looked for


def quick(gold: str, answer: str, *, percent: bool = False) -> Judgement | None:
    r"""The verdict where no algebra is needed; None where only ``judge`` can tell.

    Args:
        gold, answer: an answer by itself, a text with ``\boxed{...}``, a solution that ends in ``#### 42``, or prose
            with "the answer is"; see ``stated_answer``.
        percent: whether the task's answers are percentages, so that 10 and 10% are the same.
    """
    return _judged(gold, answer, Comparison(percent=percent))


def judge(gold: str, answer: str, *, percent: bool = False) -> Judgement:
    """``quick``, and algebra where that does not decide. May take any time and memory; see the module's text.

    Raises:
        MemoryError, RecursionError: for the worker to tell.
    """
    judged = _judged(gold, answer, Comparison(percent=percent))
    if judged is not None:
        return judged
    try:
        judged = _judged(gold, answer, Comparison(percent=percent, algebra=_algebra))
    except _Unreadable as error:
        return Judgement("wrong", str(error))
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # sympy raises nearly anything on strange input
        return Judgement("unscorable", f"sympy: {' '.join(f'{type(error).__name__} {error}'.split())[:200]}")
    assert judged is not None, "algebra decides all that is left"
    return judged


def _judged(gold: str, answer: str, comparison: Comparison) -> Judgement | None:
    if len(gold) > MAX_TEXT:
        return Judgement("unscorable", "the gold text is longer than any solution")
    if len(answer) > MAX_TEXT:
        return Judgement("wrong", "longer than any answer")
    asked, reason = stated_answer(gold, gold=True)
    if asked is None and len(gold) > MAX_LENGTH and gold.strip() == answer.strip():
        return Judgement("correct", "the same text")
    if asked is None:
        return Judgement("unscorable", f"the gold text: {reason}")
    if max(len(asked), len(answer)) <= MAX_LENGTH and is_words(prepare(clean(asked))) and words(asked) == words(answer):
        return Judgement("correct", "the same words")  # before a value is looked for in "The function is even"
    given, reason = stated_answer(answer)
    if given is None:
        return Judgement("wrong", reason)
    if len(given) > MAX_LENGTH or len(asked) > MAX_LENGTH:
        same = asked.strip() == given.strip()
        return Judgement("correct" if same else "wrong", "the same text" if same else "longer than any answer")
    same, reason = _compared(asked, given, comparison)
    return None if same is None else Judgement("correct" if same else "wrong", reason)


_ABOUT = re.compile(r"[\s$]*~")  # elsewhere it is a blank
_GOES_ON = re.compile(r"(?:\.\s?\.|…|\\[lc]?dots(?![A-Za-z]))[\s$.})\]]*\Z")  # its last value is not written
_CHOICE = re.compile(r"\(([A-Za-z])\)")
_CHOSEN = re.compile(r"\(?([A-Za-z])(?:\)|[.:]|\Z)")


def _compared(gold: str, answer: str, comparison: Comparison) -> Finding:
    if _ABOUT.match(answer):
        return False, "hedged ('~')"
    if bool(_GOES_ON.search(gold)) != bool(_GOES_ON.search(answer)):
        return False, "one of the two goes on ('...')"
    if normalise(gold) == normalise(answer) and normalise(gold):
        return True, "the same text"
    one, other = clean(gold), clean(answer)
    if "\\approx" in one:
        one, other = (re.sub(r"^=\s*", "", re.sub(r"\\approx(?![A-Za-z])", "=", text).strip()) for text in (one, other))
    if is_words(prepare(one)) and words(one) == words(other):
        return True, "the same words"
    if found := hedge(one, other):
        return False, f"hedged ('{found}')"
    one, other = prepare(one), prepare(other)
    if not one:
        return False, "the gold answer is empty"
    if not other:
        return False, "an empty answer"
    if (choice := _CHOICE.fullmatch(one)) and (chosen := _CHOSEN.fullmatch(other)):
        same = choice[1].lower() == chosen[1].lower()
        return same, "the same choice" if same else "another choice"
    if (glued := _glued(other)) and not _glued(one):
        return False, f"a digit behind a letter ('{glued}') may be a name, a power or a product"
    return comparison.texts(one, other)


def _glued(text: str) -> str | None:
    """The first letter with a digit right behind it, commands (``\\pi2``) and powers of ten (``1e5``) aside."""
    found = re.search(r"[A-Za-z][0-9]", re.sub(r"\\[A-Za-z]+|[0-9][eE][-+]?[0-9]+", " ", text))
    return found and found[0]


# --- algebra: what follows needs sympy and runs in workers only ----------------------------------------------------


class _Unreadable(Exception):
    """The answer is no mathematics that the parser of math-verify can read."""


def _algebra(kind: Kind, gold: str, answer: str) -> bool:
    real = not any("i" in re.sub(r"\\[A-Za-z]+", " ", text) for text in (gold, answer))
    one = _parsed(gold, real)
    try:
        other = _parsed(answer, real)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        raise _Unreadable("cannot be read as mathematics") from error
    if kind in ("equation", "inequality"):
        return _same_relation(one, other)
    return _same_value(one, other)


_UNITS_INSIDE = re.compile(r"\^(?:\\circ|\{\\circ\})")


@lru_cache(maxsize=64)
def _parsed(text: str, real: bool) -> Any:
    r"""A compact LaTeX text as a sympy object with exact numbers; ``i`` is the imaginary unit.

    Args:
        real: whether letters stand for real numbers (``|x|`` is the root of ``x^2``).
    """
    import sympy
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    settings = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none")  # type: ignore[arg-type]
    latex = normalize_latex(_UNITS_INSIDE.sub("", text).replace("'", "^{\\prime}"), settings)
    reading = ConversionConfig(lowercase_symbols=False)
    found = latex2sympy(latex, is_real=real or None, normalization_config=None, conversion_config=reading)
    if not isinstance(found, sympy.Basic | sympy.MatrixBase):
        raise ValueError("not one mathematical object")
    decimals = {one: sympy.Rational(str(one)) for one in found.atoms(sympy.Float)}
    imaginary = {sign: sympy.I for sign in found.free_symbols if str(sign) == "i"}
    return found.xreplace({**decimals, **imaginary})


def _same_relation(gold: Any, answer: Any) -> bool:
    """Whether two relations are the same up to a constant factor, which is positive for inequalities."""
    import sympy

    if not isinstance(gold, sympy.core.relational.Relational) or not isinstance(
        answer, sympy.core.relational.Relational
    ):
        return False
    if isinstance(gold, sympy.StrictGreaterThan | sympy.GreaterThan):
        gold = gold.reversed
    if isinstance(answer, sympy.StrictGreaterThan | sympy.GreaterThan):
        answer = answer.reversed
    if type(gold) is not type(answer):
        return False
    sides: list[Any] = [gold, answer]
    one, other = (sympy.expand((side.lhs - side.rhs).doit()) for side in sides)
    if one.is_zero or other.is_zero:
        return bool(one.is_zero and other.is_zero)
    ratio = sympy.simplify(one / other)
    if ratio.free_symbols or ratio.is_zero:
        return False
    return isinstance(gold, sympy.Eq | sympy.Ne) or bool(ratio.is_positive)


def _same_value(gold: Any, answer: Any) -> bool:
    """Whether math-verify takes two values for equal and they are so exactly."""
    import sympy
    from math_verify import verify

    if isinstance(gold, sympy.Expr) != isinstance(answer, sympy.Expr) or answer.has(sympy.nan, sympy.zoo):
        return False
    numeric = _numerically(gold, answer) if isinstance(gold, sympy.Expr) else None
    if numeric is False:
        return False
    # A decimal of 60 digits is not pi: a rational number has to be equal symbolically.
    rational = isinstance(gold, sympy.Rational) or isinstance(answer, sympy.Rational)
    if numeric is None or rational or gold.free_symbols or answer.free_symbols:
        return bool(
            verify(
                gold, answer, float_rounding=DIGITS, numeric_precision=DIGITS, timeout_seconds=None, raise_on_error=True
            )
        )
    return True


_WHOLE_POINTS = (("3", "1"), ("4", "3"), ("7", "2"))  # where sums and factorials have a value
_POINTS = (("7/5", "11/13"), ("17/23", "29/19"), ("31/37", "5/41"))  # where expressions with letters are compared


def _numerically(gold: Any, answer: Any) -> bool | None:
    """Whether two expressions have the same value at all points where both have one; None if nowhere.

    To 60 digits of either, and their difference vanishes to 1,000: ``2^{1000}`` is not ``2^{1000}+1``.
    """
    import sympy

    letters = sorted(gold.free_symbols | answer.free_symbols, key=str)
    counted = (sympy.Sum, sympy.Product, sympy.factorial, sympy.binomial)
    points = _WHOLE_POINTS if gold.has(*counted) or answer.has(*counted) else _POINTS
    found = None
    for first, step in points[: 3 if letters else 1]:
        at = {letter: sympy.Rational(first) + sympy.Rational(step) * place for place, letter in enumerate(letters)}
        one, other = (side.subs(at).doit().evalf(DIGITS + 10, maxn=400) for side in (gold, answer))
        if not (one.is_number and other.is_number and one.is_finite and other.is_finite):
            continue
        scale = max(abs(one), abs(other))
        if scale != 0 and abs(one - other) > scale * sympy.Float(10) ** (-DIGITS + 5):
            return False
        difference = abs((gold - answer).subs(at).doit().evalf(2, maxn=FINE_DIGITS))
        if difference > scale * sympy.Float(10) ** (-FINE_DIGITS + 50):
            return False
        found = True
    return found


# Packages of sympy that its own functions import when they are first called.
_PACKAGES = """
assumptions calculus combinatorics concrete core discrete functions integrals logic matrices ntheory polys series sets
simplify solvers tensor physics.units utilities.iterables
"""
_SKIPPED = ("tests", "benchmarks", "bench_", "core.compatibility", "core.trace")  # those of core only warn
_EXERCISES = (
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"2\sqrt{3}", "3.46"),
    ("x+1", "1+x"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"),
    (r"\tan^2(y)+1", r"\sec^2(y)"),
    (r"\frac{\ln x}{2}", r"\ln\sqrt{x}"),
    (r"\ln 8", r"3\ln 2"),
    (r"\arctan 2", r"\arctan(2)+0"),
    ("2x-y+1=0", "y=2x+1"),
    (r"x^2+y^2\le 4", r"2x^2+2y^2\le 8"),
    (r"\{\frac{\pi}{2}, x+1\}", r"\{1+x, \pi/2\}"),
    (r"(-\infty,2)\cup(\sqrt{9},\infty)", r"(-\infty,1)\cup[1,2)\cup(3,\infty)"),
    (r"\begin{pmatrix} x+1 \\ \sqrt{8} \end{pmatrix}", r"\begin{pmatrix} 1+x \\ 2\sqrt{2} \end{pmatrix}"),
    (r"\sum_{k=1}^{n} k", r"\frac{n(n+1)}{2}"),
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
    ("n!", "n(n-1)!"),
    (r"e^{i\pi/4}", r"\frac{\sqrt2}{2}(1+i)"),
    (r"\frac{1}{2}x", "0.5x"),
    (r"|x-1|", r"|1-x|"),
    (r"\lfloor x\rfloor", r"\lfloor x \rfloor + 0"),
    ("f(x)+1", "1+f(x)"),
    ("x^{y}", "x^{y+1}"),
    (r"\sqrt[3]{x}^2", "x^{2/3}"),
    ("x+", "+x"),
)


def warm() -> None:
    """Load all that algebra needs, so that a worker may forbid itself files and imports afterwards."""
    import sympy

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns that its time limit is off; ours is not
    warnings.filterwarnings(
        "ignore", module=r"sympy|latex2sympy2_extended|antlr4|mpmath"
    )  # showing one reads the source
    for name in _PACKAGES.split():
        package = importlib.import_module(f"sympy.{name}")
        for found in pkgutil.walk_packages(getattr(package, "__path__", ()), f"{package.__name__}."):
            if not any(skipped in found.name for skipped in _SKIPPED):
                importlib.import_module(found.name)
    for gold, answer in _EXERCISES:
        judge(gold, answer)
    sympy.core.cache.clear_cache()
