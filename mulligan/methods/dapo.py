"""DAPO: decoupled clip and dynamic sampling (arXiv 2503.14476).

Clip 0.2 below and 0.28 above, one token denominator, groups that all pass or all fail are left out and
further prompts drawn until the batch is full, and a soft penalty for overlong responses.

Deviations:
1. The penalty's buffer is a share of ``max_new_tokens`` (paper: 4,096 of 20,480 tokens, the same fifth).
2. The filter reads verdicts, not shaped rewards, so that a length penalty cannot make a group "mixed".
"""

from __future__ import annotations

from mulligan.credit import Overlong, ZScore, plain
from mulligan.method import Count, Method, NotNegative, Term
from mulligan.objective import Clipped
from mulligan.rollout import fresh
from mulligan.types import Tree

PUBLISHED = {"group_size": 16}
RUN = {"optimizer.updates_per_batch": 16}


def mixed(tree: Tree) -> bool:
    """Whether some samples pass and some fail."""
    return any(s.passed for s in tree.samples) and any(s.failed for s in tree.samples)


def dapo(
    group_size: Count = 8,
    clip_low: NotNegative = 0.2,
    clip_high: NotNegative = 0.28,
    overlong_buffer: NotNegative = 0.2,
) -> Method:
    """Decoupled clip, dynamic sampling, token aggregation, soft overlong penalty.

    Args:
        group_size: samples a prompt.
        clip_low: the ratio's clip range begins at 1 - clip_low.
        clip_high: it ends at 1 + clip_high.
        overlong_buffer: the penalty starts this far before the longest response; tokens, or a share below 1; 0 is off.
    """
    reward = Overlong(buffer=overlong_buffer) if overlong_buffer else plain
    term = Term(credit=ZScore(reward=reward), surrogate=Clipped(low=clip_low, high=clip_high))
    return Method(name="dapo", passes=(fresh(group_size),), terms=(term,), keep=mixed)
