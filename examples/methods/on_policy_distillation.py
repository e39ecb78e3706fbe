"""On-policy distillation (GKD, arXiv 2306.13649): a teacher grades every token of the policy's own samples.

``A_t = log teacher(y_t | x, y_<t) - log policy(y_t | x, y_<t)``, the policy's as it was when the batch began. Its mean
is minus the reverse KL, so the loss that is logged estimates KL(policy, teacher) in nats a token. No verdict is used.

    mulligan train --model pico-qwen3 --method ./examples/methods/on_policy_distillation.py:on_policy_distillation
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mulligan.credit import Advantage
from mulligan.method import Count, Method, Term
from mulligan.objective import START
from mulligan.rollout import fresh
from mulligan.types import Forest, Row, Stream

TEACHER = Stream(model="teacher")


@dataclass(frozen=True)
class ReverseKL:
    """The teacher's log-prob less the policy's, by token; detached, since streams are."""

    reads: tuple[Stream, ...] = (START, TEACHER)

    def __call__(self, rows: Sequence[Row], forest: Forest, max_new_tokens: int) -> list[Advantage]:
        return [row.streams[TEACHER.name] - row.streams[START.name] for row in rows]


def every_sample(forest: Forest) -> list[Row]:
    """Whatever the verifier says of it."""
    return [Row(sample=sample, context=(), group=sample.group) for sample in forest.samples]


def on_policy_distillation(group_size: Count = 4, teacher: str = "pico") -> Method:
    """Per-token credit from a frozen teacher.

    Args:
        group_size: samples a prompt.
        teacher: what to load, with the policy's vocabulary: a shipped model, a directory or a Hub id.
    """
    return Method(
        name="on-policy-distillation",
        passes=(fresh(group_size),),
        terms=(Term(select=every_sample, credit=ReverseKL()),),
        models={TEACHER.model: teacher},
    )
