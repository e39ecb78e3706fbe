"""What an evaluation is of: its parts, from the command line or from a suite's TOML file.

A part is a task under a label with its sampling settings. The command line gives all parts the same sampling settings;
a suite gives each its own:

    samples = 8                       # for all parts that do not say otherwise

    [[evaluate]]
    task.name = "chain"
    problems = 256

    [[evaluate]]
    label = "long"
    task = { name = "chain", level = 4 }
    max_new_tokens = [64, 128]        # a row for each
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from mulligan.config import Section, TaskSection, load_run, read_toml
from mulligan.errors import UserError, nearest

_LABEL = r"[A-Za-z0-9][\w.@+-]*"


class Measure(Section):
    """How a part is sampled; ``max_new_tokens``, ``loops`` and ``exit_threshold`` take one value or several."""

    split: Literal["dev", "test"] = "test"
    problems: int = Field(default=256, ge=1)
    samples: int = Field(default=8, ge=1)
    temperature: float = Field(default=1.0, ge=0)
    max_new_tokens: list[int] = Field(default=[128])
    seed: int = 0
    loops: list[int] | Literal["all"] | None = None
    exit_threshold: list[float] | None = None
    stop: list[str] = Field(default=[])  # strings that end a response beside EOS

    @field_validator("max_new_tokens", "loops", "exit_threshold", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("max_new_tokens", "loops", "exit_threshold")
    @classmethod
    def _in_range(cls, value: Any, info: Any) -> Any:
        if not isinstance(value, list):
            return value
        if not value:
            raise ValueError("needs at least one value")
        for number in value:
            if info.field_name == "exit_threshold":
                if not 0 <= number <= 1:
                    raise ValueError(f"{number} must be a number from 0 to 1")
            elif number < 1:
                raise ValueError(f"{number} must be a number from 1")
        twice = sorted(n for n in set(value) if value.count(n) > 1)
        if twice:
            raise ValueError(f"{twice[0]} is named twice")
        return value


class _Part(Measure):
    """One ``[[evaluate]]`` table."""

    label: str | None = Field(default=None, pattern=rf"^{_LABEL}$")
    task: TaskSection


class _Suite(Measure):
    """A whole file; the keys beside ``evaluate`` are the parts' defaults."""

    evaluate: list[_Part] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Cell:
    """One row: how far the model may compute."""

    loops: int | None  # None: the model's own number
    exit_threshold: float | None
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Part:
    """One task of an evaluation."""

    label: str
    task: str
    settings: dict[str, Any]  # the task's
    how: Measure
    cells: tuple[Cell, ...] = field(default=())

    def with_cells(self, loops: int) -> Part:
        """With the rows that it has for a model of so many loops."""
        wanted = list(range(1, loops + 1)) if self.how.loops == "all" else self.how.loops or [None]
        cells = product(wanted, self.how.exit_threshold or [None], self.how.max_new_tokens)
        return Part(self.label, self.task, self.settings, self.how, tuple(Cell(*cell) for cell in cells))


def parts_of_suite(file: Path, flags: Mapping[str, Any], overrides: Sequence[str]) -> list[Part]:
    """A suite's parts.

    Args:
        flags: settings of :class:`Measure` from the command line; they hold for every part.
        overrides: ``label.key=value``, settings of that part's task.

    Raises:
        UserError: one line that names the file, the table and the key.
    """
    data = read_toml(file)
    try:
        suite = _Suite.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{file}: {_said(error)}") from None
    defaults = suite.model_dump(exclude_unset=True, exclude={"evaluate"})
    parts = []
    for at, table in enumerate(suite.evaluate, start=1):
        if "name" not in table.task.model_fields_set:
            raise UserError(f"{file}: evaluate {at}: task.name is missing (mulligan tasks lists them)")
        own = table.model_dump(exclude_unset=True, exclude={"label", "task"})
        how = _measure({**defaults, **own, **flags})
        parts.append(Part(table.label or table.task.name, table.task.name, table.task.settings, how))
    _check_labels([part.label for part in parts], f'{file}: give one of them another: label = "..."')
    return [_overridden(part, mine) for part, mine in zip(parts, _sorted(overrides, parts), strict=True)]


