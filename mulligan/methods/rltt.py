"""RLTT: reward latent thought trajectories, for looped language models (arXiv 2602.10520).

``L = -E[(1/G) sum_i (1/|y_i|) sum_j sum_t w_t log P_t(y_ij) A_i] + beta KL(last loop, frozen reference)``: every loop t
of the trajectory is rewarded, not only the last one, from which alone is sampled. No ratio, no clip.
In a composition it gives its readout (and its KL): ``srpo+rltt``, ``lte+rltt``.

Published preset: exit weights whose gate learns too, beta 1e-3, 2 updates a batch.

Deviations:
1. KL is to a real frozen reference (release: to the policy itself, none is registered); off by default.
2. Exit weights are detached by default (release: the reward trains the gate). ``train_gate`` brings that back.
3. ``ratio_cap`` and ``positive_only`` bound what early loops learn from wrong answers; off by default, as published.
4. The mean over tokens is each response's own, as in the paper (release: one mean for a micro-batch).
"""

from __future__ import annotations

from typing import Literal

from mulligan.errors import UserError
from mulligan.method import Count, Method, NotNegative, Term
from mulligan.objective import KL, AllLoops, Reinforce, sequence_mean
from mulligan.rollout import fresh

PUBLISHED = {"train_gate": True, "kl": 1e-3}
RUN = {"optimizer.updates_per_batch": 2}


def rltt(
    group_size: Count = 8,
    weighting: Literal["uniform", "progressive", "exit"] = "exit",
    power: NotNegative = 1.0,
    train_gate: bool = False,
    ratio_cap: NotNegative | None = None,
    positive_only: bool = False,
    kl: NotNegative = 0.0,
) -> Method:
    """Credit for every loop of a looped model.

    Args:
        group_size: samples a prompt.
        weighting: of the loops: equal, rising as loop^power, or each token's own exit probabilities.
        power: of the progressive weights.
        train_gate: whether exit weights pass a gradient on to the exit gate.
        ratio_cap: early loops t are weighted by min(ratio_cap, P_t / P_last) too.
        positive_only: early loops learn from A > 0 alone.
        kl: coefficient of KL(policy, reference).
    """
    for name, given, needs in (("train_gate", train_gate, "exit"), ("power", power != 1.0, "progressive")):
        if given and weighting != needs:
            raise UserError(f"rltt: {name} has no effect with weighting={weighting}; it is about {needs} weights")
    readout = AllLoops(
        weighting=weighting, power=power, train_gate=train_gate, ratio_cap=ratio_cap, positive_only=positive_only
    )
    regularisers = (KL(coefficient=kl),) if kl else ()
    term = Term(surrogate=Reinforce(), aggregation=sequence_mean, readout=readout, regularisers=regularisers)
    given = frozenset({"readout", "regularisers"} if kl else {"readout"})
    return Method(name="rltt", passes=(fresh(group_size),), terms=(term,), contributes=given)
