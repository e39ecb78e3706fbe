"""The tables of ``mulligan eval``, at most 80 columns wide."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mulligan.config import flatten

WIDTH = 80
GAP = 2
ACCURACY = "pass@1 [95 %]"
LABEL = 20  # longest label that is shown whole
Numbers = Mapping[str, Any]
# Columns that a narrow table goes without, the first to go last. Which k is the largest is only known from the entries.
OPTIONAL = ("exit", "length", "cut", "pass@n", "maj@n", "steps")


def evaluation_table(report: Numbers) -> RenderableType:
    """A report of ``mulligan eval``: its numbers, what is to be noted, the settings."""
    many = "grid" in report
    body = _grid(report["grid"], report.get("average", [])) if many else _list(report)
    notes = [Text(line) for note in report["notes"] for line in textwrap.wrap(f"note: {note}", WIDTH)]
    return Group(body, *notes, Text(), *_settings(report["settings"]))


# --- one evaluation -------------------------------------------------------------------------------------


def _list(report: Numbers) -> Table:
    """A row a number, with its interval where it has one."""
    table = Table(box=None, padding=(0, GAP, 0, 0), show_header=False, pad_edge=False)
    for key, value in report.items():
        if key in ("notes", "settings") or key.endswith(("_low", "_high")):
            continue
        table.add_row(Text(key), _with_interval(report, key) if f"{key}_low" in report else _number(value))
    return table


def _with_interval(numbers: Numbers, key: str, scale: float = 1, sign: str = "") -> str:
    """``0.310 [0.280, 0.350]``; three digits behind the point, one where the number is above 10."""
    values = [scale * numbers[f"{key}{end}"] for end in ("", "_low", "_high")]
    digits = 1 if scale > 1 or abs(values[0]) >= 10 else 3
    mean, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{values[0]:{sign}.{digits}f} [{low}, {high}]" if sign else f"{mean} [{low}, {high}]"


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- several --------------------------------------------------------------------------------------------


def _grid(entries: Sequence[Numbers], average: Sequence[Numbers]) -> Table:
    rows = [*entries, *average]
    columns = _columns(entries)
    cells = {name: [show(row) for row in rows] for name, show in columns.items()}
    widths = {name: max(len(name), *map(len, shown)) for name, shown in cells.items()}
    for wanted in reversed(OPTIONAL):
        if sum(widths.values()) + GAP * (len(widths) - 1) > WIDTH:
            kind = wanted.removesuffix("n")
            found = [name for name in widths if name == wanted or (kind[-1] == "@" and name.startswith(kind))]
            for name in found:
                if name != ACCURACY:
                    del widths[name]
    excess = sum(widths.values()) + GAP * (len(widths) - 1) - WIDTH
    if "task" in widths and excess > 0:
        cells["task"] = [_short(label, max(widths["task"] - excess, len("average"))) for label in cells["task"]]
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False)
    for name in widths:
        table.add_column(Text(name), justify="left" if name == "task" else "right", no_wrap=True)
    for at in range(len(rows)):
        if at == len(entries):
            table.add_row()
        table.add_row(*(Text(cells[name][at]) for name in widths))
    return table


def _columns(entries: Sequence[Numbers]) -> dict[str, Callable[[Numbers], str]]:
    """What may be shown, in order: only what the entries have, and of their places what tells them apart."""
    out: dict[str, Callable[[Numbers], str]] = {}
    places = {"task": "task", "loops": "loops", "exit_threshold": "exit at", "max_new_tokens": "limit"}
    for key, name in places.items():
        values = {entry[key] for entry in entries}
        if len(values) > 1:
            out[name] = lambda row, key=key: _short("-" if row[key] is None else str(row[key]))
    out[ACCURACY] = lambda row: _with_interval(row, "pass@1")
    for kind in ("maj", "pass"):
        sizes = {max((_size(key, kind) for key in entry), default=0) for entry in entries} - {0, 1}
        if sizes:
            name = f"{kind}@{sizes.pop()}" if len(sizes) == 1 else f"{kind}@n"
            out[name] = lambda row, kind=kind: _largest(row, kind)
    for key, name, form in (
        ("process_correct", "steps", ".3f"),
        ("length", "length", ".0f"),
        ("truncated", "cut", ".3f"),
        ("exit_loop", "exit", ".2f"),
    ):
        if any(key in entry for entry in entries):
            out[name] = lambda row, key=key, form=form: "-" if row.get(key) is None else f"{row[key]:{form}}"
    if any("pass@1_difference" in entry for entry in entries):
        out["points [95 %]"] = lambda row: (
            _with_interval(row, "pass@1_difference", 100, "+") if "pass@1_difference" in row else "-"
        )
    return out


def _size(key: str, kind: str) -> int:
    """k of ``pass@k``, 0 for any other key."""
    head, _, tail = key.partition("@")
    return int(tail) if head == kind and tail.isdecimal() else 0


def _largest(row: Numbers, kind: str) -> str:
    k = max((_size(key, kind) for key in row), default=0)
    return f"{row[f'{kind}@{k}']:.3f}" if k else "-"


def _short(text: str, width: int = LABEL) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


# --- settings -------------------------------------------------------------------------------------------


def _settings(settings: Numbers) -> list[Text]:
    """All that are set, as key=value; a paragraph for the whole, one for each task."""
    parts = settings.get("evaluate", {})
    whole = {key: value for key, value in settings.items() if key != "evaluate"}
    lines: list[Text] = []
    wide = min(max([len("settings"), *map(len, parts)]), LABEL) + GAP
    for title, group in (("settings", whole), *parts.items()):
        words = " ".join(f"{key}={_value(value)}" for key, value in flatten(group).items() if value is not None)
        room = max(WIDTH - wide, 40)
        found = textwrap.wrap(words, room, break_on_hyphens=False, break_long_words=False)
        lines += [Text(f"{_short(title) if at == 0 else '':{wide}}{line}") for at, line in enumerate(found)]
    return lines


def _value(value: Any) -> str:
    plain = isinstance(value, str) and value and not re.search(r"\s", value)
    return value if plain else json.dumps(value, ensure_ascii=False)
