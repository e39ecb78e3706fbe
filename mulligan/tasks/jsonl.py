r"""Jsonl: questions with final answers from the user's own files, such as GSM8K or MATH as they are published.

The prompts are English, for models that read it; the texts of hint and diagnosis follow LTE (arXiv 2510.26109) and SRPO
(arXiv 2605.25507).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mulligan.errors import UserError, nearest
from mulligan.seeds import rng_of
from mulligan.tasks.base import Task, TaskSettings, split_after
from mulligan.tasks.rows import Row, read_rows
from mulligan.types import Grade, Problem
from mulligan.verify.answer import equal, final_answer

SPLITS = ("train", "dev", "test")
FINISH = "and put your final answer within \\boxed{}."
THOROUGH = f"Please reason step by step, {FINISH}"
_HINT = re.compile(r"\bhint(s|ed)?\b|\bincorrect answers\b", re.IGNORECASE)
CONCISE = f"Please think concisely, {FINISH}"


class JsonlSettings(TaskSettings):
    """``path`` is one file, or a folder with train, dev and test files (``.jsonl``, or ``.json`` with a list).

    Columns are found by themselves when their names are usual ones (prompt, question or problem; answer).
    ``seed`` changes the order of the training rows, never which split a row is in. A step of a response ends behind
    ``step_delimiter``, which is a text or (``step_splitter="regex"``) a regular expression, ``[.!?]\\s`` for instance.
    """

    path: str = Field(min_length=1)
    prompt_column: str | None = None
    answer_column: str | None = None
    step_delimiter: str = Field(default="\n\n", min_length=1)
    step_splitter: Literal["text", "regex"] = "text"

    @model_validator(mode="after")
    def _pattern(self) -> JsonlSettings:
        if self.step_splitter == "regex":
            try:
                if re.compile(self.step_delimiter).match(""):
                    raise ValueError(
                        f"step_delimiter {self.step_delimiter!r} matches nothing at all: steps would be empty"
                    )
            except re.error as error:
                raise ValueError(f"step_delimiter {self.step_delimiter!r} is no regular expression: {error}") from None
        return self


class Jsonl(Task):
    """Rows of a file or folder as problems; the reward is a strict comparison of final answers.

    Splits never overlap. A single file is divided 80/10/10 by a hash of the question; a folder without a dev file gives
    a tenth of its training rows to dev, by the same hash. A training row whose question stands in dev or test, and a
    dev row whose question stands in test, is left out.

    Attributes:
        overlap: how many rows were left out because a later split holds their question.
        unanswered: how many rows were left out because their answer is null or blank.

    Raises:
        UserError: a file cannot be read or a row is malformed; the message names the file and the line.
    """

    name: ClassVar[str] = "jsonl"
    summary: ClassVar[str] = "questions and final answers from your own JSON lines"
    Settings: ClassVar[type[TaskSettings]] = JsonlSettings
    english: ClassVar[bool] = True

    def __init__(self, settings: TaskSettings | None = None) -> None:
        if settings is None:
            raise UserError("task 'jsonl' needs 'path': a .jsonl file, or a folder with train.jsonl and test.jsonl")
        super().__init__(settings)
        self.overlap = 0
        self.unanswered = 0
        self._path = Path(self.settings.path).expanduser()
        self._splits = self._load()
        self._drop_overlap()

    def problem(self, split: str, index: int) -> Problem:
        """Row ``index`` of dev or test, in the file's order. Training never ends: every epoch of ``size`` problems
        is another permutation of the rows, a pure function of (seed, epoch)."""
        rows = self._rows(split)
        if not rows:
            raise UserError(f"task 'jsonl': split '{split}' has no rows in {self._path}")
        if index < 0 or (split != "train" and index >= len(rows)):
            raise UserError(f"task 'jsonl': split '{split}' has {len(rows)} problems, there is no problem {index}")
        at = index
        if split == "train":
            epoch, place = divmod(index, len(rows))
            at = _permutation(self.settings.seed, split, epoch, len(rows))[place]
        row = rows[at]
        return Problem(
            task=self.name,
            split=split,
            index=index,
            prompt=f"{row.question}\n{THOROUGH}",
            answer=row.answer,
            data={"question": row.question, "reference": row.reference, "columns": row.columns},
        )

    def size(self, split: str) -> int:
        return len(self._rows(split))

    def solution(self, problem: Problem) -> str:
        """The file's own solution where it has one and its final answer is found right; the boxed answer is added where
        it lacks one. Otherwise the boxed answer alone."""
        box = f"\\boxed{{{problem.answer}}}"
        reference = problem.data["reference"]
        for text in (reference, f"{reference}\n\n{box}") if reference else ():
            if self.verify(problem, text).reward:
                return text
        return box

    def hint(self, problem: Problem, wrong_answers: Sequence[str], *, concise: bool = False) -> str:
        """The hint stands between the question and the closing instruction; without wrong answers there is none."""
        parts = [problem.data["question"]]
        if wrong_answers:
            listed = ", ".join(" ".join(answer.split()) for answer in wrong_answers)
            parts.append(
                f"Hint: possible incorrect answers include {listed}. "
                "Do not use or mention the hint explicitly in any of your intermediate steps."
            )
        parts.append(CONCISE if concise else THOROUGH)
        return "\n".join(parts)

    def mentions_hint(self, response: str) -> bool:
        return _HINT.search(response) is not None

    def diagnosis(self, problem: Problem, steps: Sequence[str]) -> str:
        listed = "\n".join(f"Step {at}: {step.strip()}" for at, step in enumerate(steps, start=1))
        return (
            f"A problem and your own solution to it, cut into {len(steps)} numbered steps.\n\n"
            f"Problem: {problem.data['question']}\n\n"
            f"{listed}\n\n"
            "The final answer of this solution is wrong. Which step is the first to go wrong? Look for the step where "
            "the error originates, not for a later one where it only shows. Do not solve the problem again. "
            f"Reply with exactly one number from 1 to {len(steps)}, as \\boxed{{number}}."
        )

    def split_steps(self, response: str) -> list[str]:
        """Pieces that end in the delimiter; a blank piece belongs to the step before it."""
        steps: list[str] = []
        for piece in self._pieces(response):
            if steps and (not piece.strip() or not steps[-1].strip()):
                steps[-1] += piece
            else:
                steps.append(piece)
        return steps

    def _pieces(self, response: str) -> list[str]:
        if self.settings.step_splitter == "text":
            return split_after(response, self.settings.step_delimiter)
        ends = [0, *(match.end() for match in re.finditer(self.settings.step_delimiter, response)), len(response)]
        return [response[a:b] for a, b in pairwise(ends) if b > a]

    def extract(self, response: str) -> str | None:
        """The last box; None when there is none, or when the boxes hold different answers."""
        return final_answer(response)[0]

    def equivalent(self, problem: Problem, left: str, right: str) -> bool:
        return equal(left, right)

    def correct(self, problem: Problem, answer: str) -> bool:
        return equal(problem.answer, answer)

    def verify(self, problem: Problem, response: str) -> Grade:
        grade = super().verify(problem, response)
        if grade.answer is not None:
            return grade
        return Grade(verdict=grade.verdict, reward=grade.reward, reason=final_answer(response)[1], steps=grade.steps)

    def _rows(self, split: str) -> list[Row]:
        if split not in SPLITS:
            raise UserError(f"task 'jsonl' has no split '{split}'{nearest(split, SPLITS)}")
        return self._splits[split]

    def _load(self) -> dict[str, list[Row]]:
        path = self._path
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if not path.is_dir():
            return _divided(self._read(path), {0: "dev", 1: "test"})
        files = {split: file for split in SPLITS if (file := _file_of(path, split)) is not None}
        if not files:
            raise UserError(f"{path}: none of train.jsonl, dev.jsonl and test.jsonl (or .json) is in this folder")
        splits = {split: self._read(files[split]) if split in files else [] for split in SPLITS}
        if "dev" not in files:
            splits |= _divided(splits["train"], {0: "dev"}) | {"test": splits["test"]}
        return splits

    def _drop_overlap(self) -> None:
        splits = self._splits
        splits["dev"] = self._without(splits["dev"], splits["test"])
        splits["train"] = self._without(splits["train"], splits["dev"] + splits["test"])

    def _without(self, rows: list[Row], others: list[Row]) -> list[Row]:
        taken = {row.key for row in others}
        kept = [row for row in rows if row.key not in taken]
        self.overlap += len(rows) - len(kept)
        return kept

    def _read(self, path: Path) -> list[Row]:
        rows, unanswered = read_rows(path, self.settings.prompt_column, self.settings.answer_column)
        self.unanswered += unanswered
        return rows


def _file_of(folder: Path, split: str) -> Path | None:
    found = [path for suffix in ("jsonl", "json") if (path := folder / f"{split}.{suffix}").is_file()]
    if len(found) > 1:
        raise UserError(f"{folder}: both {found[0].name} and {found[1].name} are there; keep one")
    return found[0] if found else None


def _divided(rows: list[Row], owners: dict[int, str]) -> dict[str, list[Row]]:
    """Rows by split: each tenth, by the question's hash, to its owner, the rest to train."""
    splits: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row in rows:
        tenth = int.from_bytes(hashlib.blake2b(row.key.encode("utf-8", "replace"), digest_size=8).digest(), "big") % 10
        splits[owners.get(tenth, "train")].append(row)
    return splits


@lru_cache(maxsize=8)
def _permutation(seed: int, split: str, epoch: int, size: int) -> tuple[int, ...]:
    order = list(range(size))
    rng_of(seed, "order", "jsonl", split, epoch).shuffle(order)
    return tuple(order)
