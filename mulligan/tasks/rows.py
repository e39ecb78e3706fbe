"""Questions and gold answers from records, be they lines of a file or rows of a data set; errors name the place."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

from mulligan.errors import UserError, nearest
from mulligan.verify.answer import boxes, equal, stated_answer

PROMPT_COLUMNS = ("prompt", "question", "problem", "messages")  # looked for in this order
ANSWER_COLUMNS = ("answer", "final_answer", "solution")
NO_ANSWERS = ""  # as `answer_column`: the data set has no answers, or they are not to be read


@dataclass(frozen=True)
class Row:
    """One question as it was read."""

    question: str
    answer: str  # "" where the data set has no answers
    reference: str | None  # a written-out solution, where the row has one
    prompt: Any = field(repr=False)  # the prompt column as it was: the question, or a list of messages
    columns: dict[str, Any] = field(repr=False)  # the whole row as it was

    @cached_property
    def key(self) -> str:
        """What makes two questions the same."""
        return normalised(self.question)


_TYPESETTING = re.compile(r"\\left(?![a-z])|\\right(?![a-z])|\\[()\[\],;:! ]|\$|~")
_LOOSE = re.compile(r"(?<!\w) | (?!\w)")


def normalised(text: str) -> str:
    r"""A question's text without regard to case, blanks, Unicode variants, mathematical delimiters and final
    punctuation; two questions with the same normalised text are the same question.

    Blanks between two letters or digits stay, since ``1 1/2`` is not ``11/2``.

    >>> normalised("What is  $2 + \\dfrac12$ ?") == normalised("what is 2+\\frac12")
    True
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = text.replace("’", "'").replace("‘", "'").replace("“", '"').replace("”", '"').replace("−", "-")
    text = re.sub(r"\\[dt]frac(?![a-z])", r"\\frac", text)
    text = " ".join(_TYPESETTING.sub(" ", text).split())
    return _LOOSE.sub("", text).strip(" .?!:;,")


@dataclass(frozen=True, slots=True)
class Columns:
    """Where question and answer stand; ``answer`` is None in a data set without answers. A dot goes into a column
    that holds objects: ``reward_model.ground_truth``."""

    prompt: str
    answer: str | None
    named: bool  # the answer's column was named, so that what it holds is the answer

    @classmethod
    def of(
        cls, place: str, record: Mapping[str, Any], prompt: str | None, answer: str | None, *, needed: bool
    ) -> Columns:
        """The columns that were named, or the usual ones that the record has.

        Args:
            needed: whether there must be answers.

        Raises:
            UserError: a column is missing; the message lists those that there are.
        """
        asked = _column(place, record, prompt, PROMPT_COLUMNS, "prompt_column")
        if answer == NO_ANSWERS and needed:
            raise UserError("task.answer_column: only a task with 'rewards' can do without answers")
        none = answer == NO_ANSWERS or (
            answer is None and not needed and not any(name in record for name in ANSWER_COLUMNS)
        )
        told = None if none else _column(place, record, answer, ANSWER_COLUMNS, "answer_column")
        return cls(prompt=asked, answer=told, named=answer is not None)

    def row(self, place: str, record: dict[str, Any]) -> Row | None:
        """One record as a row; None when it has no answer, as a few rows of published sets have none.

        Raises:
            UserError: it is malformed; names the place and the column.
        """
        prompt = _value(place, record, self.prompt)
        question = _question(place, self.prompt, prompt)
        if self.answer is None:
            return Row(question, "", None, prompt, record)
        text = _text(place, self.answer, _value(place, record, self.answer))
        answer, reference = _gold(text)
        if answer and self.answer == "solution" and reference is None and not self.named:
            raise UserError(
                f"{place}: column 'solution' holds neither \\boxed{{}} nor ####; name the answers' in 'answer_column'"
            )
        if not answer:
            return None
        if not equal(answer, answer):
            raise UserError(f"{place}: answer {_shown(answer)} would not verify against itself")
        if reference is None and self.answer != "solution" and isinstance(record.get("solution"), str):
            reference = record["solution"].strip() or None
        return Row(question, answer, reference, prompt, record)


