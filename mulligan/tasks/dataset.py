"""Data sets by name: from the Hub, or in its layout on disk, through ``datasets``; no code of theirs is run.

A folder with ``train.jsonl`` and the like and no README.md is read as task ``jsonl`` reads it, without the library.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from mulligan.errors import UserError, nearest
from mulligan.files import reason
from mulligan.tasks.base import TaskSettings
from mulligan.tasks.jsonl import split_files
from mulligan.tasks.questions import Questions, QuestionSettings, divided
from mulligan.tasks.rows import Columns, Row, file_records

USUAL = {"train": ("train",), "dev": ("validation", "dev", "valid", "val"), "test": ("test",)}
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_READERS = {".parquet": "parquet", ".csv": "csv"}


class DatasetSettings(QuestionSettings):
    """``path`` is a Hub id, a folder in the Hub's layout, a ``save_to_disk`` folder, or one file (JSON lines, JSON,
    Parquet or CSV). The splits are found by their usual names (train; validation or dev; test)."""

    path: str = Field(min_length=1)
    config: str | None = Field(default=None, description="the configuration (subset), such as 'main'")
    revision: str | None = Field(default=None, description="branch, tag or commit on the Hub")
    train_split: str | None = None
    dev_split: str | None = None
    test_split: str | None = None
    test_path: str | None = Field(default=None, description="another data set, whose test split is the test split")
    test_config: str | None = None
    test_revision: str | None = None
    max_rows: int | None = Field(default=None, ge=1, description="of each split, at most: its first rows")


class Dataset(Questions):
    """Rows of a data set as problems.

    Raises:
        UserError: it cannot be reached or read, has no such split or column, or a row is malformed.
    """

    name: ClassVar[str] = "dataset"
    summary: ClassVar[str] = "a Hub or local data set of questions, by name and column map"
    Settings: ClassVar[type[TaskSettings]] = DatasetSettings

    def __init__(self, settings: TaskSettings | None = None) -> None:
        if settings is None and self.Settings.model_fields["path"].is_required():
            raise UserError(f"task '{self.name}' needs 'path': a Hub id, such as openai/gsm8k, or a folder")
        super().__init__(settings)

    @property
    def source(self) -> str:
        return self.settings.path

    def _load(self) -> dict[str, list[Row]]:
        s = self.settings
        own = _open(s.path, s.config, s.revision, usual=self._usual("config"))
        named = {"train": s.train_split, "dev": s.dev_split, "test": None if s.test_path else s.test_split}
        found = {split: name for split, given in named.items() if (name := _pick(s.path, own, split, given))}
        if s.test_path is not None:
            found.pop("test", None)
        if not found:
            found["train"] = _only(s.path, own, "train")
        splits = {split: self._split(s.path, own, name) for split, name in found.items()}
        if s.test_path is not None:
            other = _open(s.test_path, s.test_config, s.test_revision, usual=self._usual("test_config"))
            name = _pick(s.test_path, other, "test", s.test_split) or _only(s.test_path, other, "test")
            splits["test"] = self._split(s.test_path, other, name)
        return divided(splits)

    def _usual(self, setting: str) -> bool:
        """Whether a setting is the preset's own; a run's record writes it out, so who set it cannot be asked."""
        return getattr(self.settings, setting) == type(self.settings).model_fields[setting].default

    def _split(self, path: str, splits: Mapping[str, Any], name: str) -> list[Row]:
        """The rows of one split, which is a file of ours or a ``datasets.Dataset``."""
        s, data = self.settings, splits[name]
        if isinstance(data, Path):
            return self._read(str(data), islice(file_records(data), s.max_rows))
        what = f"{path}[{name}]"
        if self.rewards is None and len(data):  # nobody reads the other columns, which may hold anything
            columns = Columns.of(
                what, dict.fromkeys(data.column_names), s.prompt_column, s.answer_column, needed=not s.rewards
            )
            read = {name.partition(".")[0] for name in (columns.prompt, columns.answer or "")} | {
                columns.prompt,
                columns.answer,
                "solution",
            }
            data = data.select_columns([name for name in data.column_names if name in read])
        if s.max_rows is not None:
            data = data.select(range(min(len(data), s.max_rows)))
        return self._read(what, ((f"{what} row {at}", dict(record)) for at, record in enumerate(data)))


class Gsm8kSettings(DatasetSettings):
    """As for ``dataset``, with GSM8K's place on the Hub."""

    path: str = Field(default="openai/gsm8k", min_length=1)
    config: str | None = "main"


