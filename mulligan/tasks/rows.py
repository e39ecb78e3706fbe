"""Reading questions and gold answers from a JSON-lines file, with one-line errors that name the line."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from mulligan.errors import UserError
from mulligan.verify.answer import equal

PROMPT_COLUMNS = ("prompt", "question", "problem")  # looked for in this order
ANSWER_COLUMNS = ("answer",)


@dataclass(frozen=True, slots=True)
class Row:
    """One question as it was read."""

    question: str
    answer: str
    reference: str | None  # a written-out solution, where the file has one
    columns: dict[str, Any] = field(repr=False)  # what else the row holds

    @property
    def key(self) -> str:
        """What makes two questions the same: the text, without regard to case, blanks or Unicode variants."""
        return " ".join(unicodedata.normalize("NFKC", self.question).casefold().split())


def read_rows(path: Path, prompt_column: str | None, answer_column: str | None) -> tuple[list[Row], int]:
    """The rows of one file and how many were left out because their answer is null or blank.

    Args:
        path: JSON lines, or a ``.json`` file that holds one list of objects.
        prompt_column, answer_column: None takes the usual name that the first row has.

    Raises:
        UserError: the file cannot be read, is empty or has a malformed row; names the file and the line.
    """
    rows: list[Row] = []
    unanswered = 0
    columns: tuple[str, str] | None = None
    for place, record in _records(path):
        if columns is None:
            columns = (
                _column(place, record, prompt_column, PROMPT_COLUMNS, "prompt_column"),
                _column(place, record, answer_column, ANSWER_COLUMNS, "answer_column"),
            )
        row = _row(place, record, *columns)
        if row is None:
            unanswered += 1
        else:
            rows.append(row)
    if columns is None:
        raise UserError(f"{path}: the file is empty")
    if not rows:
        raise UserError(f"{path}: none of its {unanswered} rows has an answer")
    return rows, unanswered


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, each with its place for messages (``data.jsonl:3``)."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix == ".json" and text.lstrip().startswith("["):
        for at, record in enumerate(_parse(text, path, 1), start=1):
            yield f"{path}: item {at}", _object(record, f"{path}: item {at}")
        return
    for at, line in enumerate(text.split("\n"), start=1):  # not splitlines: JSON strings may hold U+2028
        if line.strip():
            yield f"{path}:{at}", _object(_parse(line, path, at), f"{path}:{at}")


def _parse(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{line + error.lineno - 1}: bad JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits; thousands of nested brackets
        raise UserError(f"{path}:{line}: JSON beyond reason (a huge number or very deep nesting)") from None


def _object(record: Any, place: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f'{place}: must be an object such as {{"prompt": ..., "answer": ...}}')
    return record


def _column(place: str, record: dict[str, Any], named: str | None, usual: Sequence[str], setting: str) -> str:
    for name in usual if named is None else (named,):
        if name in record:
            return name
    if named is not None:
        raise _missing(place, named, record)
    raise UserError(f"{_missing(place, ' or '.join(usual), record)}; name yours in '{setting}'")


def _missing(place: str, name: str, record: dict[str, Any]) -> UserError:
    return UserError(f"{place}: column '{name}' is missing (columns: {', '.join(record) or 'none'})")


def _row(place: str, record: dict[str, Any], prompt_column: str, answer_column: str) -> Row | None:
    """The row; None when it has no answer, as a few rows of published sets have none."""
    for name in (prompt_column, answer_column):
        if name not in record:
            raise _missing(place, name, record)
    question = record[prompt_column]
    if not isinstance(question, str):
        raise UserError(f"{place}: column '{prompt_column}' must be text, not {_shown(question)}")
    if not question.strip():
        raise UserError(f"{place}: column '{prompt_column}' is empty")
    answer, reference = _gold(_text(place, answer_column, record[answer_column]))
    if not answer:
        return None
    if not equal(answer, answer):
        raise UserError(f"{place}: answer {_shown(answer)} would not verify against itself")
    columns = {name: value for name, value in record.items() if name not in (prompt_column, answer_column)}
    if reference is None and isinstance(columns.get("solution"), str):
        reference = columns["solution"].strip() or None
    return Row(question.strip(), answer, reference, columns)


def _text(place: str, column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{place}: column '{column}' must be text or a number, not {_shown(value)}")
    return format(Decimal(repr(value)), "f")  # 1e-07 as 0.0000001, which the comparison reads as a number


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _gold(text: str) -> tuple[str, str | None]:
    """The gold answer, and the solution where the text holds both as GSM8K does (``solution #### answer``)."""
    before, mark, after = text.rpartition("####")
    if not mark:
        return text.strip(), None
    # GSM8K annotates its sums for a calculator: <<48/2=24>>.
    return after.strip(), re.sub(r"<<[^<>]*>>", "", before).strip() or None
