"""VinePPO (arXiv 2410.01679): no value network; a state is worth what a few continuations from there bring.

From every step's end of every chain probes are sampled, graded and never trained. The tokens of a step get
``A = V(behind it) - V(before it)``: V is the probes' mean reward, at the prompt the chains' own (paper: probes, too).

    mulligan train --method ./examples/methods/vineppo.py:vineppo method.probes=4
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mulligan.credit import Advantage, by_group, mean
from mulligan.method import Count, Method, Term
from mulligan.rollout import Ask, Attempt
from mulligan.select import everything
from mulligan.types import Forest, Problem, Row, Stream, Tree

PROBE = "probe"


@dataclass(frozen=True)
class Vine:
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
    return [row for row in everything(forest) if row.sample.origin != PROBE]


@dataclass(frozen=True)
class StepGains:
    reads: tuple[Stream, ...] = ()

    def __call__(self, rows: Sequence[Row], forest: Forest, max_new_tokens: int) -> list[Advantage]:
        worth: dict[tuple[int | None, int], list[float]] = {}  # (chain, where a step of it ends) -> probes' rewards
        for probe in (s for s in forest.samples if s.origin == PROBE):
            worth.setdefault((probe.request.parent, probe.branch), []).append(probe.grade.reward)
        roots = {group: mean([rows[i].reward for i in members]) for group, members in by_group(rows).items()}
        out: list[Advantage] = []
        for row in rows:
            ends = [0, *sorted(end for uid, end in worth if uid == row.sample.uid), len(row.tokens)]
            values = [roots[row.group], *(mean(worth[row.sample.uid, end]) for end in ends[1:-1]), row.reward]
            out.append(torch.tensor(values).diff().repeat_interleave(torch.tensor(ends).diff()))
        return out


def vineppo(chains: Count = 4, probes: Count = 4) -> Method:
    """Credit by step: the gain in a value that probes estimate."""
    return Method(name="vineppo", passes=(Vine(chains, probes),), terms=(Term(select=chains_only, credit=StepGains()),))
