"""A step's samples as they were logged, and the forest that they were: the way back from ``samples.jsonl``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mulligan.errors import UserError
from mulligan.files import reason
from mulligan.log import SAMPLES
from mulligan.tasks.base import Task
from mulligan.types import Forest, Grade, Request, Sample, Tree, Verdict

# Fields that go back under their own names.
GRADE = ("reward", "answer", "reason", "process_correct", "first_wrong_step", "steps", "mentions_hint")
REQUEST = ("group", "origin", "parent", "n", "max_new_tokens", "temperature")
_STEP = re.compile(rb'\s*\{\s*"step"\s*:\s*(\d+)\s*,')  # every record begins with it; a long log is not parsed whole


def read_samples(directory: Path, step: int) -> list[dict[str, Any]]:
    """The sample records of one step (from 1), in the order of the log.

    Raises:
        UserError: no samples, no such step, or a file that cannot be read; names the steps that there are.
    """
    path = directory / SAMPLES
    lines, seen = [], set()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):  # cut short by a kill, or still being written
                    break
                match = _STEP.match(line)
                if match is None:
                    raise UserError(f"{path}:{number}: no sample of a step")
                seen.add(int(match[1]))
                if int(match[1]) == step:
                    lines.append((number, line))
    except OSError as error:
        raise UserError(f"{path}: cannot read: {reason(error)}") from error
    if not seen:
        raise UserError(f"{path} holds no samples yet")
    if not lines:
        raise UserError(f"{directory} has no samples of step {step}: its log has steps {min(seen)} to {max(seen)}")
    records = []
    for number, line in lines:
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON: {reason(error)}") from error
    return records


def rebuild(records: Sequence[Mapping[str, Any]], task: Task) -> Forest:
    """The forest that :func:`mulligan.rundir.sample_records` wrote down, behaviour log-probs to 1e-6 nats.

    Problems of which nothing was sampled left no record and are missing.

    Raises:
        UserError: a record that lacks a field or a sibling, or a problem that the task no longer gives.
    """
    forest = Forest(records[0]["step"] - 1, [])
    trees: dict[int, list[Mapping[str, Any]]] = {}
    for record in map(_Record, records):
        trees.setdefault(record["uid"] >> 20, []).append(record)  # the uid's upper bits are the problem's slot
    for mine in trees.values():
        (forest.filtered if mine[0]["filtered"] else forest.trees).append(_tree(mine, task))
    return forest


class _Record(dict[str, Any]):
    """A record, with an error of ours for a field that it lacks."""

    def __missing__(self, key: str) -> Any:
        raise UserError(f"step {self['step']}: a logged sample has no '{key}': an earlier version wrote it")


def _tree(records: Sequence[Mapping[str, Any]], task: Task) -> Tree:
    first = records[0]
    _, split, index = first["problem"].rsplit("/", 2)
    problem = task.problem(split, int(index))
    if (problem.uid, problem.prompt, problem.answer) != (first["problem"], first["prompt"], first["gold"]):
        raise UserError(f"{first['problem']} is another problem now than in the log: did the task or its data change?")
    tree, at = Tree(problem), 0
    while at < len(records):
        first = records[at]
        order = records[at : at + first["n"]]
        if [record["attempt"] for record in order] != list(range(first["n"])):
            raise UserError(f"step {first['step']}: samples of {problem.uid} are missing from the log")
        request = Request(
            problem=problem,
            context=tuple(first["context_tokens"]),
            seeds=tuple(record["seed"] for record in order),
            prefix=tuple(first["tokens"][: first["branch"]]),
            stop=tuple(first["stop"]),
            graded=first["verdict"] != Verdict.UNGRADED,
            **{key: first[key] for key in REQUEST},
        )
        tree.samples += [_sample(record, request) for record in order]
        at += len(order)
    return tree


def _sample(record: Mapping[str, Any], request: Request) -> Sample:
    return Sample(
        uid=record["uid"],
        request=request,
        attempt=record["attempt"],
        tokens=tuple(record["tokens"]),
        behavior_logprobs=tuple(record["behavior_logprobs"]),
        finish=record["finish"],
        text=record["response"],
        grade=Grade(verdict=Verdict(record["verdict"]), **{key: record[key] for key in GRADE}),
    )