def read_rows(
    records: Iterable[tuple[str, dict[str, Any]]], prompt_column: str | None, answer_column: str | None, *, needed: bool
) -> tuple[list[Row], int]:
    """The rows of records with their places, and how many were left out because their answer is null or blank.

    Raises:
        UserError: a malformed record. Whether there are too few is the caller's to say.
    """
    rows: list[Row] = []
    unanswered = 0
    columns: Columns | None = None
    for place, record in records:
        if columns is None:
            columns = Columns.of(place, record, prompt_column, answer_column, needed=needed)
        row = columns.row(place, record)
        if row is None:
            unanswered += 1
        else:
            rows.append(row)
    return rows, unanswered


def file_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, each with its place for messages (``data.jsonl:3``).

    Args:
        path: JSON lines, or a ``.json`` file that holds one list of objects.

    Raises:
        UserError: the file cannot be read or a line is no object.
    """
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


def _column(place: str, record: Mapping[str, Any], named: str | None, usual: Sequence[str], setting: str) -> str:
    if named is not None:
        if named not in record and named.partition(".")[0] not in record:
            raise UserError(f"{_missing(place, named, record)}{nearest(named, record)}")
        return named
    for name in usual:
        if name in record:
            return name
    listed = f"{', '.join(usual[:-1])} or {usual[-1]}"
    raise UserError(f"{_missing(place, listed, record)}; name yours in '{setting}'")


def _missing(place: str, name: str, record: Mapping[str, Any]) -> UserError:
    return UserError(f"{place}: column '{name}' is missing (columns: {', '.join(record) or 'none'})")


def _value(place: str, record: Mapping[str, Any], column: str) -> Any:
    """What stands in a column, ``a.b`` in the object of column ``a``."""
    if column in record:
        return record[column]
    inner: Any = record
    for name in column.split("."):
        if not isinstance(inner, Mapping) or name not in inner:
            raise _missing(place, column, record)
        inner = inner[name]
    return inner


def _question(place: str, column: str, value: Any) -> str:
    """The question in a prompt, which is a text or, as for chat models, a list of messages with one user turn."""
    if isinstance(value, list) and value and all(isinstance(m, Mapping) and "role" in m for m in value):
        turns = [m for m in value if m["role"] == "user"]
        # The answers of published conversations are no part of the question.
        others = [str(m["role"]) for m in value if m["role"] not in ("user", "assistant")]
        if len(turns) != 1 or others or value[0] is not turns[0]:
            roles = ", ".join(str(m["role"]) for m in value)
            raise UserError(
                f"{place}: column '{column}' has the turns {roles}; a question is one user turn, in front"
                + (" (a system prompt is a setting of the model)" if "system" in others else "")
            )
        value = turns[0].get("content")
    if not isinstance(value, str):
        raise UserError(f"{place}: column '{column}' must be text, not {_shown(value)}")
    if not value.strip():
        raise UserError(f"{place}: column '{column}' is empty")
    return value.strip()


def _text(place: str, column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{place}: column '{column}' must be text or a number, not {_shown(value)}")
    return format(Decimal(repr(value)), "f")  # 1e-07 as 0.0000001, which the comparison reads as a number


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _gold(text: str) -> tuple[str, str | None]:
    r"""The gold answer, and the solution where the text holds both, as GSM8K's does (``solution #### answer``) and
    MATH's (``solution with a \boxed{answer}``)."""
    before, mark, after = text.rpartition("####")
    if mark:
        # GSM8K annotates its sums for a calculator: <<48/2=24>>.
        return after.strip(), re.sub(r"<<[^<>]*>>", "", before).strip() or None
    boxed = boxes(text)
    if boxed:
        return (stated_answer(text, gold=True)[0] or boxed[-1]).strip(), text.strip()
    return text.strip(), None
