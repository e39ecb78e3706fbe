"""RLOO: REINFORCE with a leave-one-out baseline (arXiv 2402.14740).

``A_i = r_i`` minus the mean of the other rewards of its group; ``-A log pi`` without ratio or clip.

Deviations: tokens share one global denominator (paper: a sum over each sequence), so that the loss has the
scale of the other methods here.
"""

from __future__ import annotations

from mulligan.credit import LeaveOneOut
from mulligan.method import Count, Method, Term
from mulligan.objective import Reinforce
from mulligan.rollout import fresh


def rloo(group_size: Count = 8) -> Method:
    """REINFORCE, leave-one-out baseline.

    Args:
        group_size: samples a prompt; a group of one has advantage 0.
    """
    return Method(name="rloo", passes=(fresh(group_size),), terms=(Term(credit=LeaveOneOut(), surrogate=Reinforce()),))
