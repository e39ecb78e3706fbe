r"""Reasoning-gym: procedural problems of the reasoning-gym library (arXiv 2505.24760), behind a guard.

The library makes the problems, in this process. It never sees a model's text here: answers are compared as texts, or
scored by the data set's own scorer in the verifier's worker (``gym_score.py``). Which data sets are offered, and why
the others are not, stands in ``gym_table.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Sequence
from importlib import metadata
from random import Random
from typing import Any, ClassVar

from pydantic import Field

from mulligan.errors import UserError, nearest
from mulligan.tasks.base import GeneratedTask, TaskSettings
from mulligan.tasks.english import English, EnglishSettings
from mulligan.tasks.gym_score import bare, same
from mulligan.tasks.gym_table import AUDITED, EXACT, EXCLUDED, OWN_SCORER
from mulligan.thoughts import after_thinking
from mulligan.types import Grade, Problem, Tokens, Verdict
from mulligan.verify.answer import final_answer

SEEDS = 10  # tried for one draw
KEPT = 4096  # problems held in memory, since evaluation asks for the same ones again


class GymSettings(EnglishSettings):
    """``config`` are the data set's own settings, ``task.config.min_terms=3`` for instance; those left out have its
    defaults. ``seed`` changes which problems are drawn, never which split a problem is in."""

    dataset: str = Field(min_length=1)
    config: dict[str, Any] = Field(default={}, description="the data set's own settings")


class Gym(English, GeneratedTask):
    """Problems of one data set.

    A problem is drawn as an item of a data set of size one with a seed of its own, until one falls into the split's
    buckets by a hash of its question. So no question stands in two splits, whatever the seeds; the library itself
    gives neighbouring seeds the same items.

    Where the scorer pays for a part (a longer path, say), the reward is the score, and only a whole 1 passes.

    Raises:
        UserError: the library is absent or another than the audited one, or a data set or a setting is wrong.
    """

    name: ClassVar[str] = "reasoning-gym"
    summary: ClassVar[str] = "a procedural data set of reasoning-gym: task.dataset=tower_of_hanoi"
    Settings: ClassVar[type[TaskSettings]] = GymSettings
    tries: ClassVar[int] = 300  # one draw in eight falls into the test split: (7/8)^300 is 4e-18

    def __init__(self, settings: TaskSettings | None = None) -> None:
        if settings is None:
            raise UserError("task 'reasoning-gym' needs 'dataset', one of its data sets, such as basic_arithmetic")
        super().__init__(settings)
        self._dataset: str = self.settings.dataset
        _check_library()
        _check_name(self._dataset)
        _check_config(self._dataset, self.settings.config)
        self._kept: dict[tuple[str, int], Problem] = {}
        self._item(0)  # settings that do not work say so at once

    def draw(self, rng: Random, split: str) -> tuple[str, Problem]:
        item = self._any_item(rng)
        question = item["question"].strip()
        data = {"question": question}
        if self._dataset in OWN_SCORER:
            data["item"] = item
        problem = Problem(
            task=self.name, split=split, index=-1, prompt=self.asked(question), answer=item["answer"], data=data
        )
        return " ".join(question.casefold().split()), problem

    def problem(self, split: str, index: int) -> Problem:
        key = (split, index)
        if key not in self._kept:
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[key] = super().problem(split, index)
        return self._kept[key]

    def solution(self, problem: Problem) -> str:
        return f"\\boxed{{{problem.answer}}}"

    def extract(self, response: str) -> str | None:
        """The last box; None when there is none, or when the boxes hold different answers."""
        return final_answer(response)[0]

    def equivalent(self, problem: Problem, left: str, right: str) -> bool:
        return same(bare(left), bare(right))

    def correct(self, problem: Problem, answer: str) -> bool:
        return self._scores(problem, [answer])[0][0] == 1.0

    def verify(self, problem: Problem, response: str) -> Grade:
        return self.grade(problem, [response])[0]

    def grade(self, problem: Problem, responses: Sequence[str], tokens: Sequence[Tokens] = ()) -> list[Grade]:
        """All responses side by side, in one call of the verifier's pool where a scorer is needed."""
        answers = [final_answer(after_thinking(response)) for response in responses]
        scores = iter(self._scores(problem, [answer for answer, _ in answers if answer is not None]))
        return [
            self._grade(response, answer, *((0.0, why) if answer is None else next(scores)))
            for response, (answer, why) in zip(responses, answers, strict=True)
        ]

    def _grade(self, response: str, answer: str | None, score: float | None, reason: str) -> Grade:
        verdict = Verdict.UNSCORABLE if score is None else Verdict.PASS if score == 1.0 else Verdict.FAIL
        return Grade(
            verdict=verdict,
            reward=score or 0.0,
            answer=answer,
            reason=reason,
            steps=len(self.split_steps(response)),
            mentions_hint=self.mentions_hint(response),
        )

    def _scores(self, problem: Problem, answers: Sequence[str]) -> list[tuple[float | None, str]]:
        """The score of each answer and the reason; None where the verifier has no word on it."""
        texts = [bare(answer) for answer in answers]
        if self._dataset not in OWN_SCORER:
            return [_told(float(same(problem.answer, text))) for text in texts]
        if not texts:
            return []
        from mulligan.verify.pool import shared_pool

        item = problem.data["item"]
        jobs = [{"dataset": self._dataset, "item": item, "answer": text} for text in texts]
        outcomes = shared_pool().run("gym", jobs)
        return [(None, each.reason) if each.value is None else _told(each.value) for each in outcomes]

    def _any_item(self, rng: Random) -> dict[str, Any]:
        """An item of the next seed, or of the first after it that the data set does not fail with: some give up on a
        seed in thousands, and a run must not end there."""
        for _ in range(SEEDS - 1):
            with contextlib.suppress(UserError):
                return self._item(rng.getrandbits(31))  # as many bits as all data sets take
        return self._item(rng.getrandbits(31))

    def _item(self, seed: int) -> dict[str, Any]:
        """One item, as JSON would give it back.

        Raises:
            UserError: the data set refuses its settings, or fails with them.
        """
        from reasoning_gym import create_dataset

        try:
            with contextlib.redirect_stdout(io.StringIO()):  # one of them prints dots
                item = create_dataset(self._dataset, **self.settings.config, seed=seed, size=1)[0]
            held = json.loads(json.dumps(item, default=repr))
            if not (isinstance(held["question"], str) and isinstance(held["answer"], str) and held["answer"].strip()):
                raise ValueError("it made a problem without an answer")
        except Exception as error:  # whatever its own code raises on settings that it did not foresee
            told = " ".join(str(error).split()) or type(error).__name__
            config = self.settings.config
            raise UserError(f"task.config: {self._dataset} does not work with {config}: {told}") from error
        return held


