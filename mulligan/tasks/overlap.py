"""Problems that stand in two places: what was trained on must not be what is measured."""

from __future__ import annotations

from collections.abc import Iterator

from mulligan.tasks.base import Task
from mulligan.tasks.rows import normalised
from mulligan.types import Problem

ENDLESS = 2000  # how many problems of a split without an end are looked at


def shared(trained: Task, measured: Task, split: str, problems: int | None = None) -> int:
    """How many of the evaluation's problems have a question, as normalised text, that the other task trains on.

    Of a training split without an end only the first 2,000 problems are compared; a generated task's own splits are
    disjoint by construction.

    Args:
        trained: its ``train`` split counts; of a mixture, that of every part.
        measured: the task that is evaluated, with its ``split``.
        problems: how many problems of it, from the first; None: all (2,000 where there is no end).
    """
    questions = [normalised(measured.question(p)) for p in _problems(measured, split, problems)]
    wanted = set(questions)
    found = {
        key
        for part in trained.parts()
        for problem in _problems(part, "train", None)
        if (key := normalised(part.question(problem))) in wanted
    }
    return sum(key in found for key in questions)


def _problems(task: Task, split: str, most: int | None) -> Iterator[Problem]:
    size = task.size(split)
    if most is None:
        most = ENDLESS if size is None else size
    end = most if size is None else min(most, size)
    return (task.problem(split, index) for index in range(end))
