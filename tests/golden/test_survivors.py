"""Exact numbers for what the mutation run (tests/mutation/run.py) once found untested: defaults, bounds, odd signs."""

from __future__ import annotations

from math import sqrt

import pytest

from mulligan.credit import Overlong, deviation
from mulligan.errors import UserError
from mulligan.objective import Cispo, Clipped, SequenceClipped
from tests.golden.test_losses import Case, token_losses
from tests.helpers import make_sample


@pytest.mark.parametrize(
    ("buffer", "expected"),
    [
        # A response of 19 tokens with at most 20.
        (None, -0.75),  # the default is a fifth of 20, 4 tokens: free up to 16, (19 - 16) / 4
        (2.0, -0.5),  # free up to 18, (19 - 18) / 2
        (1.5, -1 / 3),  # tokens, not a share: free up to 18.5, (19 - 18.5) / 1.5
        (1.0, 0.0),  # one token, not the whole length: free up to 19
        (0.5, -0.9),  # half of 20: free up to 10, (19 - 10) / 10
    ],
)
def test_an_overlong_buffer_of_1_or_more_is_tokens(buffer, expected):
    penalty = Overlong() if buffer is None else Overlong(buffer=buffer)
    assert penalty(make_sample(response=(5,) * 19), 20) == pytest.approx(expected)


def test_deviation_of_few_values_is_zero():
    assert deviation([]) == deviation([3.0]) == 0.0
    assert deviation([], 1) == deviation([3.0], 1) == 0.0
    # [3, 5]: centre 4; (1 + 1) / 2 = 1; n - 1: (1 + 1) / 1 = 2
    assert deviation([3.0, 5.0]) == 1.0
    assert deviation([3.0, 5.0], 1) == sqrt(2)


def test_dual_clip_at_other_advantages_than_one():
    # Dual clip 3, ratios 2 and 4. A = -1/2: the loss -rho A is 1 and 2, at most 3/2: 1 and 3/2, slopes 1 and 0.
    # A = +1/2 knows no dual clip: -min(2, 1.2) / 2 = -0.6, slope 0. A = 0: no loss.
    case = Case(((2.0, 4.0),) * 3, (-0.5, 0.5, 0.0))
    losses, slope = token_losses(Clipped(dual=3.0), case)
    assert losses == pytest.approx([1, 1.5, -0.6, -0.6, 0, 0])
    assert slope == pytest.approx([1, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("dual", [1.0, 0.0, -3.0, float("nan")])
def test_a_dual_clip_begins_above_one(dual):
    """At 1 it would bind on-policy already."""
    with pytest.raises(UserError, match=r"dual clip is .*, but must be above 1"):
        Clipped(dual=dual)
    assert Clipped(dual=1.01).dual == 1.01


def test_defaults_of_the_parts_themselves():
    # GSPO clips to [1 - 3e-4, 1 + 4e-4]: A = +1 at rho = 2, A = -1 at rho = 1/2.
    losses, _ = token_losses(SequenceClipped(), Case(((2.0,), (0.5,)), (1.0, -1.0)))
    assert losses == pytest.approx([-1.0004, 0.9997], rel=1e-9)
    # CISPO caps at 5: rho = 4 and 8, A = 1, log pi = -1 and -2.
    losses, slope = token_losses(Cispo(), Case(((4.0, 8.0),), (1.0,)))
    assert losses == pytest.approx([4, 10])
    assert slope == pytest.approx([-4, -5])
