"""What a task is: problems, texts, steps and truth. A task owns its texts; no method holds one."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from mulligan.errors import UserError
from mulligan.seeds import rng_of
from mulligan.thoughts import after_thinking
from mulligan.types import Grade, Problem, Tokens, Verdict

# A problem's identity is hashed to one of 16 buckets and every split owns some of them, so that no
# problem can stand in two splits, whatever the seeds: disjoint by construction, not by search.
BUCKETS: dict[str, frozenset[int]] = {
    "train": frozenset(range(0, 8)),
    "dev": frozenset({8, 9}),
    "test": frozenset({10, 11}),
    "corpus": frozenset({12, 13, 14, 15}),  # what the shipped base was trained on
}


class TaskSettings(BaseModel):
    """Settings that every task has; a task adds its own."""

    # Strict, so that `true` is no number; a whole number still is a float.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    seed: int = 0


class Task(ABC):
    """Problem i is a pure function of (settings, split, i)."""

    name: ClassVar[str]
    summary: ClassVar[str]
    Settings: ClassVar[type[TaskSettings]] = TaskSettings
    has_oracle: bool = False  # knows the truth of every step
    english: bool = False  # responses are English prose, whose thoughts can be counted

    def __init__(self, settings: TaskSettings | None = None) -> None:
        self.settings: Any = settings if settings is not None else self.Settings()

    @abstractmethod
    def problem(self, split: str, index: int) -> Problem:
        """Problem ``index`` (from 0) of ``split``."""

    def size(self, split: str) -> int | None:
        """Number of problems in the split; None when there is no end."""
        return None

    def of(self, problem: Problem) -> Task:
        """The task that this problem is of: a mixture's part, any other task itself. Whoever reads a response (its
        steps, its answer) asks the problem's own task."""
        return self

    def parts(self) -> Sequence[Task]:
        """The tasks that this one is made of."""
        return (self,)

    def question(self, problem: Problem) -> str:
        """The question alone, without instructions: what two tasks would have in common."""
        return problem.prompt

    def notes(self) -> list[str]:
        """What the user should know of the data, a line each: rows that were left out, and why."""
        return []

    def left_out(self) -> dict[str, int]:
        """How many rows of the data were left out, by reason."""
        return {}

    @abstractmethod
    def solution(self, problem: Problem) -> str:
        """A right response, every step right, as the base's corpus would hold it."""

    def prompt(self, problem: Problem) -> str:
        """The plain prompt."""
        return problem.prompt

    @abstractmethod
    def hint(self, problem: Problem, wrong_answers: Sequence[str], *, concise: bool = False) -> str:
        """The prompt with the model's own wrong answers as a hint (LTE, arXiv 2510.26109).

        Args:
            wrong_answers: de-duplicated; may be empty (then only ``concise`` speaks).
            concise: asks for a short solution.
        """

    def mentions_hint(self, response: str) -> bool:
        """Whether a response speaks of the hint, so that it would make no sense to a reader without one."""
        return False

    @abstractmethod
    def diagnosis(self, problem: Problem, steps: Sequence[str]) -> str:
        """The prompt that asks for the first wrong step of a failed chain (SRPO, arXiv 2605.25507)."""

    @abstractmethod
    def split_steps(self, response: str) -> list[str]:
        """The response cut into its steps. Joined they give the response; the answer is the last step."""

    def first_wrong_step(self, problem: Problem, steps: Sequence[str]) -> int | None:
        """1-based index of the first wrong step, None when all are right. Where only steps are missing,
        it is the last. Only tasks with ``has_oracle``."""
        raise NotImplementedError(f"task '{self.name}' has no process oracle")

    @abstractmethod
    def extract(self, response: str) -> str | None:
        """The final answer in the response, None when there is none."""

    @abstractmethod
    def equivalent(self, problem: Problem, left: str, right: str) -> bool:
        """Whether two answers are the same answer."""

    @abstractmethod
    def correct(self, problem: Problem, answer: str) -> bool:
        """Whether the answer is right."""

    def verify(self, problem: Problem, response: str) -> Grade:
        """The verdict, the reward and, where there is an oracle, the truth of the process."""
        answer = self.extract(after_thinking(response))
        steps = self.split_steps(response)
        right = answer is not None and self.correct(problem, answer)
        wrong = self.first_wrong_step(problem, steps) if self.has_oracle else None
        return Grade(
            verdict=Verdict.PASS if right else Verdict.FAIL,
            reward=1.0 if right else 0.0,
            answer=answer,
            reason="right" if right else "no final answer" if answer is None else "wrong answer",
            process_correct=(right and wrong is None) if self.has_oracle else None,
            first_wrong_step=wrong,
            steps=len(steps),
            mentions_hint=self.mentions_hint(response),
        )

    def grade(self, problem: Problem, responses: Sequence[str], tokens: Sequence[Tokens] = ()) -> list[Grade]:
        """:meth:`verify` on several responses to one problem; a task that can do them side by side says how.

        Args:
            tokens: of each response, for rewards that read them; empty where nobody has them.
        """
        return [self.verify(problem, response) for response in responses]


class GeneratedTask(Task):
    """A task whose problems are drawn by rejection into the split's buckets."""

    tries: ClassVar[int] = 2000

    @abstractmethod
    def draw(self, rng: Random, split: str) -> tuple[str, Problem]:
        """One candidate and its identity: what makes it the same problem as another, settings aside."""

    def problem(self, split: str, index: int) -> Problem:
        if split not in BUCKETS:
            raise UserError(f"split '{split}' is unknown (known: {', '.join(BUCKETS)})")
        for attempt in range(self.tries):
            rng = rng_of(self.settings.seed, "problem", self.name, split, index, attempt)
            identity, problem = self.draw(rng, split)
            if bucket_of(self.name, identity) in BUCKETS[split]:
                return Problem(
                    task=self.name,
                    split=split,
                    index=index,
                    prompt=problem.prompt,
                    answer=problem.answer,
                    data=problem.data,
                )
        raise UserError(f"task '{self.name}': these settings leave no problem for split '{split}'; widen them")


def bucket_of(task: str, identity: str) -> int:
    """The bucket (0..15) of a problem's identity; it depends on neither seed nor split."""
    return hashlib.blake2b(f"{task}\x1f{identity}".encode(), digest_size=2).digest()[0] % 16


def boxed(response: str) -> str | None:
    r"""The content of the last complete ``\boxed{...}``, braces balanced; None when there is none.

    >>> boxed(r"so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    start = response.rfind("\\boxed{")
    while start >= 0:
        depth, begin = 1, start + len("\\boxed{")
        for at in range(begin, len(response)):
            depth += {"{": 1, "}": -1}.get(response[at], 0)
            if depth == 0:
                return response[begin:at]
        start = response.rfind("\\boxed{", 0, start)
    return None


def split_after(response: str, delimiter: str) -> list[str]:
    r"""Pieces that end in the delimiter, and the rest; joined they give the response; none is empty.

    >>> split_after("1x+y=3+8=1;2z*7=1*7=7;\\boxed{177}", ";")
    ['1x+y=3+8=1;', '2z*7=1*7=7;', '\\boxed{177}']
    """
    pieces = response.split(delimiter)
    out = [piece + delimiter for piece in pieces[:-1]]
    if pieces[-1]:
        out.append(pieces[-1])
    return out
