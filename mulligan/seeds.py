"""Counter-based randomness: every draw is a pure function of what it is for.

No generator is advanced anywhere in Mulligan, so batch order, batch size, interleaving and
resumption cannot change a random number. A seed is 63 bits, from BLAKE2b over its labels.
"""

from __future__ import annotations

import hashlib
import random

import torch

_MASK = (1 << 63) - 1


def seed_of(*labels: str | int) -> int:
    """A 63-bit seed that depends on every label and on their order.

    Args:
        labels: for example ``(run_seed, "sample", step, problem, pass, round, attempt)``.

    >>> seed_of(0, "sample", 1) == seed_of(0, "sample", 1) != seed_of(0, "sample", 2)
    True
    """
    text = "\x1f".join(f"{type(label).__name__}:{label}" for label in labels)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") & _MASK


def rng_of(*labels: str | int) -> random.Random:
    """A fresh Python generator seeded by :func:`seed_of`."""
    return random.Random(seed_of(*labels))


def _wrap(value: int) -> int:
    """A 64-bit constant as torch stores it (int64)."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA, _M1, _M2 = (_wrap(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shift_right(x: torch.Tensor, n: int) -> torch.Tensor:
    """Logical shift of int64 (torch's ``>>`` keeps the sign)."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def uniforms(seeds: torch.Tensor, counters: torch.Tensor) -> torch.Tensor:
    """One uniform number in (0, 1) for each (seed, counter) pair, by SplitMix64.

    Args:
        seeds: int64, any shape; one for each sample.
        counters: int64, the same shape; the token's index in its response.

    Returns:
        float64 of the same shape, 52 random bits each, never 0 and never 1.
    """
    x = seeds + (counters + 1) * _GAMMA
    x = (x ^ _shift_right(x, 30)) * _M1
    x = (x ^ _shift_right(x, 27)) * _M2
    x = x ^ _shift_right(x, 31)
    return (_shift_right(x, 12).double() + 0.5) * 2.0**-52
