"""Dr.GRPO: GRPO done right (arXiv 2503.20783).

``A_i = r_i - mean``: no division by the standard deviation (it favours prompts that are nearly solved or
nearly hopeless), and a constant denominator (a per-response mean favours long wrong answers).

Deviations: none in the objective; the constant is the run's ``max_new_tokens``.
"""

from __future__ import annotations

from mulligan.credit import Centered
from mulligan.method import Count, Method, NotNegative, Term
from mulligan.objective import Clipped, constant
from mulligan.rollout import fresh


def dr_grpo(group_size: Count = 8, clip_low: NotNegative = 0.2, clip_high: NotNegative = 0.2) -> Method:
    """GRPO without its length and difficulty biases.

    Args:
        group_size: samples a prompt.
        clip_low: the ratio's clip range begins at 1 - clip_low.
        clip_high: it ends at 1 + clip_high.
    """
    term = Term(credit=Centered(), surrogate=Clipped(low=clip_low, high=clip_high), aggregation=constant)
    return Method(name="dr-grpo", passes=(fresh(group_size),), terms=(term,))
