"""An evaluation's directory: every sample as it comes, so that a killed evaluation goes on where it was.

| path | what |
|---|---|
| settings.json | the exact settings; an evaluation with others is refused in this directory |
| samples.jsonl | a line a sample, problem by problem |
| chunks.jsonl | a line for each chunk of problems that is wholly in samples.jsonl, with where it ends |
| report.json | the numbers, once all is done |

A chunk is written in two steps, the samples and then its line in chunks.jsonl, each brought to the disk. What stands in
samples.jsonl behind the last line's end is of a chunk that was cut short; it is sampled again. A draw's seed depends on
the problem and the attempt alone and chunks begin at the same problems, so the report is that of an evaluation which
nobody killed, bit for bit.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

from mulligan.config import flatten
from mulligan.errors import UserError
from mulligan.evaluate import Outcome
from mulligan.files import reason, strict_json, write_aside
from mulligan.log import read_metrics
from mulligan.tasks.base import Task
from mulligan.types import Grade, Verdict

SETTINGS, SAMPLES, CHUNKS, REPORT = "settings.json", "samples.jsonl", "chunks.jsonl", "report.json"
_GRADE = tuple(f.name for f in fields(Grade) if f.name != "verdict")

Place = Mapping[str, Any]  # which row of the evaluation: task, side, loops, exit_threshold, max_new_tokens


def check_directory(directory: Path, *, resume: bool) -> bool:
    """Whether an evaluation in the directory is to be gone on with.

    Raises:
        UserError: the directory holds an evaluation, but ``resume`` is off; or it holds something else.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"--out: {directory} is a file")
    there = [p.name for p in directory.iterdir()] if directory.exists() else []
    if SETTINGS in there and not resume:
        raise UserError(f"{directory} holds an evaluation: --resume goes on with it, --out DIR starts beside it")
    if SETTINGS not in there and any(not name.startswith(".") for name in there):
        raise UserError(f"--out: {directory} is not empty and holds no evaluation")
    return SETTINGS in there


