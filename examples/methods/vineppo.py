"""VinePPO (arXiv 2410.01679): no value network; a state's value is what a few probes from there are worth.

From the end of every step of every chain ``probes`` continuations are sampled. They are graded and never trained. Each
step's tokens get ``A = V(behind the step) - V(before it)``: V is the probes' mean reward, at the prompt the chains'
own, and behind the last step the chain's reward.

    mulligan train --method ./examples/methods/vineppo.py:vineppo method.probes=4
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mulligan.credit import by_group, mean
from mulligan.method import Count, Method, Term
from mulligan.rollout import Ask, Attempt
from mulligan.select import everything
from mulligan.types import Forest, Problem, Row, Stream, Tree

PROBE = "probe"


@dataclass(frozen=True)
class Vine:
    """Chains in one group, then probes from each step's end."""

    chains: int
    probes: int

    def __call__(self, problem: Problem, tree: Tree, ask: Ask) -> Attempt:
        chains = yield ask.samples(self.chains)
        yield [
            ask.samples(self.probes, prefix=chain.tokens[:end], origin=PROBE, parent=chain.uid)
            for chain in chains
            for end in ask.texts.step_ends(chain.tokens)[:-1]
        ]


def chains_only(forest: Forest) -> list[Row]:
    """Every graded sample that is no probe."""
    return [row for row in everything(forest) if row.sample.origin != PROBE]


@dataclass(frozen=True)
class StepValues:
    """The gain in value of each step, on each of its tokens."""

    reads: tuple[Stream, ...] = ()

    def __call__(self, rows: Sequence[Row], forest: Forest, max_new_tokens: int) -> list[torch.Tensor]:
        worth: dict[int, dict[int, list[float]]] = {}  # chain -> where a step of it ends -> the probes' rewards
        for probe in (s for s in forest.samples if s.origin == PROBE):
            worth.setdefault(probe.request.parent or 0, {}).setdefault(probe.branch, []).append(probe.grade.reward)
        roots = {group: mean([rows[i].reward for i in members]) for group, members in by_group(rows).items()}
        return [self.gains(row, roots[row.group], worth.get(row.sample.uid, {})) for row in rows]

    def gains(self, row: Row, root: float, worth: dict[int, list[float]]) -> torch.Tensor:
        out, at, before = torch.zeros(len(row.tokens)), 0, root
        for end in [*sorted(worth), len(row.tokens)]:
            behind = mean(worth.get(end, [row.reward]))
            out[at:end], at, before = behind - before, end, behind
        return out


def vineppo(chains: Count = 4, probes: Count = 4) -> Method:
    """Credit by step: the gain in a Monte Carlo value.

    Args:
        chains: samples a prompt.
        probes: continuations from each step's end.
    """
    return Method(
        name="vineppo", passes=(Vine(chains, probes),), terms=(Term(select=chains_only, credit=StepValues()),)
    )
