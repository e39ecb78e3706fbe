"""From log-probs to loss: surrogate, aggregation, readout and regularisers, each on its own.

Every function here works on the trainable tokens of some rows laid end to end, N in all. Losses are
sums of ``weight * loss per token`` with weights that the aggregation fixed for the *whole* optimizer
step beforehand, so micro-batches, padding, packing and order cannot change them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch

from mulligan.errors import ContractError, UserError
from mulligan.types import Row, Stream

START = Stream(model="start")
REFERENCE = Stream(model="reference")
BEHAVIOR = Stream(model="behavior")
SAMPLED = Stream(model="start", context="sampling")  # behind what the sampler saw, a hint included


@dataclass(slots=True)
class TokenView:
    """What surrogates and regularisers see. All tensors are [N] unless said otherwise.

    ``policy_logprobs`` carry the gradient. Declared streams are read with ``view[START]``; reading one that
    was not declared is an error.
    """

    policy_logprobs: torch.Tensor
    advantages: torch.Tensor
    row: torch.Tensor  # int64, which row (0..R-1) each token is of
    rows: Sequence[Row]  # the R rows
    streams: Mapping[str, torch.Tensor]
    policy_entropy: torch.Tensor | None = None  # nats, with gradient; only when declared
    exit_probabilities: torch.Tensor | None = None  # [N, L], with gradient; only when the readout declared it
    loop_logprobs: torch.Tensor | None = None  # [loops read out, N], detached
    owner: str = "method"
    read: set[str] = field(default_factory=set)  # what was read, for the contract's check

    def __getitem__(self, stream: Stream) -> torch.Tensor:
        self.read.add(stream.name)
        if stream.name not in self.streams:
            raise ContractError(f"{self.owner}: reads '{stream.name}' but does not declare it")
        return self.streams[stream.name]

    def entropy(self) -> torch.Tensor:
        """Entropy of the policy at each token, in nats."""
        self.read.add("policy_entropy")
        if self.policy_entropy is None:
            raise ContractError(f"{self.owner}: reads 'policy_entropy' but does not declare it")
        return self.policy_entropy

    def row_mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over each row's tokens, spread over those tokens again."""
        count = torch.zeros(len(self.rows), dtype=values.dtype, device=values.device)
        count.index_add_(0, self.row, torch.ones_like(values))
        total = torch.zeros_like(count).index_add(0, self.row, values)
        return (total / count.clamp_min(1))[self.row]


