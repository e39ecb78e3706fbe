r"""The rules: what makes an answer right or wrong before any algebra is tried.

Two readings (``forms.py``) are compared part by part. Everything here is linear in the length up to a bound, and
nothing is evaluated; what only algebra can tell is left to the caller's ``Algebra``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from mulligan.verify.forms import (
    FLIPPED,
    KINDS,
    RELATIONS,
    Based,
    Form,
    Group,
    Interval,
    Math,
    Named,
    Number,
    Ratio,
    Relation,
    Words,
    cut,
    equation,
    read,
)
from mulligan.verify.refusals import refusal, unevaluated, variables
from mulligan.verify.typography import compact, untext

MAX_NESTED = 6  # values within values

Kind = Literal["value", "equation", "inequality", "set"]
# Whether two normalised texts are equal, as values, equations (same solutions), inequalities or sets.
Algebra = Callable[[Kind, str, str], bool]
Finding = tuple[bool | None, str]  # None: only algebra can tell; the reason says why it is right or wrong


@dataclass(frozen=True, slots=True)
class Comparison:
    """How to compare: whether the task's answers are percentages, and what decides algebra (None: nothing does)."""

    percent: bool = False
    algebra: Algebra | None = None

    def texts(self, gold: str, answer: str, depth: int = 0) -> Finding:
        """Compare two prepared texts in all their readings."""
        if compact(untext(gold)) == compact(untext(answer)) and compact(gold):
            return True, "the same text"
        if depth > MAX_NESTED:
            return False, "nested too deeply to be compared"
        first: Finding | None = None
        undecided: Finding | None = None
        for one in read(gold, gold=True):
            for other in read(answer):
                finding = self.forms(one, other, gold, answer, depth)
                if finding[0]:
                    return finding
                if finding[0] is None:
                    undecided = finding
                elif first is None or first[1].startswith("words"):
                    first = finding
        found = undecided or first
        assert found is not None, "a text has a reading"
        return found

    def forms(self, gold: Form, answer: Form, gold_text: str, answer_text: str, depth: int) -> Finding:
        """Compare two readings; the texts are those that they were read from."""
        if isinstance(answer, Named) and not isinstance(gold, Named | Relation):
            return self.texts(gold_text, answer.value, depth + 1)
        if isinstance(gold, Named) and not isinstance(answer, Named | Relation):
            return self.texts(gold.value, answer_text, depth + 1)
        match gold, answer:
            case Number() as one, Number() as other:
                return self._numbers(one, other)
            case Named() as one, Named() as other:
                return self._named(one, other, depth)
            case (Named() | Relation()) as one, (Named() | Relation()) as other:
                return self._relations(one, other, depth)
            case Based() as one, Based() as other:
                return one == other, "the same digits" if one == other else "another number or base"
            case Ratio() as one, Ratio() as other:
                same = one.parts == other.parts and (not one.half or not other.half or one.half == other.half)
                return same, "the same ratio or time" if same else "another ratio or time"
            case Ratio(parts=(upper, lower)), Math() | Number():
                return self._fraction(upper, lower, answer_text)
            case Math() | Number(), Ratio(parts=(upper, lower)):
                return self._fraction(upper, lower, gold_text)
            case Words(one), Words(other):
                return self._words(one, other)
            case Interval() as one, Interval() as other:
                return self._intervals(one, other, depth)
            case Interval() as one, Group(kind="tuple" | "closed" | "left" | "right", parts=(_, _)) as other:
                return self._intervals(one, _bounds(other), depth)
            case Group(kind="tuple" | "closed" | "left" | "right", parts=(_, _)) as one, Interval() as other:
                return self._intervals(_bounds(one), other, depth)
            case Group() as one, Group() as other:
                return self._groups(one, other, depth)
            case Math(one, wanted), Math(other, given):
                if wanted and given and wanted != given:
                    return False, f"the unit is {given}, not {wanted}"
                return self._values(one, other)
            case Math(one), Number():
                if variables(one):
                    return False, "a number in place of an expression with letters"
                return self._values(one, compact(untext(answer_text)))
            case (Interval() | Relation()) as one, (Interval() | Relation()) as other if _single(one) and _single(
                other
            ):
                return self._algebra("inequality", one.whole, other.whole)
            case _, Relation():
                return False, "an equation or a chain of equations in place of a value"
            case Number(), Math(other):
                return False, unevaluated(other) or "not a plain number"
            case _:
                return False, f"{KINDS[type(answer)]} in place of {KINDS[type(gold)]}"

    def _numbers(self, gold: Number, answer: Number) -> Finding:
        if gold.unit and answer.unit and gold.unit != answer.unit:
            return False, f"the unit is {answer.unit}, not {gold.unit}"
        if _exact(gold) == _exact(answer):
            return True, "the same number"
        if (self.percent or gold.percent) and gold.value == answer.value:
            return True, "the same percentage"
        if answer.percent and gold.value == answer.value:
            return False, "a percentage where a plain number is asked"
        close = gold.value and abs(_exact(answer) / _exact(gold) - 1) < Fraction(1, 1000)
        return False, "equal only by rounding" if close else "another number"

    def _fraction(self, upper: int, lower: int, text: str) -> Finding:
        same = compact(untext(text)) in (f"{upper}/{lower}", f"\\frac{{{upper}}}{{{lower}}}")
        return same, "the same ratio" if same else "another ratio"

    def _words(self, gold: str, answer: str) -> Finding:
        same = words(gold) == words(answer)
        return same, "the same words" if same else "other words"

    def _named(self, gold: Named, answer: Named, depth: int) -> Finding:
        if gold.name == answer.name:
            return self.texts(gold.value, answer.value, depth + 1)
        values = [read(side.value)[0] for side in (gold, answer)]
        if all(isinstance(value, Number | Words | Group) for value in values):
            return False, f"a value for {answer.name}, not for {gold.name}"
        return self._algebra("equation", gold.whole, answer.whole)

    def _relations(self, gold: Named | Relation, answer: Named | Relation, depth: int) -> Finding:
        one, other = (_as_relation(form) for form in (gold, answer))
        if len(one.operators) == len(other.operators):
            straight = one.operators == other.operators
            flipped = tuple(FLIPPED.get(operator, "") for operator in other.operators[::-1]) == one.operators
            ways = [other.sides] * straight + [other.sides[::-1]] * flipped
            findings = [self._all(one.sides, sides, depth) for sides in ways]
            if any(found for found, _ in findings):
                return True, "the same relation"
            if len(one.operators) == 1 and one.operators[0] in ("=", "<", ">", "<=", ">=", "!=") and ways:
                kind: Kind = "equation" if one.operators[0] in ("=", "!=") else "inequality"
                return self._algebra(kind, one.whole, other.whole)
            if any(found is None for found, _ in findings):
                return None, ""
        if isinstance(answer, Relation) and isinstance(gold, Named) and set(answer.operators) == {"="}:
            return False, "a chain of equations where one is asked"
        return False, "another relation"

    def _intervals(self, gold: Interval, answer: Interval, depth: int) -> Finding:
        if gold.name and answer.name and gold.name != answer.name:
            return False, f"bounds for {answer.name}, not for {gold.name}"
        if gold.closed != answer.closed:
            return False, "a bound is taken in on one side only"
        return self._all((gold.low, gold.high), (answer.low, answer.high), depth)

    def _groups(self, gold: Group, answer: Group, depth: int) -> Finding:
        kinds = gold.kind, answer.kind
        if kinds in (("tuple", "tuple"), ("closed", "closed"), ("left", "left"), ("right", "right"), ("tuple", "list")):
            return self._all(gold.parts, answer.parts, depth)
        if kinds == ("rows", "rows"):
            if gold.width != answer.width:
                return False, "a matrix of another shape"
            return self._all(gold.parts, answer.parts, depth)
        if kinds in (("list", "list"), ("list", "set"), ("set", "list"), ("set", "set"), ("union", "union")):
            if kinds[0] == "list" and _assigned(gold) and not _assigned(answer):
                return self._all(gold.parts, answer.parts, depth)
            found = self._any_order(gold.parts, answer.parts, depth)
            return self._algebra("set", gold.whole, answer.whole) if kinds[0] == "union" and not found[0] else found
        if kinds == ("list", "tuple"):
            return self._all(gold.parts, answer.parts, depth)
        if kinds in (("union", "list"), ("list", "union")):
            return self._any_order(gold.parts, answer.parts, depth)
        names = {"closed": "a closed interval", "left": "a half-open interval", "right": "a half-open interval"}
        names |= {"rows": "a matrix", "list": "a list", "set": "a set", "tuple": "a tuple", "union": "a union of sets"}
        return False, f"{names[answer.kind]} in place of {names[gold.kind]}"

    def _all(self, gold: Sequence[str], answer: Sequence[str], depth: int) -> Finding:
        if len(gold) != len(answer):
            grouped = _regrouped(gold, answer)
            if grouped is None:
                return False, f"{len(answer)} values where {len(gold)} are asked"
            answer = grouped
        undecided = False
        for left, right in zip(gold, answer, strict=True):
            found, reason = self.texts(left, right, depth + 1)
            if found is False:
                return False, reason
            undecided |= found is None
        return (None, "") if undecided else (True, "equal part by part")

    def _any_order(self, gold: Sequence[str], answer: Sequence[str], depth: int) -> Finding:
        if len(gold) != len(answer):
            gold, answer = _once(gold), _once(answer)
            grouped = _regrouped(gold, answer)
            if grouped is None:
                return False, f"{len(answer)} values where {len(gold)} are asked"
            answer = grouped
        left = list(answer)
        open_: list[str] = []
        for part in gold:
            same = next((other for other in left if self.texts(part, other, depth + 1)[0]), None)
            if same is None:
                open_.append(part)
            else:
                left.remove(same)
        if not open_:
            return True, "equal part by part"
        for part in open_:
            if all(self.texts(part, other, depth + 1)[0] is False for other in left):
                return False, "a value is missing or wrong"
        return None, ""

    def _values(self, gold: str, answer: str) -> Finding:
        if gold == answer:
            return True, "the same text"
        refused = refusal(gold, answer)
        if refused:
            return False, refused
        return self._algebra("value", gold, answer)

    def _algebra(self, kind: Kind, gold: str, answer: str) -> Finding:
        refused = refusal(gold, answer)
        if refused:
            return False, refused
        if self.algebra is None:
            return None, ""
        same = self.algebra(kind, gold, answer)
        return same, "equal by algebra" if same else "not equal"


