"""CISPO: clipped importance-sampling weights (arXiv 2506.13585).

``-sg(min(rho, cap)) A log pi``: the weight is clipped, the gradient never is; no token is dropped.

Deviations: the cap is a ceiling alone, as in the paper's runs (no lower clip).
"""

from __future__ import annotations

from mulligan.credit import ZScore
from mulligan.method import Count, Method, NotNegative, Term
from mulligan.objective import Cispo
from mulligan.rollout import fresh


def cispo(group_size: Count = 8, cap: NotNegative = 5.0) -> Method:
    """Clipped importance weights that keep every token's gradient.

    Args:
        group_size: samples a prompt.
        cap: the largest weight.
    """
    return Method(name="cispo", passes=(fresh(group_size),), terms=(Term(credit=ZScore(), surrogate=Cispo(cap=cap)),))
