"""What tasks in English share: the closing instruction, hint and diagnosis, and how a response falls into steps.

The texts of hint and diagnosis follow LTE (arXiv 2510.26109) and SRPO (arXiv 2605.25507).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mulligan.tasks.base import Task, TaskSettings, split_after
from mulligan.types import Problem

FINISH = "and put your final answer within \\boxed{}."
THOROUGH = f"Please reason step by step, {FINISH}"
CONCISE = f"Please think concisely, {FINISH}"
_HINT = re.compile(r"\bhint(s|ed)?\b|\bincorrect answers\b", re.IGNORECASE)


class EnglishSettings(TaskSettings):
    """A step of a response ends behind ``step_delimiter``, which is a text or (``step_splitter="regex"``) a regular
    expression, ``[.!?]\\s`` for instance."""

    instruction: str | None = Field(default=None, description="behind every question; asks for steps and a box")
    step_delimiter: str = Field(default="\n\n", min_length=1)
    step_splitter: Literal["text", "regex"] = "text"

    @model_validator(mode="after")
    def _pattern(self) -> EnglishSettings:
        if self.step_splitter == "regex":
            try:
                if re.compile(self.step_delimiter).match(""):
                    raise ValueError(
                        f"step_delimiter {self.step_delimiter!r} matches nothing at all: steps would be empty"
                    )
            except re.error as error:
                raise ValueError(f"step_delimiter {self.step_delimiter!r} is no regular expression: {error}") from None
        return self


class English(Task):
    """A task whose problems hold their question in ``data["question"]``.

    Attributes:
        answered: whether there are final answers to ask for.
    """

    Settings: ClassVar[type[TaskSettings]] = EnglishSettings
    english = True
    answered: bool = True

    def question(self, problem: Problem) -> str:
        return problem.data["question"]

    def asked(self, question: str) -> str:
        """The plain prompt: the question and the closing instruction."""
        return _lines(question, self._instruction())

    def hint(self, problem: Problem, wrong_answers: Sequence[str], *, concise: bool = False) -> str:
        """The hint stands between the question and the closing instruction; without wrong answers there is none."""
        told = ""
        if wrong_answers:
            listed = ", ".join(" ".join(answer.split()) for answer in wrong_answers)
            told = (
                f"Hint: possible incorrect answers include {listed}. "
                "Do not use or mention the hint explicitly in any of your intermediate steps."
            )
        return _lines(problem.data["question"], told, self._instruction(concise=concise))

    def _instruction(self, *, concise: bool = False) -> str:
        own = self.settings.instruction
        if own is None and self.answered:
            return CONCISE if concise else THOROUGH
        return _lines("Please think concisely." if concise else "", own or "")

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


def _lines(*parts: str) -> str:
    return "\n".join(part for part in parts if part)
