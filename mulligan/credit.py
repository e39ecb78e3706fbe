"""Where credit goes: from verdicts, rewards and streams to an advantage per token.

A credit gets the selected rows and the whole forest, and returns for each row a number (the same on all
its own tokens), a tensor of T numbers, or None, which leaves the row out of loss and denominator. A row
with advantage 0 stays in the denominator.

Conventions, pinned by golden tables: population standard deviation, eps 1e-6; a group of one has
advantage 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal, Protocol

import torch

from mulligan.errors import ContractError, UserError
from mulligan.types import Forest, Row, Sample, Stream

Advantage = float | torch.Tensor | None
Shape = Callable[[Sample, int], float]  # (sample, the run's max_new_tokens) -> reward


class Credit(Protocol):
    """``reads`` declares the detached streams that it needs in ``row.streams``."""

    @property
    def reads(self) -> tuple[Stream, ...]: ...

    def __call__(self, rows: Sequence[Row], forest: Forest, max_new_tokens: int) -> Sequence[Advantage]: ...


def plain(sample: Sample, max_new_tokens: int) -> float:
    """The verifier's reward as it is."""
    return sample.grade.reward


@dataclass(frozen=True, slots=True)
class Overlong:
    """DAPO's soft overlong penalty (arXiv 2503.14476, equation 13): 0 up to ``max_new_tokens - buffer``,
    falling to -1 at ``max_new_tokens``; a truncated response gets -1.

    Args:
        buffer: tokens, or a share of ``max_new_tokens`` when below 1.

    Raises:
        UserError: a buffer that is not above 0.
    """

    buffer: float = 0.2

    def __post_init__(self) -> None:
        if not self.buffer > 0:
            raise UserError(f"the overlong penalty's buffer is {self.buffer}, but must be above 0")

    def __call__(self, sample: Sample, max_new_tokens: int) -> float:
        buffer = self.buffer if self.buffer >= 1 else self.buffer * max_new_tokens
        over = len(sample.tokens) - (max_new_tokens - buffer)
        penalty = -1.0 if sample.truncated else -min(max(over / buffer, 0.0), 1.0)
        return sample.grade.reward + penalty


def by_group(rows: Sequence[Row]) -> dict[int, list[int]]:
    """Indices of the rows of each group, in order."""
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.group, []).append(index)
    return groups


def mean(values: Sequence[float]) -> float:
    """The mean; never outside of the values, so that rounding gives equal rewards no deviation from it."""
    return min(max(sum(values) / len(values), min(values)), max(values))


def deviation(values: Sequence[float], ddof: int = 0) -> float:
    """Standard deviation with n - ddof; 0 for fewer than ddof + 1 values."""
    if len(values) <= ddof:
        return 0.0
    centre = mean(values)
    return sqrt(sum((v - centre) ** 2 for v in values) / (len(values) - ddof))


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupCredit:
    """Base of the credits that need only the rewards of the row's own group."""

    reward: Shape = plain

    @property
    def reads(self) -> tuple[Stream, ...]:
        return ()

    def of_group(self, rewards: list[float]) -> list[float]:
        """The advantages of one group's rewards."""
        raise NotImplementedError

    def __call__(self, rows: Sequence[Row], forest: Forest, max_new_tokens: int) -> list[Advantage]:
        out: list[Advantage] = [None] * len(rows)
        for members in by_group(rows).values():
            advantages = self.of_group([self.reward(rows[i].sample, max_new_tokens) for i in members])
            for index, advantage in zip(members, advantages, strict=True):
                out[index] = advantage
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class ZScore(GroupCredit):
    """GRPO (arXiv 2402.03300, section 4.1): ``(r - mean) / (std + eps)``; ``ddof=1`` divides by n - 1."""

    ddof: int = 0
    eps: float = 1e-6

    def of_group(self, rewards: list[float]) -> list[float]:
        centre, scale = mean(rewards), deviation(rewards, self.ddof) + self.eps
        return [(r - centre) / scale for r in rewards]


