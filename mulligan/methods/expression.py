"""Compositions as text: ``srpo+rltt``, ``dsrl(lte, steps=20)``, ``lte(gamma=0.2)+rltt``, ``./mine.py:mine+rltt``."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mulligan.errors import UserError, nearest
from mulligan.method import Method
from mulligan.methods.preset import Preset, from_file
from mulligan.schedule import Schedule, constant

# A name may hold "++" (reinforce++); any other "+" composes.
_TOKEN = re.compile(r"\s*(?:(?P<name>[\w./~:\\-]+(?:\+\+[\w-]*)?)|(?P<sign>[+(),=])|(?P<text>\"[^\"]*\"))")


@dataclass(slots=True)
class Call:
    """One method of a composition, as written."""

    name: str
    arguments: list[Call | Sum] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Sum:
    """``a + b + ...``."""

    parts: list[Call | Sum]


@dataclass(frozen=True, slots=True)
class Built:
    """A composition made: what runs, its complete settings, and the settings of the run that its presets bring."""

    schedule: Schedule
    settings: dict[str, Any]  # of the one method; with several, a table for each by name
    run: dict[str, Any]


def build(text: str, settings: Mapping[str, Any], presets: Mapping[str, Preset], named: Collection[str] = ()) -> Built:
    """Builds a composition.

    Args:
        settings: by name; with several methods a bare setting goes to the one that has it, a table to its method.
        named: settings of the run that the user gives (``optimizer.updates_per_batch``); there no preset is asked.

    Raises:
        UserError: whatever does not fit, in one line.
    """
    tree = _Parser(text).whole()
    calls = _calls(tree)
    names = [call.name for call in calls]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"method.name: '{text}' names {twice[0]} twice")
    found = {call.name: _preset(call.name, presets) for call in calls}
    tables = _by_method(settings, found)
    resolved = {call.name: found[call.name].resolve({**call.settings, **tables[call.name]}) for call in calls}
    made = _make(tree, found, resolved)
    run: dict[str, Any] = {}
    for name, preset in found.items():
        for key, value in preset.run.items():
            if key not in named and run.setdefault(key, value) != value:
                raise UserError(
                    f"method.name: {name} wants {key}={value}, another method of '{text}' {run[key]}: name it"
                )
    return Built(
        made if isinstance(made, Schedule) else constant(made),
        resolved[names[0]] if len(names) == 1 else resolved,
        run,
    )


def _preset(name: str, presets: Mapping[str, Preset]) -> Preset:
    if ".py:" in name:
        return from_file(name)
    if name not in presets:
        raise UserError(f"method.name: '{name}' is unknown{nearest(name, presets)}")
    return presets[name]


def _by_method(settings: Mapping[str, Any], found: Mapping[str, Preset]) -> dict[str, dict[str, Any]]:
    """The user's settings, for each method of the composition."""
    tables: dict[str, dict[str, Any]] = {name: {} for name in found}
    only = next(iter(found)) if len(found) == 1 else None
    for key, value in settings.items():
        if key in found and isinstance(value, Mapping):
            tables[key].update(value)
            continue
        owners = [only] if only else [n for n, p in found.items() if key in p.settings().model_fields]
        if not owners:
            known = [*found, *(k for p in found.values() for k in p.settings().model_fields)]
            raise UserError(f"method.{key}: {', '.join(found)} have no such setting{nearest(key, known)}")
        if len(owners) > 1:
            raise UserError(f"method.{key}: {' and '.join(owners)} both have it; write method.{owners[0]}.{key}=...")
        tables[owners[0]].setdefault(key, value)
    return tables


def _calls(tree: Call | Sum) -> list[Call]:
    if isinstance(tree, Sum):
        return [call for part in tree.parts for call in _calls(part)]
    return [tree, *(call for argument in tree.arguments for call in _calls(argument))]


