"""Second rounds: when every sample of a prompt fails, try again, with the model's own wrong answers as a hint or
without (LTE, arXiv 2510.26109)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mulligan.rollout import Ask, Attempt
from mulligan.seeds import rng_of
from mulligan.types import EXTRA, HINTED, Problem, Sample, Tree

BRANCHES = ("none", "some", "all")  # how many of the first round were truncated


def failed_round(tree: Tree) -> list[Sample]:
    """The failures of a tree in which something failed and nothing passed; otherwise nothing."""
    return [] if tree.any_pass() else [s for s in tree.samples if s.failed]


def branch_of(failures: Sequence[Sample]) -> str:
    """LTE's branch: whether none, some or all of the failures were truncated."""
    cut = sum(s.truncated for s in failures)
    return "none" if cut == 0 else "all" if cut == len(failures) else "some"


def wrong_answers(tree: Tree, ask: Ask, failures: Sequence[Sample]) -> list[str]:
    """The final answers of the failures that were not truncated, one of each by the verifier's equivalence, without
    empty ones and without anything that verifies as correct."""
    task, problem = ask.texts.task, tree.problem
    out: list[str] = []
    for sample in failures:
        answer = sample.grade.answer
        if sample.truncated or answer is None or not answer.strip() or task.correct(problem, answer):
            continue
        if not any(task.equivalent(problem, answer, other) for other in out):
            out.append(answer)
    return out


@dataclass(frozen=True, slots=True)
class Hinted:
    """n samples behind a hint, for a prompt that no sample solved.

    None truncated: the wrong answers are the hint. Some: those of the others, and a request to be concise. All: the
    request alone. Where none was truncated and none gave an answer there is nothing to say, and no second round.

    Args:
        n: samples.
        most_answers: the hint's wrong answers, at most (a task's own text may hold fewer).
        source: "own" failures; "other" puts other problems' answers in their place, as many (a placebo).
    """

    n: int
    most_answers: int = 8
    source: Literal["own", "other"] = "own"

    def __call__(self, problem: Problem, tree: Tree, ask: Ask) -> Attempt:
        failures = failed_round(tree)
        if not failures:
            return
        branch = branch_of(failures)
        answers = wrong_answers(tree, ask, failures)[: self.most_answers]
        if self.source == "other":
            answers = _others(problem, ask, len(answers))
        if branch == "none" and not answers:
            return
        context = ask.texts.hint(problem, answers, concise=branch != "none")
        yield ask.samples(self.n, context=context, origin=HINTED)


@dataclass(frozen=True, slots=True)
class Extra:
    """n more samples of the plain prompt, for a prompt that no sample solved: LTE's control at equal cost."""

    n: int

    def __call__(self, problem: Problem, tree: Tree, ask: Ask) -> Attempt:
        if failed_round(tree):
            yield ask.samples(self.n, origin=EXTRA)


def _others(problem: Problem, ask: Ask, n: int) -> list[str]:
    """Right answers of n other problems, wrong for this one."""
    task, rng = ask.texts.task, rng_of(ask.draw_seed("other answers"))
    size = task.size(problem.split) or 1 << 20
    out: list[str] = []
    for _ in range(20 * n):
        if len(out) == n:
            break
        answer = task.problem(problem.split, rng.randrange(size)).answer
        if not task.correct(problem, answer) and answer not in out:
            out.append(answer)
    return out