def parts_of_line(
    tasks: Sequence[str], flags: Mapping[str, Any], overrides: Sequence[str], run: Mapping[str, Any]
) -> list[Part]:
    """The parts that a command line names.

    Args:
        tasks: ``--task`` as often as it was given, each ``NAME`` or ``LABEL=NAME``; none: the run's own task, or chain.
        overrides: ``task.key=value`` where there is one part, else ``label.key=value``.
        run: a run's settings: parts of its task start from that task's, and what ``flags`` leaves out is sampled as the
            run has sampled. Empty for any other model.

    Raises:
        UserError: one line that names the option or the key.
    """
    sampled = {key: run["sampling"][key] for key in ("temperature", "max_new_tokens", "stop")} if run else {}
    how, own = _measure({**sampled, **flags}), run.get("task", {})
    named = [_named(word) for word in tasks]
    if len(named) <= 1:  # `task.name=boolean` names the task of a single part as well
        chosen = load_run(None, [o for o in overrides if o.startswith("task.")]).task
        if "name" in chosen.model_fields_set:
            if named and named[0][1] != chosen.name:
                raise UserError(f"--task {tasks[0]} and task.name={chosen.name} are two tasks")
            named = named or [(chosen.name, chosen.name)]
    if not named:
        name = str(own.get("name", "chain"))
        named = [(name, name)]
    _check_labels([label for label, _ in named], "name them apart: --task first=NAME --task second=NAME")
    settings = {k: v for k, v in own.items() if k != "name"}
    parts = [Part(label, name, settings if name == own.get("name") else {}, how) for label, name in named]
    return [_overridden(part, mine) for part, mine in zip(parts, _sorted(overrides, parts), strict=True)]


def _named(word: str) -> tuple[str, str]:
    label, sign, name = word.partition("=")
    if not sign:
        return word, word
    if not re.fullmatch(_LABEL, label) or not name:
        raise UserError(f"--task: '{word}' must be NAME or LABEL=NAME, the label of letters, digits, and . _ @ + -")
    return label, name


def _check_labels(labels: Sequence[str], remedy: str) -> None:
    twice = next((label for at, label in enumerate(labels) if label in labels[:at]), None)
    if twice is not None:
        raise UserError(f"two tasks are called '{twice}'; {remedy}")


def _sorted(overrides: Sequence[str], parts: Sequence[Part]) -> list[list[str]]:
    """Each part's overrides, as ``task.key=value``."""
    found: list[list[str]] = [[] for _ in parts]
    labels = sorted((part.label for part in parts), key=len, reverse=True)  # a label may hold a dot
    several = f" (tasks: {', '.join(part.label for part in parts)})"
    for override in overrides:
        key, sign, _ = override.partition("=")
        if not sign or "." not in key:
            takes = "task.key=value" if len(parts) == 1 else "label.key=value"
            raise UserError(f"'{override}': eval takes {takes} alone" + ("" if len(parts) == 1 else several))
        label = next((label for label in labels if key.startswith(f"{label}.")), None)
        if label is None and key.startswith("task.") and len(parts) == 1:
            label = parts[0].label
            found[0].append(override)
            continue
        if label is None:
            if key.startswith("task."):
                raise UserError(f"'{override}': say which task: {parts[0].label}{override[4:]}{several}")
            hint = nearest(key.partition(".")[0], [part.label for part in parts])
            raise UserError(f"'{override}': no such task is evaluated{hint}")
        at = next(at for at, part in enumerate(parts) if part.label == label)
        found[at].append(f"task.{override[len(label) + 1 :]}")
    return found


def _overridden(part: Part, overrides: Sequence[str]) -> Part:
    given = load_run(None, overrides).task
    if "name" in given.model_fields_set and given.name != part.task:
        raise UserError(f"'{part.label}' is the task {part.task}; it cannot be {given.name} as well")
    return Part(part.label, part.task, {**part.settings, **given.settings}, part.how)


def _measure(data: Mapping[str, Any]) -> Measure:
    try:
        return Measure.model_validate(dict(data))
    except ValidationError as error:
        raise UserError(_said(error, options=True)) from None


def _said(error: ValidationError, *, options: bool = False) -> str:
    """The first thing that is wrong, in one line."""
    # A misspelt key comes before the one that is missing for it.
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    path = list(first["loc"])
    where = ""
    if path[:1] == ["evaluate"] and len(path) > 1:
        where, path = f"evaluate {int(path[1]) + 1}: ", path[2:]
    key = str(path[0]) if path else ""
    name = f"--{key.replace('_', '-')}" if options else ".".join(map(str, path))
    if first["type"] == "extra_forbidden":
        known = _Part.model_fields if where else _Suite.model_fields
        return f"{where}'{name}' is no setting{nearest(str(path[-1]), known)}"
    if first["type"] == "missing":
        what = "no [[evaluate]] table" if key == "evaluate" else f"{name} is missing"
        return where + what
    if first["type"] == "value_error":
        return f"{where}{name}: {first['msg'].removeprefix('Value error, ')}"
    if key == "task":
        return f'{where}task is a section: write task.name = "...", not {first["input"]!r}'
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}{name}: {message}, not {first['input']!r}"
