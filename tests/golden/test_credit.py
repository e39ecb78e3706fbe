"""Advantages as exact numbers: every convention that the field leaves open is pinned here."""

from __future__ import annotations

from math import sqrt

import pytest

from mulligan.credit import (
    BatchNormalised,
    Centered,
    LeaveOneOut,
    MeanNormalised,
    Overlong,
    RawReward,
    ZScore,
)
from mulligan.errors import ContractError, UserError
from mulligan.select import everything
from mulligan.types import DIAGNOSIS, Row, Verdict
from tests.helpers import make_forest, make_sample

EPS = 1e-6
CREDITS = [ZScore(), ZScore(ddof=1), Centered(), LeaveOneOut(), MeanNormalised(), BatchNormalised()]
NAMES = ["zscore", "zscore-ddof1", "centered", "leave-one-out", "mean-normalised", "batch-normalised"]


def rows_of(*groups: list[float]) -> list[Row]:
    """One row a reward; the groups' rows stand in turns, so that no credit can lean on their order."""
    longest = max(map(len, groups))
    order = [(g, k) for k in range(longest) for g in range(len(groups)) if k < len(groups[g])]
    return [
        Row(sample=make_sample(uid=i, reward=groups[g][k], group=g), context=(1,), group=g)
        for i, (g, k) in enumerate(order)
    ]


def advantages(credit, *groups: list[float]) -> list[list[float]]:
    """By group, in the order of its rewards."""
    rows = rows_of(*groups)
    given = credit(rows, make_forest([row.sample for row in rows]), 10)
    assert len(given) == len(rows)
    return [[a for a, row in zip(given, rows, strict=True) if row.group == g] for g in range(len(groups))]


def close(found, expected):
    assert [len(g) for g in found] == [len(g) for g in expected]
    for got, want in zip(found, expected, strict=True):
        assert got == pytest.approx(want, rel=1e-12, abs=1e-15)


def test_zscore():
    # [1, 0, 0, 0]: mean 1/4; variance (9 + 1 + 1 + 1) / 16 / 4 = 3/16; std = sqrt(3) / 4
    # [1, 1, 0]: mean 2/3; variance (1 + 1 + 4) / 9 / 3 = 2/9; std = sqrt(2) / 3
    # [1, 0]: mean 1/2; std 1/2
    four, three = sqrt(3) / 4 + EPS, sqrt(2) / 3 + EPS
    close(
        advantages(ZScore(), [1, 0, 0, 0], [1, 1, 0], [1, 0]),
        [
            [0.75 / four, -0.25 / four, -0.25 / four, -0.25 / four],
            [1 / 3 / three, 1 / 3 / three, -2 / 3 / three],
            [0.5 / (0.5 + EPS), -0.5 / (0.5 + EPS)],
        ],
    )


def test_zscore_with_n_minus_one():
    # [1, 0, 0, 0]: sum of squares 12/16 = 3/4, over 3: 1/4; std = 1/2
    # [1, 1, 0]: sum of squares 6/9 = 2/3, over 2: 1/3; std = 1 / sqrt(3)
    # [1, 0]: sum of squares 1/2, over 1; std = sqrt(1/2)
    close(
        advantages(ZScore(ddof=1), [1, 0, 0, 0], [1, 1, 0], [1, 0]),
        [
            [0.75 / (0.5 + EPS), *[-0.25 / (0.5 + EPS)] * 3],
            [*[1 / 3 / (1 / sqrt(3) + EPS)] * 2, -2 / 3 / (1 / sqrt(3) + EPS)],
            [0.5 / (sqrt(0.5) + EPS), -0.5 / (sqrt(0.5) + EPS)],
        ],
    )


def test_zscore_adds_eps_to_the_standard_deviation():
    # [1, 0]: (1 - 1/2) / (1/2 + 1/2) = 1/2; under a root, sqrt(1/4 + 1/2), it would be 0.577
    close(advantages(ZScore(eps=0.5), [1, 0]), [[0.5, -0.5]])
    # n - 1: 1/2 / (sqrt(1/2) + 0.1)
    close(advantages(ZScore(ddof=1, eps=0.1), [1, 0]), [[0.5 / (sqrt(0.5) + 0.1), -0.5 / (sqrt(0.5) + 0.1)]])


def test_zscore_of_shaped_rewards():
    # [1, -1, 0, 0]: mean 0; variance 2/4; std = sqrt(1/2)
    std = sqrt(0.5) + EPS
    close(advantages(ZScore(), [1, -1, 0, 0]), [[1 / std, -1 / std, 0, 0]])


def test_centered():
    # means 1/4, 2/3, 1/2; nothing is divided
    close(
        advantages(Centered(), [1, 0, 0, 0], [1, 1, 0], [1, 0]),
        [[0.75, -0.25, -0.25, -0.25], [1 / 3, 1 / 3, -2 / 3], [0.5, -0.5]],
    )


def test_leave_one_out():
    # [1, 0, 0, 0]: 1 - 0/3 = 1; 0 - 1/3
    # [1, 1, 0]: 1 - 1/2; 1 - 1/2; 0 - 2/2
    # [2, 5]: 2 - 5; 5 - 2
    close(
        advantages(LeaveOneOut(), [1, 0, 0, 0], [1, 1, 0], [2, 5]),
        [[1, -1 / 3, -1 / 3, -1 / 3], [0.5, 0.5, -1], [-3, 3]],
    )