class Surrogate(Protocol):
    """A loss per token [N]. ``reads`` declares the detached streams; the policy's log-probs are always there."""

    @property
    def reads(self) -> tuple[Stream, ...]: ...

    def __call__(self, view: TokenView) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Reinforce:
    """``-A log pi`` (Williams, 1992): no ratio, no clip."""

    reads: tuple[Stream, ...] = ()

    def __call__(self, view: TokenView) -> torch.Tensor:
        return -view.advantages * view.policy_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Clipped:
    """PPO's clipped surrogate (arXiv 1707.06347, equation 7), by token: ``-min(rho A, clip(rho) A)``.

    Args:
        low, high: the clip range is ``[1 - low, 1 + high]``.
        dual: dual clip (arXiv 1912.09729), above 1: for A < 0 the loss never exceeds ``-dual * A``; None is off.
        below: what the ratio is taken to; ``SAMPLED`` for rows that were drawn behind a hint.

    Raises:
        UserError: a dual clip of 1 or less.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    below: Stream = START

    def __post_init__(self) -> None:
        if self.dual is not None and not self.dual > 1:
            raise UserError(f"the dual clip is {self.dual}, but must be above 1, where the ratio begins")

    @property
    def reads(self) -> tuple[Stream, ...]:
        return (self.below,)

    def __call__(self, view: TokenView) -> torch.Tensor:
        ratio = (view.policy_logprobs - view[self.below]).exp()
        return _clip(ratio, view.advantages, self.low, self.high, self.dual)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceClipped:
    """GSPO (arXiv 2507.18071, equations 5 and 7): one ratio a sequence, ``exp(mean_t log rho_t)``."""

    low: float = 3e-4
    high: float = 4e-4
    reads: tuple[Stream, ...] = (START,)

    def __call__(self, view: TokenView) -> torch.Tensor:
        ratio = view.row_mean(view.policy_logprobs - view[START]).exp()
        return _clip(ratio, view.advantages, self.low, self.high, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cispo:
    """CISPO (arXiv 2506.13585, equation 4): ``-sg(min(rho, cap)) A log pi``; every token keeps a gradient."""

    cap: float = 5.0
    reads: tuple[Stream, ...] = (START,)

    def __call__(self, view: TokenView) -> torch.Tensor:
        ratio = (view.policy_logprobs.detach() - view[START]).exp().clamp(max=self.cap)
        return -ratio * view.advantages * view.policy_logprobs


@dataclass(frozen=True, slots=True)
class Shaped:
    """LTE's shaped ratio (arXiv 2510.26109; the form is LUFFY's, arXiv 2504.14945): ``-A u / (u + gamma)``, no clip.

    u = policy / start, the start behind the hint: what was drawn with a hint is learned without it. The slope in
    log u is ``gamma u / (u + gamma)^2``: at most 1/4, and 0.083 at u = 1 for gamma = 0.1.
    """

    gamma: float = 0.1
    reads: tuple[Stream, ...] = (SAMPLED,)

    def __call__(self, view: TokenView) -> torch.Tensor:
        ratio = (view.policy_logprobs - view[SAMPLED]).exp()
        return -view.advantages * ratio / (ratio + self.gamma)


@dataclass(frozen=True, slots=True)
class ByOrigin:
    """One surrogate for rows of some origin and another for all others."""

    origin: str
    then: Surrogate
    other: Surrogate

    @property
    def reads(self) -> tuple[Stream, ...]:
        return tuple(dict.fromkeys((*self.then.reads, *self.other.reads)))

    def __call__(self, view: TokenView) -> torch.Tensor:
        ours = torch.tensor([row.sample.origin == self.origin for row in view.rows], device=view.row.device)[view.row]
        return torch.where(ours, self.then(view), self.other(view))


def _clip(ratio: torch.Tensor, advantages: torch.Tensor, low: float, high: float, dual: float | None) -> torch.Tensor:
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if dual is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(loss, -dual * advantages), loss)


class Aggregation(Protocol):
    """The weight of every trainable token of each row, for a whole optimizer step."""

    def __call__(self, rows: Sequence[Row], max_new_tokens: int) -> list[float]: ...


def token_mean(rows: Sequence[Row], max_new_tokens: int) -> list[float]:
    """One denominator: all trainable tokens of the step (DAPO, arXiv 2503.14476, equation 8)."""
    total = sum(int(row.mask.sum()) for row in rows)
    return [1.0 / total if total else 0.0] * len(rows)


def sequence_mean(rows: Sequence[Row], max_new_tokens: int) -> list[float]:
    """The mean over rows of each row's mean (GRPO, arXiv 2402.03300, equation 3)."""
    return [1.0 / (len(rows) * max(int(row.mask.sum()), 1)) for row in rows]


@dataclass(frozen=True, slots=True)
class SeparateMeans:
    """A token denominator of its own for rows of some origin, and one for all others: few rows then weigh as much as
    many."""

    origin: str

    def __call__(self, rows: Sequence[Row], max_new_tokens: int) -> list[float]:
        parts = [[row for row in rows if (row.sample.origin == self.origin) is ours] for ours in (True, False)]
        weights = {id(row): w for part in parts for row, w in zip(part, token_mean(part, max_new_tokens), strict=True)}
        return [weights[id(row)] for row in rows]


def constant(rows: Sequence[Row], max_new_tokens: int) -> list[float]:
    """A sum over tokens divided by rows times the longest response allowed (Dr.GRPO, arXiv 2503.20783)."""
    return [1.0 / (len(rows) * max_new_tokens)] * len(rows)


Loops = tuple[int, ...] | Literal["all"] | None


