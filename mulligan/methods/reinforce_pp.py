"""REINFORCE++ with a group baseline (arXiv 2501.03262).

The reward is centred in its group and normalised over the whole batch, so that no group is blown up by a
tiny standard deviation of its own; PPO's clipped surrogate.

Deviations:
1. No KL by default (paper: k2 estimator, 0.001); ``kl`` adds the k3 estimator in the loss.
2. The batch statistics are over responses (paper: over tokens, which lets long responses count more).
"""

from __future__ import annotations

from mulligan.credit import BatchNormalised
from mulligan.method import Count, Method, NotNegative, Term
from mulligan.objective import KL, Clipped
from mulligan.rollout import fresh

PUBLISHED = {"kl": 1e-3}


def reinforce_pp(
    group_size: Count = 8, clip_low: NotNegative = 0.2, clip_high: NotNegative = 0.2, kl: NotNegative = 0.0
) -> Method:
    """Group-centred, batch-normalised advantages.

    Args:
        group_size: samples a prompt.
        clip_low: the ratio's clip range begins at 1 - clip_low.
        clip_high: it ends at 1 + clip_high.
        kl: coefficient of KL(policy, reference); 0 has no reference model at all.
    """
    term = Term(
        credit=BatchNormalised(),
        surrogate=Clipped(low=clip_low, high=clip_high),
        regularisers=(KL(coefficient=kl),) if kl else (),
    )
    return Method(name="reinforce++", passes=(fresh(group_size),), terms=(term,))
