"""What the verifier says of one answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Word = Literal["correct", "wrong", "unscorable"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one answer and the reason for it.

    Attributes:
        verdict: ``unscorable`` when the answer could not be judged (out of time or memory, or the worker died twice);
            such a sample is left out of its group's statistics and counted, never taken for wrong.
        seconds: wall clock from the first attempt to the verdict.
        peak_memory: of the worker in bytes, 0 where none was needed.
    """

    verdict: Word
    reason: str
    seconds: float = 0.0
    peak_memory: int = 0
