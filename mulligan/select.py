"""What is trained: from a forest to rows. A select may move a row to another group or leave samples out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mulligan.seeds import rng_of
from mulligan.types import DIAGNOSIS, FRESH, Forest, Row, Sample, Tree, Verdict

Select = Callable[[Forest], list[Row]]


def trainable(sample: Sample) -> bool:
    """Whether the verifier could score it; a diagnosis is no answer."""
    return sample.origin != DIAGNOSIS and sample.grade.verdict in (Verdict.PASS, Verdict.FAIL)


def everything(forest: Forest) -> list[Row]:
    """Every graded sample, in its own group; unscorable ones are neither trained nor counted."""
    return [Row(sample=s, context=(), group=s.group) for s in forest.samples if trainable(s)]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapFailures:
    """LTE (arXiv 2510.26109): the rescues of a second round take the places of random failures in the first group.

    The group keeps its size G and its baseline. What else the second round drew is not trained, and neither is a
    rescue that mentions the hint.

    Args:
        origin: of the second round.
        most: rescues that enter, at most; None is G - 1, because a group that only passes has advantage 0 again.
    """

    origin: str
    most: int | None = None

    def __call__(self, forest: Forest) -> list[Row]:
        return [row for tree in forest.trees for row in self._rows(tree)]

    def _rows(self, tree: Tree) -> list[Row]:
        rescues = [s for s in tree.of(self.origin) if s.passed and not s.grade.mentions_hint]
        stay = [s for s in tree.samples if trainable(s) and s.origin != self.origin]
        group = first_group(tree)
        failures = [s for s in group if s.failed]
        room = min(len(failures), len(rescues), len(group) - 1 if self.most is None else self.most)
        if room < 1:
            return [Row(sample=s, context=(), group=s.group) for s in stay]
        leaving = rng_of(group[0].request.seeds[0], "swap").sample(failures, room)
        coming = {id(out): rescue for out, rescue in zip(leaving, rescues, strict=False)}
        return [Row(sample=coming.get(id(s), s), context=(), group=s.group) for s in stay]


def first_group(tree: Tree) -> list[Sample]:
    """The graded samples of the tree's first group of fresh samples."""
    fresh = tree.of(FRESH)
    return [s for s in fresh if s.group == fresh[0].group and trainable(s)]