def test_mean_normalised():
    # [1, 0, 0, 0]: mean 1/4: (3/4) / (1/4) = 3; (-1/4) / (1/4) = -1
    # [1, 1, 0]: mean 2/3: (1/3) / (2/3) = 1/2; -1
    # [0, 0]: mean 0: 0 by definition
    close(
        advantages(MeanNormalised(), [1, 0, 0, 0], [1, 1, 0], [0, 0]),
        [[3, -1, -1, -1], [0.5, 0.5, -1], [0, 0]],
    )
    with pytest.raises(ContractError, match="rewards of at least 0"):  # a negative mean would turn the signs around
        advantages(MeanNormalised(), [0.5, -1])


def test_raw_reward():
    close(advantages(RawReward(), [1, 0, 0], [0.25]), [[1, 0, 0], [0.25]])
    close(advantages(RawReward(baseline=0.5), [1, 0, 0], [0.25]), [[0.5, -0.5, -0.5], [-0.25]])


def test_batch_normalised():
    # Centred: [3/4, -1/4, -1/4, -1/4], [1/2, -1/2], [0]. Seven rows with mean 0.
    # Variance: (9/16 + 3/16 + 1/4 + 1/4 + 0) / 7 = (5/4) / 7 = 5/28.
    std = sqrt(5 / 28) + EPS
    close(
        advantages(BatchNormalised(), [1, 0, 0, 0], [1, 0], [1]),
        [[0.75 / std, *[-0.25 / std] * 3], [0.5 / std, -0.5 / std], [0]],
    )
    assert BatchNormalised()([], make_forest(), 10) == []


@pytest.mark.parametrize("credit", CREDITS, ids=NAMES)
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.3, 7.7])
def test_no_variance_is_exactly_zero(credit, reward):
    """Exactly, because a row whose advantage is 0 is not even scored; 0.1 + 0.1 + 0.1 is not 3 * 0.1."""
    for size in (1, 2, 3, 7):
        assert advantages(credit, [reward] * size) == [[0.0] * size]
        assert advantages(credit, [reward] * size, [1, 0, 0])[0] == [0.0] * size


@pytest.mark.parametrize("credit", [*CREDITS, RawReward()], ids=[*NAMES, "raw"])
def test_a_row_moved_to_another_group_counts_there(credit):
    rows = rows_of([1, 0], [0, 0])
    for row in rows:
        row.group = 5
    forest = make_forest([row.sample for row in rows])
    assert credit(rows, forest, 10) == pytest.approx(advantages(credit, [1, 0, 0, 0])[0])


def test_unscorable_and_ungraded_are_left_out():
    # Without them [1, 0]: mean 1/2. With the unscorable's reward of 0 it would be 1/3.
    samples = [
        make_sample(uid=0, reward=1.0),
        make_sample(uid=1, reward=0.0, verdict=Verdict.UNSCORABLE),
        make_sample(uid=2, reward=0.0),
        make_sample(uid=3, reward=0.0, verdict=Verdict.UNGRADED, origin="probe"),
        make_sample(uid=4, reward=1.0, verdict=Verdict.PASS, origin=DIAGNOSIS),
    ]
    forest = make_forest(samples)
    rows = everything(forest)
    assert [row.sample.uid for row in rows] == [0, 2]
    assert Centered()(rows, forest, 10) == [0.5, -0.5]


@pytest.mark.parametrize(
    ("length", "finish", "reward", "expected"),
    [
        # max 20, buffer 4: free up to 16; then (length - 16) / 4 is taken off
        (1, "stop", 1.0, 1.0),
        (16, "stop", 1.0, 1.0),
        (17, "stop", 1.0, 0.75),
        (18, "stop", 0.0, -0.5),
        (20, "stop", 1.0, 0.0),
        (20, "length", 0.0, -1.0),
        (5, "length", 0.0, -1.0),  # cut short by a limit of its own
        (23, "stop", 1.0, 0.0),  # with a re-entered prefix a response may be longer: the penalty stays at 1
    ],
)
@pytest.mark.parametrize("buffer", [4, 0.2])  # four tokens, or a fifth of 20
def test_overlong(length, finish, reward, expected, buffer):
    sample = make_sample(reward=reward, response=(5,) * length, finish=finish)
    assert Overlong(buffer=buffer)(sample, 20) == pytest.approx(expected)


def test_overlong_shapes_the_reward_of_any_credit():
    # Rewards 1 and 0; the second is 18 of 20 tokens long: 0 - 1/2. Mean 1/4, centred 3/4 and -3/4.
    samples = [make_sample(reward=1.0), make_sample(uid=1, response=(5,) * 18)]
    forest = make_forest(samples)
    assert Centered(reward=Overlong(buffer=4))(everything(forest), forest, 20) == pytest.approx([0.75, -0.75])


@pytest.mark.parametrize("buffer", [0.0, -0.5, float("nan")])
def test_overlong_refuses_a_buffer_that_would_reward_length(buffer):
    with pytest.raises(UserError, match="above 0"):
        Overlong(buffer=buffer)
