"""Evaluation: what share of held-out problems a model solves, how, and how sure we are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from mulligan.errors import UserError
from mulligan.rollout import Pass, climb, fresh
from mulligan.sampling import Sampler
from mulligan.seeds import seed_of
from mulligan.tasks.base import Task
from mulligan.texts import Texts
from mulligan.thoughts import thought_counts
from mulligan.types import Sample, Tree


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased pass@k from n samples (arXiv 2107.03374, equation 1): ``1 - C(n - c, k) / C(n, k)``.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= n:
        raise UserError(f"pass@{k} needs at least {k} samples a problem; there are {n}")
    return 1.0 - comb(n - correct, k) / comb(n, k)


def bootstrap(values: Sequence[float], *, resamples: int = 4000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean by the percentile bootstrap over problems (samples of one problem are
    not independent, problems are)."""
    data = np.asarray(values, dtype=np.float64)
    generator = np.random.Generator(np.random.PCG64(seed_of(seed, "bootstrap", len(data))))
    means = data[generator.integers(0, len(data), (resamples, len(data)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Every sample of an evaluation, and the numbers drawn from them."""

    trees: list[Tree]
    samples: int  # a problem
    english: bool = False  # thoughts can be counted

    def numbers(self) -> dict[str, float]:
        """JSON-able results.

        ``none_pass`` is the share of problems that no one of 8 samples solves (of all samples, where there
        are fewer than 8); ``luck`` the share of chains with a wrong step that end in the right answer;
        ``thoughts``, ``reflection`` and ``transition`` are counts a response, where it is English.
        """
        graded = [g for g in map(_scorable, self.trees) if g]
        if not graded:
            raise UserError("evaluation: not one response could be scored")
        share = [_share(g) for g in graded]
        every = [s for g in graded for s in g]
        low, high = bootstrap(share)
        smallest = min(len(g) for g in graded)
        size = min(8, smallest)
        out: dict[str, float] = {
            "pass@1": float(np.mean(share)),
            "pass@1_low": low,
            "pass@1_high": high,
            "none_pass": float(np.mean([1 - pass_at_k(len(g), sum(s.passed for s in g), size) for g in graded])),
        }
        k = 2
        while k <= smallest:
            out[f"pass@{k}"] = float(np.mean([pass_at_k(len(g), sum(s.passed for s in g), k) for g in graded]))
            k *= 2
        judged = [s for s in every if s.grade.process_correct is not None]
        if judged:
            wrong = [s for s in judged if not s.grade.process_correct]
            out["process_correct"] = sum(bool(s.grade.process_correct) for s in judged) / len(judged)
            out["luck"] = sum(s.passed for s in wrong) / len(wrong) if wrong else 0.0
        own = [len(s.tokens) for s in every]
        out["length"] = float(np.mean(own))
        out["truncated"] = sum(s.truncated for s in every) / len(every)
        if self.english:
            out |= _thoughts(every)
        out["unscorable"] = float(sum(len(t.samples) for t in self.trees) - len(every))
        out["problems"] = float(len(graded))
        out["samples"] = float(self.samples)
        return out

    def relative_to(self, base: Evaluation) -> dict[str, float | None]:
        """What this model has over another one on the same problems.

        Returns:
            ``pass@1_difference``, with the ends of its 95 % interval: a bootstrap over problems that keeps both
            models' results on a problem together, so that how hard the problems are drops out. Where responses are
            English also ``reflection_ratio`` and ``transition_ratio``, the counts a response divided by the other
            model's (arXiv 2604.14142); None where that is 0.

        Raises:
            UserError: no problem has a scorable response of each.
        """
        assert [t.problem.uid for t in self.trees] == [t.problem.uid for t in base.trees]
        pairs = zip(map(_scorable, self.trees), map(_scorable, base.trees), strict=True)
        pairs = [(own, other) for own, other in pairs if own and other]
        gains = [_share(own) - _share(other) for own, other in pairs]
        if not pairs:
            raise UserError("evaluation: no problem has a scorable response of both models")
        low, high = bootstrap(gains)
        out: dict[str, float | None] = {
            "pass@1_difference": float(np.mean(gains)),
            "pass@1_difference_low": low,
            "pass@1_difference_high": high,
        }
        if self.english:
            own, other = (_thoughts([s for group in side for s in group]) for side in zip(*pairs, strict=True))
            for kind in ("reflection", "transition"):
                out[f"{kind}_ratio"] = own[kind] / other[kind] if other[kind] else None
        return out

    def examples(self, n: int = 2) -> list[Sample]:
        """The first sample of the first n problems."""
        return [tree.samples[0] for tree in self.trees[:n]]


def _scorable(tree: Tree) -> list[Sample]:
    return [s for s in tree.samples if s.passed or s.failed]


def _share(samples: Sequence[Sample]) -> float:
    return sum(s.passed for s in samples) / len(samples)


def _thoughts(samples: Sequence[Sample]) -> dict[str, float]:
    counts = [thought_counts(s.text) for s in samples]
    return {
        "thoughts": float(np.mean([c.total for c in counts])),
        "reflection": float(np.mean([c.reflection for c in counts])),
        "transition": float(np.mean([c.transition for c in counts])),
    }


def evaluate(
    task: Task,
    texts: Texts,
    sampler: Sampler,
    *,
    split: str,
    problems: int,
    samples: int,
    seed: int = 0,
    passes: Sequence[Pass] | None = None,
    chunk: int = 64,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Evaluation:
    """Samples and grades the first ``problems`` problems of a split.

    Args:
        samples: a problem; at the sampler's temperature.
        seed: of the sampling; the problems do not depend on it.
        passes: what to sample in place of fresh samples.
        chunk: problems between calls of ``progress(done, total)``.
    """
    size = task.size(split)
    if size == 0:
        raise UserError(f"task '{task.name}' has no problems in its {split} split")
    total = problems if size is None else min(problems, size)
    trees: list[Tree] = []
    for start in range(0, total, chunk):
        stop = min(start + chunk, total)
        trees += climb(
            [(i, task.problem(split, i)) for i in range(start, stop)],
            passes if passes is not None else (fresh(samples),),
            seed=seed_of(seed, "evaluate", split),
            texts=texts,
            sampler=sampler,
            grade=task.grade,
        )
        progress(stop, total)
    return Evaluation(trees, samples, english=task.english)
