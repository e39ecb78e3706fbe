"""The run's append-only records: one JSON line for each step's metrics and for each kept sample."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mulligan.errors import UserError
from mulligan.files import reason, strict_json
from mulligan.loggers import Logger

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


class RunLog:
    """Writes ``metrics.jsonl`` and ``samples.jsonl``, and tells the same numbers to loggers.

    The same calls give the same bytes: floats are written with all their digits, keys in the given order.
    Lines are handed to the system at once, so that they can be watched, and to the disk by :meth:`flush`.

    The files are the record; loggers get copies, and a logger that fails costs no step: what it did not take is kept
    and offered again, and :meth:`confirm`, called behind each checkpoint, stops the run if that did not help.
    """

    def __init__(
        self,
        directory: Path,
        *,
        offsets: Mapping[str, int] | None = None,
        loggers: Mapping[str, Logger] | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin a log, or go on with one.

        Args:
            directory: made when absent.
            offsets: None for a new run. On resuming, what :meth:`flush` returned when the checkpoint was saved:
                whatever was written after it is cut off, because it will be written again.
            loggers: by the names that messages call them; started here, closed by :meth:`close`.
            run: the resolved settings, for the loggers.

        Raises:
            UserError: a new run in a directory that has records; a file shorter than its offset; a logger that
                cannot start; or an OSError. Nothing is cut off then.
        """
        paths = {name: directory / name for name in (METRICS, SAMPLES)}
        _check(paths, offsets)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{directory}: cannot make this directory: {reason(error)}") from error
        kept = _kept(paths[METRICS], offsets[METRICS]) if offsets is not None and loggers else None
        self._lines: dict[str, _Lines] = {}
        self._loggers: list[_Following] = []
        try:
            for name, logger in (loggers or {}).items():
                self._loggers.append(_Following(name, logger, run or {}, directory, kept))
            for name, path in paths.items():
                self._lines[name] = _Lines(path, offsets[name] if offsets else 0)
        except BaseException:
            self.close(failed=True)
            raise

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Append one line of numbers.

        Args:
            record: names to JSON values; ``step`` (int) is the update the numbers belong to. A quantity that
                does not exist at this step is left out, not NaN.

        Raises:
            UserError: a number that is not finite or a value that is not JSON, by its key; or a full disk.
        """
        self._lines[METRICS].append([record])
        for logger in self._loggers:
            logger.tell(record)

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
        for logger in self._loggers:
            logger.flush()
        return {name: lines.sync() for name, lines in self._lines.items()}

    def confirm(self) -> None:
        """A checkpoint is saved, so that stopping costs nothing now.

        Raises:
            UserError: a logger has failed and not recovered; the message names it and what it said.
        """
        for logger in self._loggers:
            logger.confirm()

    def close(self, *, failed: bool = False) -> None:
        """Close files and loggers. Calling it again does nothing.

        Args:
            failed: an error or a signal ends the run; it is the one to be told then, not a logger's.

        Raises:
            UserError: a logger cannot bring away what it was told.
        """
        for lines in self._lines.values():
            lines.close()
        loggers, self._loggers = self._loggers, []
        problems = [problem for logger in loggers if (problem := logger.close(failed))]
        if problems and not failed:
            raise UserError(problems[0])

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)


class _Following:
    """A started logger, and the records that it has not taken yet."""

    def __init__(
        self, name: str, logger: Logger, run: Mapping[str, Any], directory: Path, kept: list[dict[str, Any]] | None
    ) -> None:
        self.name, self._logger = name, logger
        self._waiting: deque[Mapping[str, Any]] = deque()
        self._failure: str | None = None
        try:
            logger.start(run, directory, kept)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"log.to: {name} cannot start: {_described(error)}") from error

    def tell(self, record: Mapping[str, Any]) -> None:
        self._waiting.append(record)
        self._try(self._deliver)

    def flush(self) -> None:
        self._try(self._deliver, self._logger.flush)

    def confirm(self) -> None:
        if self._failure:
            raise UserError(
                f"log.to: {self.name} fails ({self._failure}; {len(self._waiting)} records waiting): this step is "
                f"saved and {METRICS} has all numbers; --resume goes on, with another log.to if need be"
            )

    def close(self, failed: bool) -> str | None:
        """What went wrong, if anything did."""
        self._try(self._deliver, lambda: self._logger.close(failed))
        told = f"log.to: {self.name} fails at the end ({self._failure}); the run is complete in its own files"
        return told if self._failure else None

    def _deliver(self) -> None:
        while self._waiting:
            self._logger.metrics(self._waiting[0])
            self._waiting.popleft()

    def _try(self, *calls: Callable[[], None]) -> None:
        failure = None
        for call in calls:
            try:
                call()
            except Exception as error:  # whatever a user's logger or a network does; confirm tells it
                failure = failure or _described(error)
        self._failure = failure


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {reason(error)}"


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


def _kept(path: Path, offset: int) -> list[dict[str, Any]]:
    """The records of a file up to an offset in bytes."""
    if not offset:
        return []
    try:
        return _records(path.read_bytes()[:offset], path)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {reason(error)}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl`` (or any JSONL file), oldest first.

    A last line without its line end is passed over: a kill cut it short, or it is being written.

    Raises:
        UserError: the file cannot be read, or a line is no JSON object; the message names file and line.
    """
    try:
        return _records(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: cannot read: {reason(error)}") from error


def _records(data: bytes, path: Path) -> list[dict[str, Any]]:
    records = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON: {reason(error)}") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: not a JSON object")
        records.append(record)
    return records