@dataclass(frozen=True, slots=True, kw_only=True)
class Centered(GroupCredit):
    """Dr.GRPO (arXiv 2503.20783): ``r - mean``, no division."""

    def of_group(self, rewards: list[float]) -> list[float]:
        centre = mean(rewards)
        return [r - centre for r in rewards]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveOneOut(GroupCredit):
    """RLOO (arXiv 2402.14740): ``r`` minus the mean of the others."""

    def of_group(self, rewards: list[float]) -> list[float]:
        n, centre = len(rewards), mean(rewards)
        return [(r - centre) * n / (n - 1) for r in rewards] if n > 1 else [0.0]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanNormalised(GroupCredit):
    """MaxRL (arXiv 2602.02710): ``(r - mean) / mean``, 0 where the mean is 0.

    Raises:
        ContractError: a reward below 0: a negative mean would turn every sign around.
    """

    def of_group(self, rewards: list[float]) -> list[float]:
        if min(rewards) < 0:
            raise ContractError(f"MeanNormalised needs rewards of at least 0, but got {min(rewards)}")
        centre = mean(rewards)
        return [(r - centre) / centre if centre else 0.0 for r in rewards]


@dataclass(frozen=True, slots=True, kw_only=True)
class RawReward(GroupCredit):
    """REINFORCE (Williams, 1992): the reward itself, less a constant."""

    baseline: float = 0.0

    def of_group(self, rewards: list[float]) -> list[float]:
        return [r - self.baseline for r in rewards]


@dataclass(frozen=True, slots=True, kw_only=True)
class ByVerdict:
    """A constant for passing and one for failing samples, no baseline (NSR and PSR, arXiv 2506.01347); None leaves
    such rows out of loss and denominator."""

    passed: float | None
    failed: float | None
    reads: tuple[Stream, ...] = ()

    def __call__(self, rows: Sequence[Row], forest: Forest, max_new_tokens: int) -> list[Advantage]:
        return [self.passed if row.sample.passed else self.failed for row in rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class OneSign:
    """Another credit's advantages of one sign (PreRL, arXiv 2604.14142); the other rows, those at 0 among them, leave
    loss and denominator, or stay in both with advantage 0 when ``silent``."""

    of: Credit
    sign: Literal["positive", "negative"]
    silent: bool = False

    @property
    def reads(self) -> tuple[Stream, ...]:
        return self.of.reads

    def __call__(self, rows: Sequence[Row], forest: Forest, max_new_tokens: int) -> list[Advantage]:
        factor, dropped = (1.0 if self.sign == "positive" else -1.0), 0.0 if self.silent else None
        out: list[Advantage] = []
        for advantage in self.of(rows, forest, max_new_tokens):
            if isinstance(advantage, torch.Tensor):
                kept = torch.where(advantage * factor > 0, advantage, 0.0)
                out.append(kept if self.silent or bool(kept.any()) else None)
            elif advantage is None:  # left out already
                out.append(None)
            else:
                out.append(advantage if advantage * factor > 0 else dropped)
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchNormalised(GroupCredit):
    """REINFORCE++ with group baseline (arXiv 2501.03262): centred in the group, then divided by the
    standard deviation over all rows of the batch."""

    eps: float = 1e-6

    def of_group(self, rewards: list[float]) -> list[float]:
        centre = mean(rewards)
        return [r - centre for r in rewards]

    def __call__(self, rows: Sequence[Row], forest: Forest, max_new_tokens: int) -> list[Advantage]:
        centred = [float(a) for a in GroupCredit.__call__(self, rows, forest, max_new_tokens) if a is not None]
        # The batch's mean is 0 already; taking it off again would only add rounding to groups without variance.
        scale = deviation(centred) + self.eps if centred else 1.0
        return [a / scale for a in centred]
