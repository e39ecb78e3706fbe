"""The run's append-only records: one JSON line for each step's metrics and for each kept sample."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mulligan.errors import UserError
from mulligan.files import reason, strict_json

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


class RunLog:
    """Writes ``metrics.jsonl`` and ``samples.jsonl``, and optionally the same numbers for TensorBoard.

    The same calls give the same bytes: floats are written with all their digits, keys in the given order.
    Lines are handed to the system at once, so that they can be watched, and to the disk by :meth:`flush`.
    """

    def __init__(self, directory: Path, *, offsets: Mapping[str, int] | None = None, tensorboard: bool = False) -> None:
        """Begin a log, or go on with one.

        Args:
            directory: made when absent.
            offsets: None for a new run. On resuming, what :meth:`flush` returned when the checkpoint was saved:
                whatever was written after it is cut off, because it will be written again.
            tensorboard: also write scalars to ``directory/tensorboard``.

        Raises:
            UserError: a new run in a directory that has records; a file shorter than its offset; the
                tensorboard package is absent; or an OSError. Nothing is cut off then.
        """
        paths = {name: directory / name for name in (METRICS, SAMPLES)}
        _check(paths, offsets)
        writer_class = _summary_writer() if tensorboard else None
        self._lines: dict[str, _Lines] = {}
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: cannot make this directory: {reason(error)}") from error
        for name, path in paths.items():
            self._lines[name] = _Lines(path, offsets[name] if offsets else 0)
        self._board = None
        if writer_class is not None:
            last = max((r["step"] for r in read_metrics(paths[METRICS]) if "step" in r), default=-1)
            # TensorBoard's own files cannot be cut; it is told to forget the steps that come again
            purge = None if offsets is None else last + 1
            self._board = writer_class(str(directory / "tensorboard"), purge_step=purge)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line of numbers.

        Args:
            record: names to JSON values; ``step`` (int) is the update the numbers belong to. A quantity that
                does not exist at this step is left out, not NaN.

        Raises:
            UserError: a number that is not finite or a value that is not JSON, by its key; or a full disk.
        """
        self._lines[METRICS].append([record])
        if self._board is not None:
            for key, value in record.items():
                if key != "step" and isinstance(value, int | float):
                    self._board.add_scalar(key, value, record.get("step"))

    def samples(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append one line for each record, all of them or none.

        Raises:
            UserError: as for :meth:`metrics`.
        """
        self._lines[SAMPLES].append(records)

    def flush(self) -> dict[str, int]:
        """Bring all lines to the disk.

        Returns:
            The length of each file in bytes, to be stored in the checkpoint and given back as ``offsets``.

        Raises:
            UserError: a full disk or another OSError.
        """
        if self._board is not None:
            self._board.flush()
        return {name: lines.sync() for name, lines in self._lines.items()}

    def close(self) -> None:
        """Close the files. Calling it again does nothing."""
        for lines in self._lines.values():
            lines.close()
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Lines:
    """One JSONL file, open for appending, without a buffer: what failed is not tried again on closing."""

    def __init__(self, path: Path, offset: int) -> None:
        self.path = path
        try:
            self._file = path.open("ab", buffering=0)
            self._file.truncate(offset)
        except OSError as error:
            raise UserError(f"{path}: cannot open: {reason(error)}") from error
        self._length = offset

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(strict_json(dict(record), self.path.name) + "\n" for record in records)
        data = memoryview(text.encode())
        written = 0
        try:
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            self._file.truncate(self._length)  # no half line stays
            raise UserError(f"{self.path}: cannot write: {reason(error)}") from error
        self._length += written

    def sync(self) -> int:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot write: {reason(error)}") from error
        return self._length

    def close(self) -> None:
        self._file.close()


def _check(paths: Mapping[str, Path], offsets: Mapping[str, int] | None) -> None:
    """Refuse before anything is changed."""
    if offsets is not None and set(offsets) != set(paths):
        raise UserError(f"the log's offsets name {sorted(offsets)} in place of {sorted(paths)}")
    for name, path in paths.items():
        length = path.stat().st_size if path.exists() else 0
        if offsets is None and length:
            raise UserError(f"{path} has records of another run; resume that one or choose another directory")
        if offsets is not None and length < offsets[name]:
            raise UserError(f"{path} has {length} bytes, but had {offsets[name]} when the checkpoint was saved")


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("TensorBoard logging needs another package: pip install 'mulligan[tensorboard]'") from error
    return SummaryWriter


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl`` (or any JSONL file), oldest first.

    A last line without its line end is passed over: a kill cut it short, or it is being written.

    Raises:
        UserError: the file cannot be read, or a line is no JSON object; the message names file and line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read: {reason(error)}") from error
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON: {reason(error)}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: not a JSON object")
        records.append(record)
    return records
