"""Loss tables of whole methods: from graded samples through select, credit and aggregation to loss and slope.

The policy's log-probs of a row's own tokens are -1, -2, -3, ... A sample's ratios are policy / start, one for each own
token, 1 where none are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log

import pytest
import torch

from mulligan.assign import assign
from mulligan.learner.update import require
from mulligan.method import Method
from mulligan.methods import build_schedule
from mulligan.objective import SAMPLED, START, TokenView
from mulligan.types import HINTED, Row, Sample
from tests.helpers import TASK, TEXTS, make_forest, make_sample, tokens

RATIOS = (0.5, 0.9, 1.0, 1.1, 2.0)
MAX_NEW_TOKENS = 10
EPS = 1e-6  # of the z-score
PROBLEM = TASK.problem("train", 0)
HINT = TEXTS.hint(PROBLEM, ["123"])


def method_of(text: str, **settings) -> Method:
    """The method of a composition's first step."""
    return build_schedule(text, settings).schedule.at(0)


def sample_of(uid: int, reward: float, length: int = 5, **more) -> Sample:
    """A sample of the problem with the plain prompt, or behind the hint where its origin says so."""
    context = HINT if more.get("origin") == HINTED else TEXTS.prompt(PROBLEM)
    given = {"problem": PROBLEM, "context": context, "response": tokens(length, seed=uid)}
    return make_sample(uid=uid, reward=reward, **(given | more))


@dataclass
class Line:
    """One row of a table.

    Args:
        advantage: on its own tokens.
        weight: of each of its own tokens.
        losses: of its own tokens, before the weight.
        slopes: d (sum of losses) / d policy log-prob of its own tokens.
    """

    advantage: float
    weight: float
    losses: list[float]
    slopes: list[float]

    @property
    def loss(self) -> float:
        return self.weight * sum(self.losses)


def rows_of(method: Method, *trees: Sequence[Sample]) -> list[Row]:
    """The method's rows, without any stream."""
    return assign(method, make_forest(*trees), TEXTS, lambda *_: None, MAX_NEW_TOKENS)


def table(method: Method, *trees: Sequence[Sample], ratios: Mapping[int, Sequence[float]] | None = None):
    """The lines by uid. The ratio of a row that has a start behind the sampler's own context is to that one; its ratio
    to the plain start is 3 everywhere, so that taking it for the other shows."""
    (term,) = method.terms
    rows = rows_of(method, *trees)
    policy = [torch.arange(-1.0, -1.0 - int(row.mask.sum()), -1.0, dtype=torch.float64) for row in rows]
    for row, logprobs in zip(rows, policy, strict=True):
        given = (ratios or {}).get(row.sample.uid, (1.0,) * len(logprobs))
        start = torch.zeros(len(row.tokens), dtype=torch.float64)
        start[row.mask] = logprobs - torch.tensor(given, dtype=torch.float64).log()
        row.streams[START.name] = start
        if SAMPLED in term.reads and SAMPLED.name not in row.as_start:
            row.streams[SAMPLED.name] = start
            row.streams[START.name] = torch.where(row.mask, start.new_zeros(()), 0.0)
            row.streams[START.name][row.mask] = logprobs - log(3)
    leaf = torch.cat(policy).requires_grad_()
    index = torch.cat([torch.full((len(p),), i) for i, p in enumerate(policy)])
    view = TokenView(
        policy_logprobs=leaf,
        advantages=torch.cat([row.advantages[row.mask] for row in rows]).double(),
        row=index,
        rows=rows,
        streams={s.name: torch.cat([require(row, s, method.name)[row.mask] for row in rows]) for s in term.reads},
        owner=method.name,
    )
    losses = term.surrogate(view)
    (slope,) = torch.autograd.grad(losses.sum(), leaf)
    weights = [term.weight * w for w in term.aggregation(rows, MAX_NEW_TOKENS)]
    out: dict[int, Line] = {}
    for i, row in enumerate(rows):
        (advantage,) = set(row.advantages[row.mask].tolist())
        mine = index == i
        out[row.sample.uid] = Line(advantage, weights[i], losses[mine].tolist(), slope[mine].tolist())
    return out


def check(line: Line, *, advantage: float, weight: float, losses: Sequence[float], slopes: Sequence[float]) -> None:
    """A line is what was worked out by hand; rows store advantages as float32."""
    near = {"rel": 3e-7, "abs": 1e-12}
    assert line.advantage == pytest.approx(advantage, **near)
    assert line.weight == pytest.approx(weight, **near)
    assert line.losses == pytest.approx(list(losses), **near)
    assert line.slopes == pytest.approx(list(slopes), **near)


# PPO's surrogate at the ratios 0.5, 0.9, 1, 1.1, 2 for A = +1 and A = -1 with the clip range 0.8 to 1.2:
#   A = +1: -min(rho, clip(rho)): rho = 2 is cut to 1.2, and its slope -rho to 0
#   A = -1: max(rho, clip(rho)): rho = 0.5 is lifted to 0.8, and its slope rho to 0
UP_LOSSES, UP_SLOPES = (-0.5, -0.9, -1.0, -1.1, -1.2), (-0.5, -0.9, -1.0, -1.1, 0.0)
DOWN_LOSSES, DOWN_SLOPES = (0.8, 0.9, 1.0, 1.1, 2.0), (0.0, 0.9, 1.0, 1.1, 2.0)


def times(factor: float, values: Sequence[float]) -> list[float]:
    return [factor * v for v in values]