class EvaluationRun:
    """The directory of one evaluation, open for writing.

    Args:
        directory: made when absent.
        settings: JSON-able; all that the numbers depend on.
        resume: go on with what is there. Without, the directory must be empty.

    Raises:
        UserError: the directory holds something else or an evaluation with other settings (the message names the key),
            or another process is writing there. Nothing is changed then.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        self.directory = directory
        self._chunks: list[dict[str, Any]] = []
        if check_directory(directory, resume=resume):
            _same(directory / SETTINGS, settings)
        else:
            write_aside(directory / SETTINGS, lambda path: _write(path, strict_json(settings, SETTINGS, indent=1)))
        self._lines = self._open(CHUNKS)
        self._samples = self._open(SAMPLES)
        try:
            self._take_up()
        except BaseException:
            self.close()
            raise

    def _open(self, name: str) -> BinaryIO:
        try:
            return (self.directory / name).open("ab", buffering=0)
        except OSError as error:
            raise UserError(f"{self.directory / name}: cannot open: {reason(error)}") from error

    def _take_up(self) -> None:
        """Reads what is whole, and cuts off what is not."""
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.directory}: another process is writing this evaluation") from None
        path = self.directory / CHUNKS
        self._chunks = read_metrics(path)
        whole = path.read_bytes().rfind(b"\n") + 1
        end = self._chunks[-1]["end"] if self._chunks else 0
        length = (self.directory / SAMPLES).stat().st_size
        if length < end:
            raise UserError(f"{self.directory / SAMPLES} has {length} bytes, but {CHUNKS} says {end}: it was cut")
        self._lines.truncate(whole)
        self._samples.truncate(end)

    def done(self, place: Place, task: Task, split: str) -> list[list[Outcome]]:
        """The outcomes of the problems of a row that are known already, in whole chunks from the first problem on.

        Raises:
            UserError: a damaged line, or a problem that is another one now.
        """
        groups: list[list[Outcome]] = []
        start = 0
        for chunk in self._chunks:
            if all(chunk[key] == value for key, value in place.items()):
                for record in self._read(start, chunk["end"]):
                    if record["attempt"] == 0:
                        groups.append([])
                    groups[-1].append(_outcome(record, task, split, len(groups) - 1, self.directory / SAMPLES))
            start = chunk["end"]
        return groups

    def _read(self, start: int, end: int) -> list[dict[str, Any]]:
        path = self.directory / SAMPLES
        try:
            with path.open("rb") as file:
                file.seek(start)
                return [json.loads(line) for line in file.read(end - start).splitlines()]
        except OSError as error:
            raise UserError(f"{path}: cannot read: {reason(error)}") from error
        except ValueError as error:
            raise UserError(f"{path}: damaged between bytes {start} and {end}: {reason(error)}") from error

    def counted(self, place: Place, name: str) -> float:
        """The sum over a row's chunks of what :meth:`append` was given by this name."""
        return sum(c[name] for c in self._chunks if all(c[key] == value for key, value in place.items()))

    def append(self, place: Place, groups: Sequence[Sequence[Outcome]], **counts: float) -> None:
        """Writes a chunk.

        Args:
            counts: sums over the chunk that the samples do not tell.

        Raises:
            UserError: the disk is full, or another OSError.
        """
        records = [{**place, **_record(outcome)} for group in groups for outcome in group]
        text = "".join(strict_json(record, SAMPLES) + "\n" for record in records)
        self._write(self._samples, SAMPLES, text)
        end = self._samples.seek(0, os.SEEK_END)
        chunk = {**place, "problems": len(groups), **counts, "end": end}
        self._write(self._lines, CHUNKS, strict_json(chunk, CHUNKS) + "\n")
        self._chunks.append(chunk)

    def _write(self, file: BinaryIO, name: str, text: str) -> None:
        data = memoryview(text.encode())
        try:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.directory / name}: cannot write: {reason(error)}") from error

    def report(self, report: Mapping[str, Any]) -> None:
        """Writes the report."""
        text = strict_json(report, REPORT, indent=1)
        write_aside(self.directory / REPORT, lambda path: _write(path, text))

    def close(self) -> None:
        self._samples.close()
        self._lines.close()

    def __enter__(self) -> EvaluationRun:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def _same(path: Path, settings: Mapping[str, Any]) -> None:
    try:
        old = flatten(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: cannot read: {reason(error)}") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {reason(error)}") from error
    new = flatten(json.loads(json.dumps(settings)))
    changed = [key for key in dict.fromkeys([*old, *new]) if old.get(key, "absent") != new.get(key, "absent")]
    if changed:
        key = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise UserError(
            f"{path}: cannot resume with other settings: "
            f"{key} was {old.get(key, 'absent')!r}, now {new.get(key, 'absent')!r}{more}"
        )


def _record(outcome: Outcome) -> dict[str, Any]:
    grade = outcome.grade
    return {
        "problem": outcome.problem.uid,
        "attempt": outcome.attempt,
        "prompt": outcome.problem.prompt,
        "gold": outcome.problem.answer,
        "response": outcome.text,
        "verdict": str(grade.verdict),
        **{key: getattr(grade, key) for key in _GRADE},
        "length": outcome.length,
        "truncated": outcome.truncated,
    }


def _outcome(record: Mapping[str, Any], task: Task, split: str, index: int, path: Path) -> Outcome:
    problem = task.problem(split, index)
    told = (record["problem"], record["prompt"], record["gold"])
    if told != (problem.uid, problem.prompt, problem.answer):
        raise UserError(f"{path}: {record['problem']} is another problem now: did the task or its data change?")
    return Outcome(
        problem=problem,
        attempt=record["attempt"],
        text=record["response"],
        grade=Grade(verdict=Verdict(record["verdict"]), **{key: record[key] for key in _GRADE}),
        length=record["length"],
        truncated=record["truncated"],
    )
