"""Jsonl: questions with final answers from the user's own files, such as GSM8K or MATH as they are published."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from mulligan.errors import UserError
from mulligan.tasks.base import TaskSettings
from mulligan.tasks.questions import SPLITS, Questions, QuestionSettings, divided
from mulligan.tasks.rows import Row, file_records


class JsonlSettings(QuestionSettings):
    """``path`` is one file, or a folder with train, dev and test files (``.jsonl``, or ``.json`` with a list)."""

    path: str = Field(min_length=1)


class Jsonl(Questions):
    """Rows of a file or folder as problems.

    Raises:
        UserError: a file cannot be read or a row is malformed; the message names the file and the line.
    """

    name: ClassVar[str] = "jsonl"
    summary: ClassVar[str] = "questions and final answers from your own JSON lines"
    Settings: ClassVar[type[TaskSettings]] = JsonlSettings

    def __init__(self, settings: TaskSettings | None = None) -> None:
        if settings is None:
            raise UserError("task 'jsonl' needs 'path': a .jsonl file, or a folder with train.jsonl and test.jsonl")
        super().__init__(settings)

    @property
    def source(self) -> str:
        return self.settings.path

    def _load(self) -> dict[str, list[Row]]:
        path = Path(self.settings.path).expanduser()
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if not path.is_dir():
            return divided({"train": self._read(str(path), file_records(path))})
        files = split_files(path)
        if not files:
            raise UserError(f"{path}: none of train.jsonl, dev.jsonl and test.jsonl (or .json) is in this folder")
        return divided({split: self._read(str(file), file_records(file)) for split, file in files.items()})


def split_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that are named after splits.

    Raises:
        UserError: two files for one split.
    """
    found = {}
    for split in SPLITS:
        files = [path for suffix in ("jsonl", "json") if (path := folder / f"{split}.{suffix}").is_file()]
        if len(files) > 1:
            raise UserError(f"{folder}: both {files[0].name} and {files[1].name} are there; keep one")
        if files:
            found[split] = files[0]
    return found
