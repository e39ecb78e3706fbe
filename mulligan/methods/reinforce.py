"""REINFORCE (Williams, 1992): ``-(r - baseline) log pi``.

Deviations: tokens share one global denominator (source: a sum over each sequence).
"""

from __future__ import annotations

from mulligan.credit import RawReward
from mulligan.method import Count, Method, Term
from mulligan.objective import Reinforce
from mulligan.rollout import fresh


def reinforce(group_size: Count = 8, baseline: float = 0.0) -> Method:
    """The reward itself as the advantage.

    Args:
        group_size: samples a prompt.
        baseline: a constant taken off every reward.
    """
    term = Term(credit=RawReward(baseline=baseline), surrogate=Reinforce())
    return Method(name="reinforce", passes=(fresh(group_size),), terms=(term,))
