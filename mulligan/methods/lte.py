r"""LTE: learning to reason from trial and error (arXiv 2510.26109); LTE-dagger; GRPO-Extra, its control.

G fresh samples. If all fail, G more behind a hint made of their own wrong answers; the G' that pass take the places of
G' random failures of the same group, paired with the plain prompt. All else is GRPO:
``J = 1/Z [sum_hinted f(u) A + sum_rest clip(rho, A)]``, u = pi(o|x) / pi_start(o|hint, x), f(u) = u / (u + gamma), no
clip on hinted rows, Z all trained tokens. LTE-dagger adds an entropy bonus.

Published presets (a reconstruction: neither code nor gamma is public): any number of replacements up to G, hints of up
to G answers, gamma 0.1 (sister code), 4 updates a batch.

Deviations of the defaults:
1. At most G - 1 replacements: with all G the group would only pass and its advantage be 0 again.
2. A rescue that mentions the hint is not trained.
3. Where no failure was truncated and none gave an answer there is no hint, hence no second round.
4. ``separate`` gives hinted rows a denominator of their own, ``ratio="clipped"`` the plain clipped u in place of f.
"""

from __future__ import annotations

from typing import Literal

from mulligan.method import Count, Method, NotNegative, Positive, Term
from mulligan.objective import SAMPLED, ByOrigin, Clipped, EntropyBonus, SeparateMeans, Shaped, token_mean
from mulligan.retry import Extra, Hinted
from mulligan.rollout import fresh
from mulligan.select import SwapFailures
from mulligan.types import EXTRA, HINTED

PUBLISHED = {"most": 8}
RUN = {"optimizer.updates_per_batch": 4}


def lte(
    group_size: Count = 8,
    ratio: Literal["shaped", "clipped"] = "shaped",
    gamma: Positive = 0.1,
    most: Count | None = None,
    separate: bool = False,
    entropy_bonus: NotNegative = 0.0,
) -> Method:
    """Second tries behind a hint of the model's own wrong answers, learned without it.

    Args:
        group_size: samples a prompt, in the first and in the second round.
        ratio: of hinted rows: f(u) = u / (u + gamma), or u clipped like all others.
        gamma: of the shaped ratio.
        most: replacements in a group, at most; group_size - 1 when left out.
        separate: whether hinted rows have a token denominator of their own.
        entropy_bonus: coefficient of the entropy bonus (LTE-dagger: 0.001).
    """
    term = Term(
        select=SwapFailures(origin=HINTED, most=most),
        surrogate=ByOrigin(HINTED, Shaped(gamma) if ratio == "shaped" else Clipped(below=SAMPLED), Clipped()),
        aggregation=SeparateMeans(HINTED) if separate else token_mean,
        regularisers=(EntropyBonus(coefficient=entropy_bonus),) if entropy_bonus else (),
    )
    return Method(name="lte", passes=(fresh(group_size), Hinted(group_size)), terms=(term,))


def lte_dagger(group_size: Count = 8, gamma: Positive = 0.1, entropy_bonus: NotNegative = 1e-3) -> Method:
    """LTE with an entropy bonus. Settings as for lte."""
    return lte(group_size, "shaped", gamma, entropy_bonus=entropy_bonus).replace(name="lte-dagger")


def grpo_extra(group_size: Count = 8, most: Count | None = None) -> Method:
    """LTE without the hint: the same second round from the plain prompt. Settings as for lte."""
    select = SwapFailures(origin=EXTRA, most=most)
    return Method(name="grpo-extra", passes=(fresh(group_size), Extra(group_size)), terms=(Term(select=select),))
