"""PreRL, PSR-PreRL and NSR-PreRL: reinforcement of the marginal P(y) (arXiv 2604.14142).

Samples are ordinary, ``y ~ pi(.|x)``; only the update drops x: ``log P(y) = sum_t log pi(y_t | BOS, y_<t)``, first
token and EOS included, the ratio in P(y) space too. ``A = r - mean`` (no std); PSR-PreRL keeps A > 0, NSR-PreRL A < 0.

Published presets: dual clip 10 and the loss times 0.01 (release). Under AdamW that factor is no plain learning rate:
it also shifts eps and the gradient clip.

Deviations of the defaults, and of every preset from the release:
1. BOS is the tokenizer's own, or ``bos`` by name; a tokenizer without one is an error (release: the literal 151644).
2. No dual clip, and the loss as it is.
3. One token denominator for the optimizer step (release: one for each micro-batch).
4. A missing log P(y) is an error (release: the method silently switches itself off).
5. All-wrong groups have A = 0 and drop out, as published; ``credit="nsr"`` (A = +1, -1) keeps them.
"""

from __future__ import annotations

from typing import Literal

from mulligan.context import behind, nothing
from mulligan.credit import ByVerdict, Centered, Credit, OneSign
from mulligan.method import Count, Method, NotNegative, Term
from mulligan.objective import Clipped
from mulligan.rollout import fresh

PUBLISHED = {"dual_clip": 10.0, "weight": 0.01}
Kind = Literal["centered", "nsr"]


def prerl(
    group_size: Count = 8,
    credit: Kind = "centered",
    clip: NotNegative = 0.2,
    dual_clip: NotNegative = 0.0,
    weight: NotNegative = 1.0,
    bos: str = "",
) -> Method:
    """Reinforcement of P(y): the update does not see the question.

    Args:
        group_size: samples a prompt.
        credit: "centered" is r - mean; "nsr" is +1 and -1 without a baseline.
        clip: the ratio's clip range is 1 - clip to 1 + clip.
        dual_clip: bound of the loss for A < 0; 0 is off.
        weight: factor on the loss.
        bos: the token that stands for no question; empty is the tokenizer's BOS.
    """
    base: Credit = Centered() if credit == "centered" else ByVerdict(passed=1.0, failed=-1.0)
    surrogate = Clipped(low=clip, high=clip, dual=dual_clip or None)
    context = behind(bos) if bos else nothing
    term = Term(credit=base, context=context, surrogate=surrogate, weight=weight)
    return Method(name="prerl", passes=(fresh(group_size),), terms=(term,))


def psr_prerl(
    group_size: Count = 8, credit: Kind = "centered", clip: NotNegative = 0.2, weight: NotNegative = 1.0, bos: str = ""
) -> Method:
    """PreRL on A > 0 alone (published as a control: it collapses). Settings as for prerl."""
    both = prerl(group_size, credit, clip, 0.0, weight, bos)
    return both.replace(name="psr-prerl", credit=OneSign(of=both.terms[0].credit, sign="positive"))


def nsr_prerl(
    group_size: Count = 8,
    credit: Kind = "centered",
    clip: NotNegative = 0.2,
    dual_clip: NotNegative = 0.0,
    weight: NotNegative = 1.0,
    bos: str = "",
) -> Method:
    """PreRL on A < 0 alone: wrong reasoning is pruned whatever the question. Settings as for prerl."""
    both = prerl(group_size, credit, clip, dual_clip, weight, bos)
    return both.replace(name="nsr-prerl", credit=OneSign(of=both.terms[0].credit, sign="negative"))
