"""maj@k: how often a majority vote over k samples is right, in closed form.

Self-consistency (arXiv 2203.11171) samples k responses and gives the answer that most of them have. Its accuracy is
estimated from n >= k samples as pass@k is: as the expectation over all subsets of k, which needs no subset to be drawn.
A tie is broken by lot among its answers, and the expectation over that lot is taken too, so nothing depends on the
order of the samples. A response without an answer has no vote; where nobody votes nothing is right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, lgamma, log

import numpy as np

from mulligan.errors import UserError


@dataclass(frozen=True, slots=True)
class Tally:
    """The votes on one problem.

    Attributes:
        answers: (votes, passed) of each distinct answer: how many samples gave it, and how many of these passed. A
            verifier that is of one mind gives 0 or all of them.
        silent: samples without an answer.
    """

    answers: tuple[tuple[int, int], ...]
    silent: int

    @property
    def samples(self) -> int:
        return sum(votes for votes, _ in self.answers) + self.silent


def tally(samples: Sequence[tuple[str | None, bool]], same: Callable[[str, str], bool]) -> Tally:
    """Counts votes.

    Args:
        samples: (answer, passed) of each.
        same: whether two answers are one; an answer joins the first one seen that it is the same as.
    """
    texts: dict[str, list[int]] = {}  # equal texts first: `same` may be slow
    for answer, passed in samples:
        if answer is not None:
            votes = texts.setdefault(answer, [0, 0])
            votes[0] += 1
            votes[1] += passed
    found: dict[str, list[int]] = {}
    for answer, (votes, passed) in texts.items():
        mine = found.setdefault(next((other for other in found if same(other, answer)), answer), [0, 0])
        mine[0] += votes
        mine[1] += passed
    silent = sum(answer is None for answer, _ in samples)
    return Tally(tuple(sorted((votes, passed) for votes, passed in found.values())), silent)


def majority_at_k(votes: Tally, k: int) -> float:
    """The chance that the winner of the vote of k of the samples, drawn without replacement, is right.

    With two right, one wrong and one silent sample and k = 2 there are 6 pairs: the right answer wins 3 of them (both
    right; twice one right and one silent), ties in 2 (half of each counts) and loses 1.

    >>> round(majority_at_k(Tally(((1, 0), (2, 2)), silent=1), 2), 12) == round(4 / 6, 12)
    True

    Raises:
        UserError: fewer than k samples.
    """
    if not 1 <= k <= votes.samples:
        raise UserError(f"maj@{k} needs at least {k} samples a problem; there are {votes.samples}")
    total = 0.0
    for at, (own, passed) in enumerate(votes.answers):
        if passed:
            others = tuple(n for other, (n, _) in enumerate(votes.answers) if other != at)
            total += passed / own * _wins(own, others, votes.silent, k)
    return round(total, 12)  # beyond lies what log-factorials cost


@lru_cache(maxsize=65536)
def _wins(own: int, others: tuple[int, ...], silent: int, k: int) -> float:
    """The chance that an answer with ``own`` votes wins among k samples, its share of ties included.

    For each number j of its votes in the subset: the coefficient of x^(k-j) in a product of polynomials over the other
    answers, each cut off above x^j, counts the subsets in which none has more; ties (answers that have j as well) are
    kept apart in rows. Binomial probabilities stand for binomial coefficients, which would overflow: the factors p^k
    and (1-p)^(n-k) are those of all terms alike, and fall out of the quotient.
    """
    n = own + sum(others) + silent
    p = k / (n + 1)  # puts the mass where the coefficient is read
    won = 0.0
    for j in range(1, min(own, k) + 1):
        rest = k - j
        # Answers that cannot reach j votes may take any number.
        product = _binomial(silent + sum(m for m in others if m < j), p)[None, : rest + 1]
        for m in others:
            if m >= j:
                product = _times(product, _binomial(m, p), j, rest)
        if product.shape[1] > rest:
            won += _binomial(own, p)[j] * sum(row[rest] / (ties + 1) for ties, row in enumerate(product))
    return float(won / _binomial(n, p)[k])


def _times(product: np.ndarray, votes: np.ndarray, j: int, rest: int) -> np.ndarray:
    """[ties, degree] times the polynomial of one more answer, which has fewer than j votes, or j and is a tie."""
    ties, width = product.shape
    out = np.zeros((ties + 1, min(width + j, rest + 1)))
    for row in range(ties):
        free = np.convolve(product[row], votes[:j])[: out.shape[1]]
        out[row, : len(free)] += free
        level = product[row, : max(out.shape[1] - j, 0)] * votes[j]
        out[row + 1, j : j + len(level)] += level
    return out[: rest // j + 1]


@lru_cache(maxsize=4096)
def _binomial(n: int, p: float) -> np.ndarray:
    """The probabilities of 0..n successes in n trials."""
    return np.array(
        [
            exp(lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) + i * log(p) + (n - i) * log(1 - p))
            for i in range(n + 1)
        ]
    )
