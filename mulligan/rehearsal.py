"""A method's passes on a scripted sampler: the dry run of what is sampled, and of what is trained of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from mulligan.assign import Fill, assign
from mulligan.errors import ContractError
from mulligan.memory import Memory
from mulligan.method import Method
from mulligan.rollout import climb
from mulligan.sampling.scripted import ScriptedSampler
from mulligan.tasks.base import Task
from mulligan.texts import Texts
from mulligan.types import EXTRA, HINTED, RESET, Forest, Grade, Problem, Request, Sample, Stream, Tokens, Verdict

TREES = 4  # nothing passes at first; half passes; everything passes; everything is truncated at first


def rehearse(method: Method, task: Task, texts: Texts, problems: Sequence[Problem], fill: Fill, most: int) -> Forest:
    """Runs the passes, then select and credit, on verdicts that are written down.

    Raises:
        ContractError: samples of a second round or a reset are drawn and none of them is ever trained.
    """
    planned: deque[bool] = deque()
    seen: set[int] = set()

    def script(request: Request, attempt: int) -> tuple[str, str]:
        tree = request.group >> 20
        first = request.group not in seen and not any(group >> 20 == tree for group in seen)
        if attempt == request.n - 1:
            seen.add(request.group)
        right = attempt % 2 == 0 if not first else (False, attempt % 2 == 0, True, False)[tree % TREES]
        if request.graded:
            planned.append(right)
        text = task.solution(request.problem) if request.graded else "\\boxed{2}"
        return text, "length" if first and tree % TREES == 3 else "stop"

    def grade(problem: Problem, responses: Sequence[str], tokens: Sequence[Tokens]) -> list[Grade]:
        return [graded(problem, response) for response in responses]

    def graded(problem: Problem, response: str) -> Grade:
        if not planned:  # a response from elsewhere, which nobody wrote here
            return task.verify(problem, response)
        right = planned.popleft()
        steps = task.of(problem).split_steps(response)
        return Grade(
            verdict=Verdict.PASS if right else Verdict.FAIL,
            reward=float(right),
            answer=problem.answer if right else f"{problem.answer}0",
            first_wrong_step=None if right else len(steps),
            steps=len(steps),
        )

    def scores(samples: Sequence[Sample], stream: Stream, context: Tokens | None) -> list[torch.Tensor]:
        return [torch.linspace(-0.1, -1.0, len(s.tokens)) for s in samples]

    cast = [(slot, problems[slot % len(problems)]) for slot in range(TREES)]
    sampler = ScriptedSampler(texts.tokenizer, script)
    memory = Memory()

    def step() -> Forest:
        seen.clear()
        kit = {"texts": texts, "sampler": sampler, "grade": grade, "score": scores, "memory": memory}
        return Forest(0, climb(cast, method.passes, seed=0, **kit))

    forest = step()
    if method.remember is not None:
        method.remember(forest, memory)
        forest = step()  # which recalls what the first one remembered
    live = {row.sample.origin for row in assign(method, forest, texts, fill, most) if bool(row.advantages.any())}
    for origin in (HINTED, EXTRA, RESET):
        if any(s.origin == origin for s in forest.samples) and origin not in live:
            raise ContractError(
                f"{method.name}: draws {origin} samples and trains none of them: select and credit leave all out"
            )
    return forest
