"""Resets: a failed chain is entered again before one of its steps and continued (RRPO and SRPO, arXiv 2605.25507).

A step's boundaries are token indices of the chain itself; no text is tokenised again. Where to reset is a position:
a generator, like a pass, that may ask for samples or scores and returns the step, from 1.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from mulligan.diagnosis import parse_step
from mulligan.memory import Memory
from mulligan.rollout import Ask, Attempt
from mulligan.seeds import rng_of
from mulligan.types import DIAGNOSIS, FRESH, RESET, Forest, Problem, Sample, Stream, Tree

ENTROPY = Stream(quantity="entropy", model="policy", context="sampling")


@dataclass(frozen=True, slots=True)
class Parent:
    """A failed chain and where its steps end."""

    sample: Sample
    steps: list[str]
    ends: list[int]  # for each step the index just behind its last token

    def begin(self, step: int) -> int:
        """The index of the first token of a step (from 1); never behind the last token, which may be EOS."""
        return min(self.ends[step - 2], len(self.sample.tokens) - 1) if step > 1 else 0


Position = Callable[[Parent, Tree, Ask], Generator[Any, Any, int]]


def random_step(parent: Parent, tree: Tree, ask: Ask) -> Generator[Any, Any, int]:
    """RRPO: uniform over all steps."""
    return rng_of(ask.draw_seed("step")).randint(1, len(parent.steps))
    yield


def early_step(parent: Parent, tree: Tree, ask: Ask) -> Generator[Any, Any, int]:
    """A control: uniform over the first half of the steps."""
    return rng_of(ask.draw_seed("step")).randint(1, (len(parent.steps) + 1) // 2)
    yield


def restart(parent: Parent, tree: Tree, ask: Ask) -> Generator[Any, Any, int]:
    """A control: from the very beginning, so nothing of the parent is kept."""
    return 1
    yield


def oracle_step(parent: Parent, tree: Tree, ask: Ask) -> Generator[Any, Any, int]:
    """A control: the first wrong step as the task's process oracle knows it; 1 where the task has none to name."""
    return parent.sample.grade.first_wrong_step or 1
    yield


def entropy_step(parent: Parent, tree: Tree, ask: Ask) -> Generator[Any, Any, int]:
    """A control: the step at whose first token the policy is least sure."""
    (entropy,) = yield ask.scores([parent.sample], ENTROPY)
    first = [float(entropy[parent.begin(step)]) for step in range(1, len(parent.steps) + 1)]
    return first.index(max(first)) + 1


@dataclass(frozen=True, slots=True)
class SelfDiagnosis:
    """SRPO: the policy itself names the first wrong step of its failed chain. Its words are never trained; where
    they name no step, the reset is a restart.

    Args:
        temperature: of the diagnosis.
        permuted: takes another problem's diagnosis, as a share of the chain, from the step before (a placebo); in the
            first step of a run there is none, and the reset is random.
    """

    temperature: float = 0.3
    permuted: bool = False

    def __call__(self, parent: Parent, tree: Tree, ask: Ask) -> Generator[Any, Any, int]:
        (said,) = yield ask.samples(
            1,
            context=ask.texts.diagnosis(tree.problem, parent.steps),
            origin=DIAGNOSIS,
            parent=parent.sample.uid,
            temperature=self.temperature,
            graded=False,
        )
        steps = len(parent.steps)
        if not self.permuted:
            return parse_step(said.text, steps) or 1
        shares = ask.recall(SHARES, [])
        rng = rng_of(ask.draw_seed("step"))
        share = rng.choice(shares) if shares else rng.random()
        return min(int(share * steps) + 1, steps)


SHARES = "diagnoses"


def remember_shares(forest: Forest, memory: Memory) -> None:
    """Stores where in their chains this step's diagnoses pointed, as shares in [0, 1), for the next step's placebo."""
    shares = []
    for tree in forest.trees:
        for said in tree.of(DIAGNOSIS):
            parent = next(s for s in tree.samples if s.uid == said.request.parent)
            shares.append(((parse_step(said.text, parent.grade.steps) or 1) - 0.5) / parent.grade.steps)
    memory[SHARES] = shares or memory.get(SHARES, [])


@dataclass(frozen=True, slots=True)
class Reset:
    """n continuations of one failed chain from one of its steps, a group with a baseline of its own.

    The parent is drawn uniformly among the failures of the fresh group, truncated ones included, and stays in that
    group. Without any failure there are n more fresh samples instead, in a group of their own.
    """

    n: int
    at: Position

    def __call__(self, problem: Problem, tree: Tree, ask: Ask) -> Attempt:
        failures = [s for s in tree.of(FRESH) if s.failed]
        if not failures:
            yield ask.samples(self.n)
            return
        chosen = failures[rng_of(ask.draw_seed("parent")).randrange(len(failures))]
        steps, ends = ask.texts.steps(chosen.tokens)
        parent = Parent(chosen, steps, ends)
        step = (yield from self.at(parent, tree, ask)) if steps else 1
        prefix = chosen.tokens[: parent.begin(step)]
        yield ask.samples(self.n, prefix=prefix, origin=RESET, parent=chosen.uid)
