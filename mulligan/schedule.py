"""Which method runs at which step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mulligan.method import Method


@dataclass(frozen=True, slots=True)
class Schedule:
    """Phases of (steps, method); the last one's steps are None: it has no end.

    >>> # Schedule(((20, warm_up), (None, grpo))).at(20)  is grpo: exactly 20 warm-up steps, 0 to 19
    """

    phases: Sequence[tuple[int | None, Method]]

    def __post_init__(self) -> None:
        if not self.phases or self.phases[-1][0] is not None or any(not n or n < 1 for n, _ in self.phases[:-1]):
            raise ValueError("every phase but the last needs a number of steps of at least 1; the last has none (None)")

    def at(self, step: int) -> Method:
        """The method of a step (from 0)."""
        for length, method in self.phases:
            if length is None or step < length:
                return method
            step -= length
        raise AssertionError("the last phase has no end")

    @property
    def methods(self) -> list[Method]:
        return [method for _, method in self.phases]


def constant(method: Method) -> Schedule:
    """One method throughout."""
    return Schedule(((None, method),))
