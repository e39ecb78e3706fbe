"""From log-probs to loss: surrogate, aggregation, readout and regularisers, each on its own.

Every function here works on the trainable tokens of some rows laid end to end, N in all. Losses are
sums of ``weight * loss per token`` with weights that the aggregation fixed for the *whole* optimizer
step beforehand, so micro-batches, padding, packing and order cannot change them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from mulligan.errors import ContractError
from mulligan.types import Row, Stream

START = Stream(model="start")
REFERENCE = Stream(model="reference")
BEHAVIOR = Stream(model="behavior")


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
    exit_probabilities: torch.Tensor | None = None  # [N, L]; only when the readout declared it
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
        dual: dual clip (arXiv 1912.09729): for A < 0 the loss never exceeds ``-dual * A``; None is off.
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    reads: tuple[Stream, ...] = (START,)

    def __call__(self, view: TokenView) -> torch.Tensor:
        ratio = (view.policy_logprobs - view[START]).exp()
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


def constant(rows: Sequence[Row], max_new_tokens: int) -> list[float]:
    """A sum over tokens divided by rows times the longest response allowed (Dr.GRPO, arXiv 2503.20783)."""
    return [1.0 / (len(rows) * max_new_tokens)] * len(rows)


class Readout(Protocol):
    """Which loops of a looped model are scored, and with what weights.

    With c_j = d loss / d log P_last(y_j), the loss that is differentiated is
    ``sum_j sum_t w_t c_j log P_t(y_j)``, so any surrogate goes through any readout unchanged.
    """

    @property
    def loops(self) -> tuple[int, ...] | None: ...  # 1-based; None is the last loop alone

    @property
    def exits(self) -> bool: ...  # whether the weights need exit probabilities

    def weights(self, view: TokenView) -> Sequence[torch.Tensor | float]: ...  # one for each loop


@dataclass(frozen=True, slots=True)
class LastLoop:
    """The model's output as it is: for a model without loops the only choice."""

    loops: tuple[int, ...] | None = None
    exits: bool = False

    def weights(self, view: TokenView) -> Sequence[torch.Tensor | float]:
        return (1.0,)


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