class Readout(Protocol):
    """Which loops of a looped model are scored, and with what weights.

    With c_j = d loss / d log P_last(y_j), the loss that is differentiated is
    ``sum_j sum_t w_t c_j log P_t(y_j)``, so any surrogate goes through any readout unchanged.
    """

    @property
    def loops(self) -> Loops: ...  # 1-based; "all" that the model runs; None is the last loop alone

    @property
    def exits(self) -> bool: ...  # whether the weights need exit probabilities

    def weights(self, view: TokenView) -> Sequence[torch.Tensor | float]: ...  # one for each loop


@dataclass(frozen=True, slots=True)
class LastLoop:
    """The model's output as it is: for a model without loops the only choice."""

    loops: Loops = None
    exits: bool = False

    def weights(self, view: TokenView) -> Sequence[torch.Tensor | float]:
        return (1.0,)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllLoops:
    """RLTT (arXiv 2602.10520): every loop t has the weight w_t; the weights of a token sum to 1 over the L loops.

    Args:
        weighting: ``uniform`` 1/L; ``progressive`` t^power, normalised; ``exit`` the probability of leaving at t, by
            token; or L numbers, taken as they are.
        train_gate: whether exit weights pass a gradient on to the gate.
        ratio_cap: weights of loops t < L are multiplied by ``min(ratio_cap, P_t / P_L)``, detached; None is off.
        positive_only: loops t < L learn from A > 0 alone: pushed down, an early loop knows no floor.
        skip_last: the last loop has weight 0; the others keep theirs.
    """

    weighting: Literal["uniform", "progressive", "exit"] | tuple[float, ...] = "uniform"
    power: float = 1.0
    train_gate: bool = False
    ratio_cap: float | None = None
    positive_only: bool = False
    skip_last: bool = False
    loops: Loops = "all"

    @property
    def exits(self) -> bool:
        return self.weighting == "exit"

    def weights(self, view: TokenView) -> Sequence[torch.Tensor | float]:
        assert view.loop_logprobs is not None
        read = view.loop_logprobs
        out: list[torch.Tensor | float] = list(self._base(view, len(read)))
        for t in range(len(read) - 1):
            if self.ratio_cap is not None:
                out[t] = out[t] * (read[t] - read[-1]).exp().clamp(max=self.ratio_cap)
            if self.positive_only:
                out[t] = out[t] * (view.advantages > 0)
        return [*out[:-1], 0.0] if self.skip_last else out

    def _base(self, view: TokenView, loops: int) -> Sequence[torch.Tensor | float]:
        if isinstance(self.weighting, tuple):
            if len(self.weighting) != loops:
                raise ContractError(f"{view.owner}: {len(self.weighting)} weights for the {loops} loops of the model")
            return self.weighting
        if self.weighting == "exit":
            assert view.exit_probabilities is not None
            exits = view.exit_probabilities if self.train_gate else view.exit_probabilities.detach()
            return exits.unbind(1)
        powers = [(t / loops) ** (self.power if self.weighting == "progressive" else 0.0) for t in range(1, loops + 1)]
        return [p / sum(powers) for p in powers]


class Regulariser(Protocol):
    """A loss per token [N] that is added with its own coefficient, always read from the last loop."""

    @property
    def reads(self) -> tuple[Stream, ...]: ...

    @property
    def entropy(self) -> bool: ...

    def __call__(self, view: TokenView) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KL:
    """KL(policy, frozen reference), the k3 estimator ``exp(d) - d - 1`` with d = reference - policy."""

    coefficient: float
    reads: tuple[Stream, ...] = (REFERENCE,)
    entropy: bool = False

    def __call__(self, view: TokenView) -> torch.Tensor:
        difference = view[REFERENCE] - view.policy_logprobs
        return self.coefficient * (difference.exp() - difference - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyBonus:
    """``-coefficient * H``: pays for entropy."""

    coefficient: float
    reads: tuple[Stream, ...] = ()
    entropy: bool = True

    def __call__(self, view: TokenView) -> torch.Tensor:
        return -self.coefficient * view.entropy()
