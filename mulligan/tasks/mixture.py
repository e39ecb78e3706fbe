"""Mixture: the problems of several tasks, in proportion to weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import count
from math import lcm
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from mulligan.errors import UserError
from mulligan.seeds import rng_of
from mulligan.tasks.base import Task, TaskSettings
from mulligan.tasks.questions import SPLITS, Questions
from mulligan.types import Grade, Problem, Tokens

LARGEST_BLOCK = 1000  # places; weights that need more are rounded to thousandths


class Part(BaseModel):
    """One task of a mixture; further keys are that task's own settings."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    name: str
    weight: float = Field(default=1.0, gt=0)


class MixtureSettings(TaskSettings):
    """``parts`` is a list of tables: ``[{name="gsm8k", weight=2}, {name="chain", level=2}]``. ``seed`` changes the
    order in which the parts take turns."""

    parts: list[Part] = Field(min_length=1)


class Mixture(Task):
    """Problems come in blocks in which every part has its exact share of places, in an order drawn for each block: two
    to one gives blocks of three. Which part problem i is of, and which of the part's own problems, is a pure function
    of (seed, split, i). Each part goes through its own problems in its own order, so that none comes again within its
    epoch. In dev and test a part that has run out leaves its places to the others.

    Raises:
        UserError: a part cannot be built, is a mixture itself, or has no training problems.
    """

    name: ClassVar[str] = "mixture"
    summary: ClassVar[str] = "several tasks in proportion to weights: task.parts=[{name='gsm8k', weight=2}, ...]"
    Settings: ClassVar[type[TaskSettings]] = MixtureSettings

    def __init__(self, settings: TaskSettings | None = None) -> None:
        if settings is None:
            raise UserError("task 'mixture' needs 'parts': [{name='gsm8k', weight=2}, {name='chain'}]")
        super().__init__(settings)
        from mulligan.tasks import build_task

        self._parts: dict[str, Task] = {}
        complete = []
        for at, part in enumerate(self.settings.parts):
            key = f"task.parts[{at}]"
            if part.name == self.name:
                raise UserError(f"{key}.name: a mixture holds tasks, not mixtures")
            task = build_task(part.name, part.model_extra or {}, key=key)
            self._parts[self._label(part.name)] = task
            complete.append(Part(name=part.name, weight=part.weight, **task.settings.model_dump(mode="json")))
        self.settings = self.settings.model_copy(update={"parts": complete})  # with every default, as a run records it
        self._keep_apart()
        self._labels = list(self._parts)
        self._places = _places([part.weight for part in complete])
        self._held: dict[str, list[tuple[str, int]]] = {}
        self.has_oracle = all(task.has_oracle for task in self.parts())
        self.english = all(task.english for task in self.parts())

    def _keep_apart(self) -> None:
        """Leaves out of a part's training what another part measures; generated tasks are told apart by their names."""
        parts = [task for task in self.parts() if isinstance(task, Questions)]
        for task in parts:
            others = [other for other in parts if other is not task]
            task.leave_out("dev", {key for other in others for key in other.keys("test")})
        for task in parts:
            others = [other for other in parts if other is not task]
            task.leave_out("train", {key for o in others for key in o.keys("dev") | o.keys("test")})

    def _label(self, name: str) -> str:
        """A name of its own for each part, so that two parts of the same task are told apart."""
        return next(label for n in count(1) if (label := name if n == 1 else f"{name}-{n}") not in self._parts)

    def parts(self) -> Sequence[Task]:
        return tuple(self._parts.values())

    def of(self, problem: Problem) -> Task:
        return self._parts[problem.task.removeprefix(f"{self.name}/")]

    def notes(self) -> list[str]:
        return [note for task in self.parts() for note in task.notes()]

    def left_out(self) -> dict[str, int]:
        counted = [task.left_out() for task in self.parts()]
        return {why: sum(each.get(why, 0) for each in counted) for each in counted for why in each}

    def size(self, split: str) -> int | None:
        """None for training: it never ends, and an epoch of the whole is no whole number of each part's. None too for
        a split in which one part never ends."""
        if split not in SPLITS:
            raise UserError(f"task 'mixture' has no split '{split}' (known: {', '.join(SPLITS)})")
        sizes = [task.size(split) for task in self.parts()]
        if split == "train" and 0 in sizes:
            raise UserError(f"task.parts: '{self._labels[sizes.index(0)]}' has no training problems")
        known = [size for size in sizes if size is not None]
        return None if split == "train" or len(known) < len(sizes) else sum(known)

    def problem(self, split: str, index: int) -> Problem:
        size = self.size(split)
        if index < 0 or (size is not None and index >= size):
            raise UserError(f"task 'mixture': split '{split}' has {size} problems, there is no problem {index}")
        label, at = self._turn(split, index) if split == "train" else self._held_out(split, index)
        own = self._parts[label].problem(split, at)
        return replace(own, task=f"{self.name}/{label}", index=index)

    def _order(self, split: str, block: int) -> list[str]:
        """The parts by place in one block."""
        order = [label for label, n in zip(self._labels, self._places, strict=True) for _ in range(n)]
        rng_of(self.settings.seed, "mixture", split, block).shuffle(order)
        return order

    def _turn(self, split: str, index: int) -> tuple[str, int]:
        """The part of a training problem, and the index among the part's own: full blocks before, then this one."""
        block, place = divmod(index, sum(self._places))
        order = self._order(split, block)
        label = order[place]
        return label, block * self._places[self._labels.index(label)] + order[:place].count(label)

    def _held_out(self, split: str, index: int) -> tuple[str, int]:
        """As :meth:`_turn`, skipping the places of parts that have run out; what was worked out is kept."""
        found = self._held.setdefault(split, [])
        if index >= len(found):
            sizes = {label: task.size(split) for label, task in self._parts.items()}
            given = dict.fromkeys(self._labels, 0)
            found.clear()
            for block in count():
                for label in self._order(split, block):
                    size = sizes[label]
                    if size is None or given[label] < size:
                        found.append((label, given[label]))
                        given[label] += 1
                if len(found) > 2 * index:  # with room ahead, so that going through a split stays linear
                    break
                if all(size is not None and given[label] == size for label, size in sizes.items()):
                    break
        return found[index]

    # --- a problem's own task answers -------------------------------------------------------------------

    def prompt(self, problem: Problem) -> str:
        return self.of(problem).prompt(problem)

    def question(self, problem: Problem) -> str:
        return self.of(problem).question(problem)

    def solution(self, problem: Problem) -> str:
        return self.of(problem).solution(problem)

    def hint(self, problem: Problem, wrong_answers: Sequence[str], *, concise: bool = False) -> str:
        return self.of(problem).hint(problem, wrong_answers, concise=concise)

    def diagnosis(self, problem: Problem, steps: Sequence[str]) -> str:
        return self.of(problem).diagnosis(problem, steps)

    def first_wrong_step(self, problem: Problem, steps: Sequence[str]) -> int | None:
        return self.of(problem).first_wrong_step(problem, steps)

    def equivalent(self, problem: Problem, left: str, right: str) -> bool:
        return self.of(problem).equivalent(problem, left, right)

    def correct(self, problem: Problem, answer: str) -> bool:
        return self.of(problem).correct(problem, answer)

    def verify(self, problem: Problem, response: str) -> Grade:
        return self.of(problem).verify(problem, response)

    def grade(self, problem: Problem, responses: Sequence[str], tokens: Sequence[Tokens] = ()) -> list[Grade]:
        return self.of(problem).grade(problem, responses, tokens)

    def split_steps(self, response: str) -> list[str]:
        raise AssertionError("a response's steps depend on its problem: ask mixture.of(problem)")

    def extract(self, response: str) -> str | None:
        raise AssertionError("a response's answer depends on its problem: ask mixture.of(problem)")

    def mentions_hint(self, response: str) -> bool:
        raise AssertionError("whether a response speaks of a hint depends on its problem: ask mixture.of(problem)")


def _places(weights: Sequence[float]) -> list[int]:
    """How many places of a block each part has: the smallest whole numbers in the weights' proportion.

    >>> _places([2, 1]), _places([0.7, 0.3]), _places([3, 3])
    ([2, 1], [7, 3], [1, 1])
    """
    shares = [Fraction(repr(float(weight))) for weight in weights]
    shares = [share / sum(shares) for share in shares]
    block = lcm(*(share.denominator for share in shares))
    if block > LARGEST_BLOCK:
        return [max(1, round(share * LARGEST_BLOCK)) for share in shares]
    return [int(share * block) for share in shares]