class Gsm8k(Dataset):
    """GSM8K (arXiv 2110.14168): 7,473 training and 1,319 test problems, a tenth of the former for dev."""

    name: ClassVar[str] = "gsm8k"
    summary: ClassVar[str] = "grade-school word problems (arXiv 2110.14168)"
    Settings: ClassVar[type[TaskSettings]] = Gsm8kSettings


class MathSettings(DatasetSettings):
    """As for ``dataset``, with the places of MATH and MATH-500 on the Hub."""

    path: str = Field(default="DigitalLearningGmbH/MATH-lighteval", min_length=1)
    test_path: str | None = "HuggingFaceH4/MATH-500"


class Math(Dataset):
    """MATH (arXiv 2103.03874): its 7,500 training problems, a tenth of them for dev, and MATH-500 as the test split."""

    name: ClassVar[str] = "math"
    summary: ClassVar[str] = "competition mathematics (arXiv 2103.03874), tested on MATH-500"
    Settings: ClassVar[type[TaskSettings]] = MathSettings


def _pick(path: str, splits: Mapping[str, Any], split: str, name: str | None) -> str | None:
    """Which of a data set's splits is ``split``; None where it has none.

    Raises:
        UserError: a split that was named is not there.
    """
    if name is None:
        return next((usual for usual in USUAL[split] if usual in splits), None)
    if name not in splits:
        raise UserError(f"task.{split}_split: {path} has no split '{name}'{nearest(name, splits)}")
    return name


def _only(path: str, splits: Mapping[str, Any], split: str) -> str:
    """The only split of a data set, whatever its name.

    Raises:
        UserError: there are several.
    """
    if len(splits) == 1:
        return next(iter(splits))
    raise UserError(f"{path} has the splits {', '.join(splits)}; say which is which in 'task.{split}_split'")


def _open(path: str, config: str | None, revision: str | None, *, usual: bool) -> Mapping[str, Any]:
    """A data set's splits by name, each a file of ours or a ``datasets.Dataset``.

    Args:
        usual: the configuration is the preset's; a copy on disk may do without it.
    """
    local = Path(path).expanduser()
    if not local.exists():
        if not _HUB_ID.fullmatch(path):
            raise UserError(f"{path}: no such file or folder")
        return _through_datasets(path, path, config, revision=revision)
    if revision is not None:
        raise UserError(f"task.revision: {path} is on disk and has no revisions")
    if not local.is_dir():
        if local.suffix in _READERS:
            return _through_datasets(path, _READERS[local.suffix], None, data_files=str(local))
        return {"train": local}
    if any((local / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _from_disk(local)
    if not (local / "README.md").is_file():
        folder = local / config if config is not None and (local / config).is_dir() else local
        files = split_files(folder)
        if files:
            return files
        if folder != local or (config is not None and usual):
            return _through_datasets(path, str(folder), None)
    elif config is not None and usual and config not in _configurations(local):
        config = None
    return _through_datasets(path, str(local), config)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("data sets by name need another package: pip install 'mulligan[data]'") from error
    return datasets


def _through_datasets(path: str, name: str, config: str | None, **more: Any) -> Mapping[str, Any]:
    datasets = _library()
    try:
        return datasets.load_dataset(name, config, **{key: value for key, value in more.items() if value is not None})
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(f"{path}: neither a file or folder here nor a data set on the Hub (or it is gated)") from None
    except ConnectionError:  # offline mode's error is one, too
        raise UserError(f"{path}: the Hub cannot be reached, and there is no copy in the cache") from None
    except Exception as error:  # builders raise anything at all for a file that they cannot read
        inner = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise UserError(f"{path}: cannot be read as a data set: {reason(inner)}") from error


def _from_disk(folder: Path) -> Mapping[str, Any]:
    datasets = _library()
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise UserError(f"{folder}: cannot be read as a data set: {reason(error)}") from error
    return found if isinstance(found, datasets.DatasetDict) else {"train": found}


def _configurations(folder: Path) -> list[str]:
    datasets = _library()
    try:
        return datasets.get_dataset_config_names(str(folder))
    except Exception as error:
        raise UserError(f"{folder}: cannot be read as a data set: {reason(error)}") from error