def _told(score: float) -> tuple[float, str]:
    return score, "right" if score == 1.0 else f"partly right, {score:.2g}" if score else "wrong answer"


def _check_library() -> None:
    try:
        import reasoning_gym  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise UserError("task 'reasoning-gym' needs another package: pip install 'mulligan[gym]'") from error
    there = metadata.version("reasoning-gym")
    if there != AUDITED:
        raise UserError(
            f"task 'reasoning-gym': version {there} is installed, and its scorers were audited in {AUDITED}: "
            f"pip install reasoning-gym=={AUDITED}"
        )


def _check_name(dataset: str) -> None:
    if dataset in EXCLUDED:
        raise UserError(f"task.dataset: '{dataset}' is not offered: {EXCLUDED[dataset]}")
    if dataset not in EXACT and dataset not in OWN_SCORER:
        raise UserError(f"task.dataset: '{dataset}' is unknown{nearest(dataset, [*EXACT, *OWN_SCORER])}")


def _check_config(dataset: str, config: dict[str, Any]) -> None:
    """The names of the settings; their values the data set checks by itself."""
    from reasoning_gym.factory import DATASETS

    fields = {field.name for field in dataclasses.fields(DATASETS[dataset][1])} - {"seed", "size"}
    for key in config:
        if key == "seed":
            raise UserError("task.config.seed: every problem has a seed of its own; task.seed changes them all")
        if key == "size":
            raise UserError("task.config.size: problems are drawn without end; there is no size")
        if key not in fields:
            raise UserError(f"task.config.{key}: {dataset} has no such setting{nearest(key, fields)}")
