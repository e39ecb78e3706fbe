"""GSPO: group sequence policy optimisation (arXiv 2507.18071).

One ratio a sequence, ``exp(mean_t log rho_t)``, clipped to [1 - 3e-4, 1 + 4e-4]; mean over sequences.

Deviations: none.
"""

from __future__ import annotations

from mulligan.credit import ZScore
from mulligan.method import Count, Method, NotNegative, Term
from mulligan.objective import SequenceClipped, sequence_mean
from mulligan.rollout import fresh


def gspo(group_size: Count = 8, clip_low: NotNegative = 3e-4, clip_high: NotNegative = 4e-4) -> Method:
    """Sequence-level ratios and clipping.

    Args:
        group_size: samples a prompt.
        clip_low: the sequence ratio's clip range begins at 1 - clip_low.
        clip_high: it ends at 1 + clip_high.
    """
    term = Term(credit=ZScore(), surrogate=SequenceClipped(low=clip_low, high=clip_high), aggregation=sequence_mean)
    return Method(name="gspo", passes=(fresh(group_size),), terms=(term,))
