"""MaxRL: maximum-likelihood reinforcement learning (arXiv 2602.02710).

``A_i = (r_i - mean) / mean``, 0 where the mean is 0: with 0/1 rewards the update follows the gradient of
log pass rate in place of the pass rate, so hard prompts count more.

Deviations: tokens share one global denominator.
"""

from __future__ import annotations

from mulligan.credit import MeanNormalised
from mulligan.method import Count, Method, Term
from mulligan.objective import Reinforce
from mulligan.rollout import fresh


def maxrl(group_size: Count = 8) -> Method:
    """Advantages normalised by the group's mean reward.

    Args:
        group_size: samples a prompt.
    """
    return Method(
        name="maxrl", passes=(fresh(group_size),), terms=(Term(credit=MeanNormalised(), surrogate=Reinforce()),)
    )
