"""NSR, PSR and W-REINFORCE (arXiv 2506.01347) as exact numbers.

The batch, two groups: P passes, N fails, both with the ratios 0.5, 0.9, 1, 1.1, 2; S passes with two tokens of ratio 1;
D is of a group of its own in which everything fails, with three tokens of ratio 1.
"""

from __future__ import annotations

import pytest

from mulligan.methods import PRESETS
from mulligan.objective import Clipped, EntropyBonus
from mulligan.types import Verdict
from tests.golden.tables import (
    DOWN_LOSSES,
    DOWN_SLOPES,
    RATIOS,
    UP_LOSSES,
    UP_SLOPES,
    check,
    method_of,
    rows_of,
    sample_of,
    table,
    times,
)

P, N, S, D = range(4)
GROUPS = ([sample_of(P, 1.0), sample_of(N, 0.0), sample_of(S, 1.0, 2)], [sample_of(D, 0.0, 3, group=1)])


def lines(name: str, **settings):
    return table(method_of(name, **settings), *GROUPS, ratios={P: RATIOS, N: RATIOS})


def test_nsr():
    # N and D alone, A = -1 whatever the group: 5 + 3 tokens. N's losses add up to 5.8, D's to 3: 8.8 / 8.
    found = lines("nsr")
    assert set(found) == {N, D}
    check(found[N], advantage=-1, weight=1 / 8, losses=DOWN_LOSSES, slopes=DOWN_SLOPES)
    check(found[D], advantage=-1, weight=1 / 8, losses=[1] * 3, slopes=[1] * 3)
    assert sum(line.loss for line in found.values()) == pytest.approx(1.1)


def test_psr():
    # P and S alone, A = +1: 5 + 2 tokens; -4.7 - 2 over 7.
    found = lines("psr")
    assert set(found) == {P, S}
    check(found[P], advantage=1, weight=1 / 7, losses=UP_LOSSES, slopes=UP_SLOPES)
    check(found[S], advantage=1, weight=1 / 7, losses=[-1] * 2, slopes=[-1] * 2)
    assert sum(line.loss for line in found.values()) == pytest.approx(-6.7 / 7)


def test_w_reinforce():
    # All four, 15 tokens; the positive ones with A = 0.1: (0.1 * -4.7 + 5.8 + 0.1 * -2 + 3) / 15 = 8.13 / 15.
    found = lines("w-reinforce")
    check(found[P], advantage=0.1, weight=1 / 15, losses=times(0.1, UP_LOSSES), slopes=times(0.1, UP_SLOPES))
    check(found[N], advantage=-1, weight=1 / 15, losses=DOWN_LOSSES, slopes=DOWN_SLOPES)
    check(found[S], advantage=0.1, weight=1 / 15, losses=[-0.1] * 2, slopes=[-0.1] * 2)
    check(found[D], advantage=-1, weight=1 / 15, losses=[1] * 3, slopes=[1] * 3)
    assert sum(line.loss for line in found.values()) == pytest.approx(8.13 / 15)
    # lambda = 1: (-4.7 + 5.8 - 2 + 3) / 15
    assert sum(line.loss for line in lines("w-reinforce", positive=1.0).values()) == pytest.approx(2.1 / 15)


def test_the_clip_is_a_setting():
    # Clip 0.05: [0.95, 1.05]. A = -1: 0.5 and 0.9 are lifted to 0.95, slope 0; the others stay.
    found = lines("nsr", clip=0.05)
    check(found[N], advantage=-1, weight=1 / 8, losses=[0.95, 0.95, 1, 1.1, 2], slopes=[0, 0, 1, 1.1, 2])
    # A = +1: 1.1 and 2 are cut to 1.05.
    found = lines("psr", clip=0.05)
    check(found[P], advantage=1, weight=1 / 7, losses=[-0.5, -0.9, -1, -1.05, -1.05], slopes=[-0.5, -0.9, -1, 0, 0])


def test_what_the_verifier_cannot_score_is_neither_right_nor_wrong():
    unscorable = [sample_of(7, 0.0, verdict=Verdict.UNSCORABLE), sample_of(8, 0.0)]
    assert [row.sample.uid for row in rows_of(method_of("nsr"), unscorable)] == [8]
    assert rows_of(method_of("psr"), unscorable) == []


@pytest.mark.parametrize("name", ["nsr", "psr", "w-reinforce"])
def test_published_adds_an_entropy_bonus_and_updates(name):
    plain, published = method_of(name), method_of(f"{name}-published")
    assert plain.terms[0].regularisers == ()
    assert published.replace(regularisers=()) == plain
    assert published.terms[0].regularisers == (EntropyBonus(coefficient=1e-4),)
    assert published.terms[0].surrogate == Clipped(low=0.2, high=0.2)
    assert PRESETS[f"{name}-published"].run == {"optimizer.updates_per_batch": 4} and not PRESETS[name].run