def _exact(one: Number) -> Fraction:
    return one.value / 100 if one.percent else one.value


def _bounds(group: Group) -> Interval:
    closed = {"tuple": (False, False), "closed": (True, True), "left": (True, False), "right": (False, True)}
    return Interval("", group.parts[0], group.parts[1], closed[group.kind])


def _as_relation(form: Named | Relation) -> Relation:
    if isinstance(form, Relation):
        return form
    sides = cut(form.whole, lambda token: token in RELATIONS)
    assert sides is not None, "a named value has been cut before"
    return Relation(tuple(RELATIONS[sign] for sign in sides[1]), tuple(sides[0]), form.whole)


def _single(form: Interval | Relation) -> bool:
    """Whether there is one sign of relation only."""
    found = cut(form.whole, lambda token: token in RELATIONS)
    return found is not None and len(found[1]) == 1


def _assigned(group: Group) -> bool:
    """Whether each part names its value, each with another name (``x = 1, y = 2``)."""
    named = [equation(part, gold=True) for part in group.parts]
    return all(isinstance(one, Named) for one in named) and len(
        {one.name for one in named if isinstance(one, Named)}
    ) == len(named)


def _once(parts: Sequence[str]) -> list[str]:
    """The parts without those that are written twice."""
    return list({compact(part): part for part in parts}.values())


def _regrouped(gold: Sequence[str], answer: Sequence[str]) -> list[str] | None:
    """The parts of an answer with thousands separators (``(1,000, 2,000)``) put together again; None if it fits not."""
    joined: list[str] = []
    for part in answer:
        if (
            joined
            and re.fullmatch(r"[0-9]{3}(?:\.[0-9]+)?", part)
            and re.fullmatch(r"[-+]?[1-9][0-9]{0,2}(?:,[0-9]{3})*", joined[-1])
        ):
            joined[-1] += f",{part}"
        else:
            joined.append(part)
    return joined if len(joined) == len(gold) else None


_SAME_WORDS = {"dne": "does not exist", "no solutions": "no solution", "no real solutions": "no real solution"}


def words(text: str) -> str:
    """Words without case, articles and punctuation."""
    plain = re.sub(r"[^a-z0-9 ]+", " ", untext(text).lower().replace("'", ""))
    plain = " ".join(plain.split())
    plain = re.sub(r"^(?:an?|the) (?=[a-z])", "", plain)
    return _SAME_WORDS.get(plain, plain)
