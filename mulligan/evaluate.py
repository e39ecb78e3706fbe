"""Evaluation: what share of held-out problems a model solves, how, and how sure we are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

from mulligan.errors import UserError
from mulligan.majority import majority_at_k, tally
from mulligan.rollout import Pass, climb, fresh
from mulligan.sampling import Sampler
from mulligan.seeds import seed_of
from mulligan.tasks.base import Task
from mulligan.texts import Texts
from mulligan.thoughts import thought_counts
from mulligan.types import Grade, Problem, Tree, Verdict

CHUNK = 64  # problems that are sampled together
RESAMPLES = 4000

Same = Callable[[Problem, str, str], bool]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased pass@k from n samples (arXiv 2107.03374, equation 1): ``1 - C(n - c, k) / C(n, k)``.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    if not 1 <= k <= n:
        raise UserError(f"pass@{k} needs at least {k} samples a problem; there are {n}")
    return 1.0 - comb(n - correct, k) / comb(n, k)


def bootstrap(values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean by the percentile bootstrap over problems (samples of one problem are
    not independent, problems are)."""
    return percentiles(resample(np.asarray(values, dtype=np.float64), None, resamples=resamples, seed=seed))


def resample(sums: np.ndarray, counts: np.ndarray | None, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Means of problems drawn with replacement, float64 [resamples].

    Args:
        sums: float64 [problems], each problem's total.
        counts: float64 [problems], what it is a total of; None: 1 each.
    """
    n = len(sums)
    generator = np.random.Generator(np.random.PCG64(seed_of(seed, "bootstrap", n)))
    means = []
    for start in range(0, resamples, 256):  # in blocks, since [resamples, problems] may be large
        drawn = generator.integers(0, n, (min(256, resamples - start), n))
        total = sums[drawn].sum(axis=1)
        means.append(total / (n if counts is None else counts[drawn].sum(axis=1)))
    return np.concatenate(means)


def percentiles(means: np.ndarray) -> tuple[float, float]:
    """The ends of the 95 % interval."""
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What an evaluation keeps of one sample: no tokens, since a data set times its samples has many."""

    problem: Problem
    attempt: int
    text: str  # the response
    grade: Grade
    length: int  # own tokens, EOS included
    truncated: bool

    @property
    def passed(self) -> bool:
        return self.grade.verdict is Verdict.PASS

    @property
    def failed(self) -> bool:
        return self.grade.verdict is Verdict.FAIL


@dataclass(frozen=True, slots=True)
class Column:
    """One quantity, problem by problem. Its mean is over all that was counted, not over the problems' own means.

    Attributes:
        sums: float64 [problems], each problem's total.
        counts: float64 [problems], what it is a total of, above 0; None: 1 each.
    """

    sums: np.ndarray
    counts: np.ndarray | None = None

    @property
    def mean(self) -> float:
        if self.counts is None:
            return float(np.mean(self.sums))
        return float(self.sums.sum() / self.counts.sum())

    def resampled(self, seed: int = 0) -> np.ndarray:
        return resample(self.sums, self.counts, seed=seed)


Columns = dict[str, Column]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Every sample of an evaluation, and the numbers drawn from them."""

    groups: list[list[Outcome]]  # a list for each problem, all its samples
    samples: int  # a problem
    english: bool = False  # thoughts can be counted

    def numbers(self, same: Same | None = None, columns: Columns | None = None) -> dict[str, float]:
        """JSON-able results.

        pass@k (and maj@k) are there for the powers of two up to n samples a problem and for n itself. A problem with
        fewer than k scorable samples is left out of them; ``pass@k_problems`` then says how many are in.
        ``none_pass`` is the share of problems that no one of 8 samples solves (of all samples, where there are fewer
        than 8); ``luck`` the share of chains with a wrong step that end in the right answer; ``thoughts``,
        ``reflection`` and ``transition`` are counts a response, where it is English. Unscorable samples are counted and
        enter nothing else.

        Args:
            same: whether two answers to a problem are one (:meth:`Task.equivalent`). Given, everything is told: avg@n
                (which is pass@1 by its other name), maj@k, and for every mean its 95 % interval as ``_low`` and
                ``_high``. Without, only pass@1 has one.
            columns: :meth:`columns` of the same, where they are there already.
        """
        columns = self.columns(same) if columns is None else columns
        problems = len(columns["pass@1"].sums)
        out: dict[str, float] = {}
        for name, column in columns.items():
            out[name] = column.mean
            if name == "pass@1" or same is not None:
                out[f"{name}_low"], out[f"{name}_high"] = percentiles(column.resampled())
            if name.startswith(("pass@", "maj@")) and len(column.sums) < problems:
                out[f"{name}_problems"] = float(len(column.sums))
        if "process_correct" in out:
            out.setdefault("luck", 0.0)  # there is no chain with a wrong step
        scorable = sum(len(_scorable(g)) for g in self.groups)
        out["unscorable"] = float(sum(map(len, self.groups)) - scorable)
        out["problems"] = float(problems)
        out["samples"] = float(self.samples)
        return out

    def columns(self, same: Same | None = None) -> Columns:
        """Every quantity, problem by problem; see :meth:`numbers`.

        Raises:
            UserError: not one response could be scored.
        """
        graded = [g for g in map(_scorable, self.groups) if g]
        if not graded:
            raise UserError("evaluation: not one response could be scored")
        most = max(map(len, graded))
        out = {"pass@1": Column(np.array([_share(g) for g in graded]))}
        if same is not None:
            out[f"avg@{self.samples}"] = out["pass@1"]
        sizes = [k for k in range(2, most + 1) if k & (k - 1) == 0 or k == most]
        out |= {f"pass@{k}": Column(_passes(graded, k)) for k in sizes}
        if same is not None and any(o.grade.answer is not None for g in graded for o in g):
            votes = [_tally(g, same) for g in graded]
            out |= {f"maj@{k}": Column(np.array([majority_at_k(v, k) for v in votes if v.samples >= k])) for k in sizes}
        out["none_pass"] = Column(1 - _passes(graded, min(8, most)))
        judged = [[o for o in g if o.grade.process_correct is not None] for g in graded]
        wrong = [[o for o in g if not o.grade.process_correct] for g in judged]
        out |= _ratio("process_correct", judged, lambda o: bool(o.grade.process_correct))
        out |= _ratio("luck", wrong, lambda o: o.passed)
        out |= _ratio("length", graded, lambda o: o.length)
        out |= _ratio("truncated", graded, lambda o: o.truncated)
        if self.english:
            out |= _thoughts(graded)
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
        gains = self.gains(base)
        low, high = percentiles(gains.resampled())
        out: dict[str, float | None] = {
            "pass@1_difference": gains.mean,
            "pass@1_difference_low": low,
            "pass@1_difference_high": high,
        }
        if self.english:
            own, other = (_thoughts(side) for side in zip(*self._pairs(base), strict=True))
            for kind in ("reflection", "transition"):
                below = other[kind].mean
                out[f"{kind}_ratio"] = own[kind].mean / below if below else None
        return out

    def gains(self, base: Evaluation) -> Column:
        """What this model has over another one, problem by problem.

        Raises:
            UserError: no problem has a scorable response of each.
        """
        return Column(np.array([_share(own) - _share(other) for own, other in self._pairs(base)]))

    def _pairs(self, base: Evaluation) -> list[tuple[list[Outcome], list[Outcome]]]:
        """Both models' scorable outcomes of each problem that has some of both."""
        assert [g[0].problem.uid for g in self.groups] == [g[0].problem.uid for g in base.groups]
        both = zip(map(_scorable, self.groups), map(_scorable, base.groups), strict=True)
        pairs = [(own, other) for own, other in both if own and other]
        if not pairs:
            raise UserError("evaluation: no problem has a scorable response of both models")
        return pairs

    def examples(self, n: int = 2) -> list[Outcome]:
        """The first sample of the first n problems."""
        return [group[0] for group in self.groups[:n]]


def macro_average(parts: Sequence[Columns]) -> dict[str, float]:
    """The mean of several evaluations' means, each counting alike whatever its size, with 95 % intervals.

    Problems are resampled within each evaluation, by draws of its own. Only what all of them have is averaged.
    """
    out: dict[str, float] = {}
    for name in parts[0]:
        if all(name in part for part in parts):
            out[name] = float(np.mean([part[name].mean for part in parts]))
            means = np.mean([part[name].resampled(seed=at) for at, part in enumerate(parts)], axis=0)
            out[f"{name}_low"], out[f"{name}_high"] = percentiles(means)
    return out


def _scorable(group: Sequence[Outcome]) -> list[Outcome]:
    return [o for o in group if o.passed or o.failed]


def _share(group: Sequence[Outcome]) -> float:
    return sum(o.passed for o in group) / len(group)


def _passes(groups: Sequence[Sequence[Outcome]], k: int) -> np.ndarray:
    return np.array([pass_at_k(len(g), sum(o.passed for o in g), k) for g in groups if len(g) >= k])


def _tally(group: Sequence[Outcome], same: Same) -> Any:
    problem = group[0].problem
    return tally([(o.grade.answer, o.passed) for o in group], lambda left, right: same(problem, left, right))


def _ratio(name: str, groups: Sequence[Sequence[Outcome]], of: Callable[[Outcome], float]) -> Columns:
    """A mean over samples; nothing where there are none."""
    pairs = [(sum(of(o) for o in group), len(group)) for group in groups if group]
    if not pairs:
        return {}
    sums, counts = np.array(pairs, dtype=np.float64).T
    return {name: Column(sums, counts)}


def _thoughts(groups: Sequence[Sequence[Outcome]]) -> Columns:
    counted = {id(o): thought_counts(o.text) for group in groups for o in group}
    return {
        **_ratio("thoughts", groups, lambda o: counted[id(o)].total),
        **_ratio("reflection", groups, lambda o: counted[id(o)].reflection),
        **_ratio("transition", groups, lambda o: counted[id(o)].transition),
    }


def split_size(task: Task, split: str, problems: int) -> int:
    """How many problems of a split there are, and at most ``problems``.

    Raises:
        UserError: there is none.
    """
    size = task.size(split)
    if size == 0:
        raise UserError(f"task '{task.name}' has no problems in its {split} split")
    return problems if size is None else min(problems, size)


def trees(
    task: Task,
    texts: Texts,
    sampler: Sampler,
    *,
    split: str,
    problems: int,
    passes: Sequence[Pass],
    seed: int = 0,
    start: int = 0,
    chunk: int = CHUNK,
    progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Iterator[list[Tree]]:
    """Sampled and graded problems of a split, ``chunk`` at a time.

    Args:
        passes: what to sample for each problem.
        seed: of the sampling; the problems do not depend on it.
        start: the first problem; with a multiple of ``chunk`` what follows is bit for bit what it is from 0 on.
        progress: called with (done, total) after every chunk.
    """
    total = split_size(task, split, problems)
    for begin in range(start, total, chunk):
        end = min(begin + chunk, total)
        yield climb(
            [(i, task.problem(split, i)) for i in range(begin, end)],
            passes,
            seed=seed_of(seed, "evaluate", split),
            texts=texts,
            sampler=sampler,
            grade=task.grade,
        )
        progress(end, total)


def outcomes(tree: Tree) -> list[Outcome]:
    """What is kept of a tree."""
    return [
        Outcome(
            problem=tree.problem,
            attempt=sample.attempt,
            text=sample.text,
            grade=sample.grade,
            length=len(sample.tokens),
            truncated=sample.truncated,
        )
        for sample in tree.samples
    ]


def evaluate(
    task: Task,
    texts: Texts,
    sampler: Sampler,
    *,
    samples: int,
    before: Sequence[list[Outcome]] = (),
    keep: Callable[[list[list[Outcome]]], Any] = lambda groups: None,
    **more: Any,
) -> Evaluation:
    """Samples and grades the first problems of a split.

    Args:
        samples: a problem; at the sampler's temperature.
        before: the outcomes of the first problems where these are known already, in whole chunks.
        keep: called with every chunk's outcomes.
        more: as for :func:`trees`: split, problems, seed, chunk, progress.
    """
    groups = list(before)
    for done in trees(task, texts, sampler, passes=(fresh(samples),), start=len(groups), **more):
        found = [outcomes(tree) for tree in done]
        groups += found
        keep(found)
    return Evaluation(groups, samples, english=task.english)
