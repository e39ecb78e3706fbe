"""GRPO: group-relative policy optimisation (arXiv 2402.03300).

``A_i = (r_i - mean) / (std + eps)`` over the group, PPO's clipped surrogate by token, no value model.

Deviations from the paper, and why:
1. Loss over all tokens with one global denominator (paper, equation 3: a mean of per-response means, which
   pays long wrong answers less per token; arXiv 2503.20783). ``aggregation="sequence"`` gives the paper's.
2. No KL term by default (paper: 0.04 against the reference): verifiable rewards need no tether.
   ``kl`` brings it back, in the loss, against a real frozen reference.
"""

from __future__ import annotations

from typing import Literal

from mulligan.credit import ZScore
from mulligan.method import Count, Method, NotNegative, Term
from mulligan.objective import KL, Clipped, EntropyBonus, constant, sequence_mean, token_mean
from mulligan.rollout import fresh

PUBLISHED = {"group_size": 64, "aggregation": "sequence", "kl": 0.04}
AGGREGATIONS = {"token": token_mean, "sequence": sequence_mean, "constant": constant}


def grpo(
    group_size: Count = 8,
    clip_low: NotNegative = 0.2,
    clip_high: NotNegative = 0.2,
    aggregation: Literal["token", "sequence", "constant"] = "token",
    kl: NotNegative = 0.0,
    entropy_bonus: NotNegative = 0.0,
) -> Method:
    """Group-relative policy optimisation.

    Args:
        group_size: samples a prompt.
        clip_low: the ratio's clip range begins at 1 - clip_low.
        clip_high: it ends at 1 + clip_high.
        aggregation: how token losses become one number.
        kl: coefficient of KL(policy, reference), k3 estimator; 0 has no reference model at all.
        entropy_bonus: coefficient of the entropy bonus.
    """
    regularisers = (
        *((KL(coefficient=kl),) if kl else ()),
        *((EntropyBonus(coefficient=entropy_bonus),) if entropy_bonus else ()),
    )
    term = Term(
        credit=ZScore(),
        surrogate=Clipped(low=clip_low, high=clip_high),
        aggregation=AGGREGATIONS[aggregation],
        regularisers=regularisers,
    )
    return Method(name="grpo", passes=(fresh(group_size),), terms=(term,))
