"""NSR, PSR and W-REINFORCE: negative and positive sample reinforcement (arXiv 2506.01347).

``L = lambda L_PSR + L_NSR``: correct samples with A = +1, wrong ones with A = -1, constant over tokens, no group
baseline. NSR keeps the wrong ones alone, PSR the correct ones alone, W-REINFORCE both, with lambda = 0.1.

Published presets: entropy bonus 1e-4, clip 0.2, token mean, 4 updates a batch (all from the release).

Deviations of the defaults:
1. No entropy bonus and one update a batch, so that the arms of a comparison differ in the credit alone.
2. Rows that the sign leaves out leave the denominator too, which is one for all tokens of the optimizer step.
"""

from __future__ import annotations

from mulligan.credit import ByVerdict
from mulligan.method import Count, Method, NotNegative, Term
from mulligan.objective import Clipped, EntropyBonus
from mulligan.rollout import fresh

PUBLISHED = {"entropy_bonus": 1e-4}
RUN = {"optimizer.updates_per_batch": 4}


def nsr(group_size: Count = 8, clip: NotNegative = 0.2, entropy_bonus: NotNegative = 0.0) -> Method:
    """Negative sample reinforcement: only wrong samples, A = -1.

    Args:
        group_size: samples a prompt.
        clip: the ratio's clip range is 1 - clip to 1 + clip.
        entropy_bonus: coefficient of the entropy bonus.
    """
    return _signed("nsr", None, -1.0, group_size, clip, entropy_bonus)


def psr(group_size: Count = 8, clip: NotNegative = 0.2, entropy_bonus: NotNegative = 0.0) -> Method:
    """Positive sample reinforcement: only correct samples, A = +1. Settings as for nsr."""
    return _signed("psr", 1.0, None, group_size, clip, entropy_bonus)


def w_reinforce(
    positive: NotNegative = 0.1, group_size: Count = 8, clip: NotNegative = 0.2, entropy_bonus: NotNegative = 0.0
) -> Method:
    """Weighted REINFORCE: correct samples with A = positive (the paper's lambda), wrong ones with A = -1."""
    return _signed("w-reinforce", positive, -1.0, group_size, clip, entropy_bonus)


def _signed(name: str, passed: float | None, failed: float | None, n: int, clip: float, bonus: float) -> Method:
    regularisers = (EntropyBonus(coefficient=bonus),) if bonus else ()
    credit = ByVerdict(passed=passed, failed=failed)
    term = Term(credit=credit, surrogate=Clipped(low=clip, high=clip), regularisers=regularisers)
    return Method(name=name, passes=(fresh(n),), terms=(term,))