def _make(tree: Call | Sum, found: Mapping[str, Preset], resolved: Mapping[str, Any]) -> Method | Schedule:
    if isinstance(tree, Sum):
        made = [_make(part, found, resolved) for part in tree.parts]
        for part, method in zip(tree.parts, made, strict=True):
            if isinstance(part, Call) and isinstance(method, Method):
                _check_idle(part, method, found[part.name], resolved[part.name])
        out = made[0]
        for other in made[1:]:
            out = _add(out, other)
        return out
    preset = found[tree.name]
    if tree.arguments and not preset.takes_method:
        raise UserError(f"method.name: {tree.name} takes no other method in parentheses")
    if len(tree.arguments) > 1:
        raise UserError(f"method.name: {tree.name} takes one method, not {len(tree.arguments)}")
    inner = [_make(argument, found, resolved) for argument in tree.arguments]
    if any(isinstance(m, Schedule) for m in inner):
        raise UserError(f"method.name: {tree.name} takes a method, not one that changes over time")
    made = preset.build(*inner, **resolved[tree.name])
    if not isinstance(made, Method | Schedule):
        raise UserError(f"method.name: {tree.name} returns {type(made).__name__}, not a Method or a Schedule")
    for key in resolved[tree.name]:
        if _without(key, preset, inner, resolved[tree.name]) == made:
            raise UserError(f"method.{tree.name}.{key}: has no effect beside the other settings")
    return made


def _check_idle(call: Call, made: Method, preset: Preset, resolved: Mapping[str, Any]) -> None:
    """Refuses a setting that is lost in the composition, because it touches no part that the method gives."""
    for key in resolved:
        other = _without(key, preset, (), resolved)
        if isinstance(other, Method) and all(_part(made, p) == _part(other, p) for p in made.changes | other.changes):
            gives = ", ".join(sorted(made.changes))
            raise UserError(f"method.{call.name}.{key}: has no effect here: {call.name} gives {gives}")


def _without(
    key: str, preset: Preset, inner: Sequence[Method | Schedule], resolved: Mapping[str, Any]
) -> Method | Schedule | None:
    """The method with one setting at its default; None where it has that value, or where it cannot have it."""
    settings = preset.without(key, resolved)
    try:
        return None if settings is None else preset.build(*inner, **settings)
    except UserError:  # the default does not go with the other settings, so this one matters
        return None


def _part(method: Method, name: str) -> Any:
    return getattr(method, name) if hasattr(method, name) else getattr(method.terms[0], name)


def _add(one: Method | Schedule, other: Method | Schedule) -> Method | Schedule:
    """``+``; a method is added to every phase of a schedule."""
    if isinstance(one, Method) and isinstance(other, Method):
        return one + other
    if isinstance(one, Schedule) and isinstance(other, Schedule):
        raise UserError("method.name: both sides of '+' change over time")
    if isinstance(one, Method):
        one, other = other, one
    assert isinstance(one, Schedule) and isinstance(other, Method)
    return Schedule(tuple((steps, phase + other) for steps, phase in one.phases))


class _Parser:
    """``sum := call ('+' call)*``, ``call := name ['(' argument (',' argument)* ')']``, ``argument := key '=' value |
    sum``; a value is TOML, a bare word is a string."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def whole(self) -> Call | Sum:
        tree = self._sum()
        if self._peek():
            raise self._error()
        return tree

    def _sum(self) -> Call | Sum:
        parts: list[Call | Sum] = [self._call()]
        while self._take("+"):
            parts.append(self._call())
        return parts[0] if len(parts) == 1 else Sum(parts)

    def _call(self) -> Call:
        call = Call(self._name())
        if self._take("("):
            while True:
                self._argument(call)
                if self._take(")"):
                    break
                if not self._take(","):
                    raise self._error()
        return call

    def _argument(self, call: Call) -> None:
        before = self.at
        key = self._name()
        if not self._take("="):
            self.at = before
            call.arguments.append(self._sum())
            return
        if key in call.settings:
            raise UserError(f"method.name: '{self.text}' sets {key} twice")
        match = _TOKEN.match(self.text, self.at)
        if match is None or match["sign"]:
            raise self._error()
        self.at, word = match.end(), match["name"] or match["text"]
        try:
            call.settings[key] = tomllib.loads(f"x = {word}")["x"]
        except tomllib.TOMLDecodeError:
            call.settings[key] = word

    def _name(self) -> str:
        match = _TOKEN.match(self.text, self.at)
        if match is None or not match["name"]:
            raise self._error()
        self.at = match.end()
        return match["name"]

    def _peek(self) -> str:
        return self.text[self.at :].strip()

    def _take(self, sign: str) -> bool:
        match = _TOKEN.match(self.text, self.at)
        if match is None or match["sign"] != sign:
            return False
        self.at = match.end()
        return True

    def _error(self) -> UserError:
        here = self._peek()
        where = f"at '{here[:20]}'" if here else "at its end"
        return UserError(
            f"method.name: '{self.text}' is no composition ({where}); such as: srpo+rltt, dsrl(lte, steps=20)"
        )
