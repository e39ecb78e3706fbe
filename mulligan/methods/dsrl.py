"""DSRL: dual space reinforcement learning, PreRL first, then RL (arXiv 2604.14142).

S steps of NSR-PreRL, then another method in the same run ("policy reincarnation"); published S: 10 to 25, script 20.
``dsrl(m, steps=S)`` warms up on m's own fresh samples and hands over to m; ``dsrl`` alone is dsrl(grpo).

Deviations from the release:
1. S is S (``step < 20`` with steps from 1 is 19 updates).
2. A warm-up step computes nothing of the later method: no prompt token, no correct sample is forwarded (release: the
   RL forward and backward run, times zero, and log P(y) in every step of the run).
3. See prerl for the rest; ``dsrl-published`` has its dual clip and factor.
"""

from __future__ import annotations

from mulligan.errors import UserError
from mulligan.method import Count, Method, NotNegative
from mulligan.methods.grpo import grpo
from mulligan.methods.prerl import Kind, nsr_prerl
from mulligan.rollout import Fresh
from mulligan.schedule import Schedule

PUBLISHED = {"dual_clip": 10.0, "weight": 0.01}
RUN = {"optimizer.weight_decay": 0.01, "optimizer.betas": [0.9, 0.999], "optimizer.clip_norm": 1.0}


def dsrl(
    method: Method | None = None,
    steps: Count = 20,
    credit: Kind = "centered",
    clip: NotNegative = 0.2,
    dual_clip: NotNegative = 0.0,
    weight: NotNegative = 1.0,
    bos: str = "",
) -> Schedule:
    """NSR-PreRL for some steps, then another method.

    Args:
        method: what follows; grpo when left out.
        steps: batches of the warm-up; each is one update unless optimizer.updates_per_batch says otherwise.
        credit, clip, dual_clip, weight, bos: the warm-up's, as for nsr-prerl.
    """
    after = grpo() if method is None else method
    own = tuple(p for p in after.passes if isinstance(p, Fresh))
    if not own:
        raise UserError(f"dsrl: {after.name} draws no fresh samples to warm up on")
    warm_up = nsr_prerl(own[0].n, credit, clip, dual_clip, weight, bos)
    return Schedule(((steps, warm_up.replace(passes=own)), (None, after)))
