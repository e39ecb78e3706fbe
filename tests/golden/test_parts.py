"""The parts of NSR, PreRL, LTE and RLTT as exact numbers."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from mulligan.credit import Advantage, ByVerdict, OneSign
from mulligan.errors import ContractError
from mulligan.objective import (
    REFERENCE,
    SAMPLED,
    START,
    AllLoops,
    ByOrigin,
    Clipped,
    Reinforce,
    SeparateMeans,
    Shaped,
    TokenView,
)
from mulligan.types import FRESH, HINTED, Row, Stream, Verdict
from tests.golden.test_losses import Case
from tests.helpers import make_forest, make_row, make_sample

# ---- credit ------------------------------------------------------------------------------------


def test_by_verdict_reads_the_verdict_and_no_reward():
    given = [(Verdict.PASS, 0.3), (Verdict.FAIL, 0.7), (Verdict.FAIL, 0.0)]
    samples = [make_sample(uid=i, verdict=verdict, reward=reward) for i, (verdict, reward) in enumerate(given)]
    rows = [make_row(sample) for sample in samples]
    assert ByVerdict(passed=0.1, failed=-1.0)(rows, make_forest(samples), 10) == [0.1, -1.0, -1.0]
    assert ByVerdict(passed=None, failed=-1.0)(rows, make_forest(samples), 10) == [None, -1.0, -1.0]
    assert ByVerdict(passed=1.0, failed=None)(rows, make_forest(samples), 10) == [1.0, None, None]


@dataclass(frozen=True)
class Given:
    values: tuple[Advantage, ...]
    reads: tuple[Stream, ...] = (REFERENCE,)

    def __call__(self, rows, forest, max_new_tokens):
        return list(self.values)


def signed(values: tuple[Advantage, ...], sign, **more) -> list:
    """As lists, so that tensors compare."""
    given = OneSign(of=Given(values), sign=sign, **more)([], make_forest(), 10)
    return [a.tolist() if isinstance(a, torch.Tensor) else a for a in given]


def test_one_sign_of_numbers():
    values = (0.75, -0.25, 0.0, None)
    assert signed(values, "positive") == [0.75, None, None, None]
    assert signed(values, "negative") == [None, -0.25, None, None]
    assert signed(values[:3], "positive", silent=True) == [0.75, 0.0, 0.0]
    assert signed(values[:3], "negative", silent=True) == [0.0, -0.25, 0.0]
    assert OneSign(of=Given(values), sign="positive").reads == (REFERENCE,)


def test_one_sign_of_tokens():
    """A row stays as long as one of its tokens has the sign."""
    values = (torch.tensor([0.5, -0.25, 0.0]), torch.tensor([-1.0, 0.0]))
    assert signed(values, "positive") == [[0.5, 0, 0], None]
    assert signed(values, "negative") == [[0, -0.25, 0], [-1, 0]]
    assert signed(values, "positive", silent=True) == [[0.5, 0, 0], [0, 0]]


# ---- surrogates --------------------------------------------------------------------------------


def both_starts() -> TokenView:
    """Two rows of two tokens, A = +2 behind a hint and A = -1 without one. policy / start behind what the sampler saw
    is 1, 1/2, 1, 2; policy / start behind the plain prompt is 1, 2, 2, 1/2. Log-probs are -1, -2 in both."""
    case = Case(((1.0, 2.0), (2.0, 0.5)), (2.0, -1.0))
    view = case.view()
    view.rows = [
        make_row(make_sample(uid=i, response=(5, 5), origin=origin), a)
        for i, (origin, a) in enumerate([(HINTED, 2.0), (FRESH, -1.0)])
    ]
    ratios = torch.tensor([1.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    view.streams = {**view.streams, SAMPLED.name: view.policy_logprobs.detach() - ratios.log()}
    return view


def losses_and_slope(part, view: TokenView) -> tuple[list[float], list[float]]:
    losses = part(view)
    (slope,) = torch.autograd.grad(losses.sum(), view.policy_logprobs)
    return losses.detach().tolist(), slope.tolist()


def test_shaped():
    # -A u / (u + gamma); slope -A gamma u / (u + gamma)^2, with u behind what the sampler saw: 1, 1/2; 1, 2.
    # gamma 1/10: u = 1: 1 / 1.1, 0.1 / 1.21; u = 1/2: 0.5 / 0.6, 0.05 / 0.36; u = 2: 2 / 2.1, 0.2 / 4.41
    losses, slope = losses_and_slope(Shaped(), both_starts())
    assert losses == pytest.approx([-2 / 1.1, -1 / 0.6, 1 / 1.1, 2 / 2.1])
    assert slope == pytest.approx([-0.2 / 1.21, -0.1 / 0.36, 0.1 / 1.21, 0.2 / 4.41])
    # gamma 1: u = 1: 1/2, 1/4 (the largest slope there is); u = 1/2: 1/3, 2/9; u = 2: 2/3, 2/9
    losses, slope = losses_and_slope(Shaped(gamma=1.0), both_starts())
    assert losses == pytest.approx([-1, -2 / 3, 1 / 2, 2 / 3])
    assert slope == pytest.approx([-1 / 2, -4 / 9, 1 / 4, 2 / 9])
    assert Shaped().reads == (SAMPLED,)


def test_clipped_below_another_stream():
    # Behind the plain prompt 1, 2; 2, 1/2, A = +2, -1: -2, -2.4; 2, 0.8. Behind what the sampler saw 1, 1/2; 1, 2:
    # -2, -1; 1, 2.
    losses, slope = losses_and_slope(Clipped(), both_starts())
    assert losses == pytest.approx([-2, -2.4, 2, 0.8])
    assert slope == pytest.approx([-2, 0, 2, 0])
    losses, slope = losses_and_slope(Clipped(below=SAMPLED), both_starts())
    assert losses == pytest.approx([-2, -1, 1, 2])
    assert slope == pytest.approx([-2, -1, 1, 2])
    assert Clipped().reads == (START,) and Clipped(below=SAMPLED).reads == (SAMPLED,)


def test_by_origin():
    # The hinted row has gamma 1's shaped loss, the fresh one the clipped loss of the ratios behind its own prompt.
    part = ByOrigin(HINTED, then=Shaped(gamma=1.0), other=Clipped())
    losses, slope = losses_and_slope(part, both_starts())
    assert losses == pytest.approx([-1, -2 / 3, 2, 0.8])
    assert slope == pytest.approx([-1 / 2, -4 / 9, 2, 0])
    losses, _ = losses_and_slope(ByOrigin(FRESH, then=Reinforce(), other=Clipped()), both_starts())
    assert losses == pytest.approx([-2, -2.4, -1, -2])  # -A log pi of the fresh one: -1 and -2
    assert part.reads == (SAMPLED, START)
    assert ByOrigin(HINTED, then=Clipped(), other=Clipped()).reads == (START,)


# ---- aggregation -------------------------------------------------------------------------------


def test_separate_means():
    def rows(*given: tuple[str, int]) -> list[Row]:
        return [make_row(make_sample(uid=i, response=(5,) * n, origin=o), 1.0) for i, (o, n) in enumerate(given)]

    # Hinted: 1 + 3 tokens; all others: 2 + 4 + 2.
    mixed = rows((HINTED, 1), (FRESH, 2), (HINTED, 3), (FRESH, 4), ("probe", 2))
    assert SeparateMeans(HINTED)(mixed, 10) == pytest.approx([1 / 4, 1 / 8, 1 / 4, 1 / 8, 1 / 8])
    assert SeparateMeans(HINTED)(mixed[1::2], 10) == pytest.approx([1 / 6, 1 / 6])
    assert SeparateMeans(HINTED)([], 10) == []


# ---- readouts ----------------------------------------------------------------------------------


def looped(**more) -> TokenView:
    """Three loops and the tokens of two rows, A = +1, +1 and -1. Beside the last loop, the first has 1/2, 3 and 1/4 of
    its probability, the second 2, 1 and 8 times."""
    view = Case(((1.0, 1.0), (1.0,)), (1.0, -1.0)).view(**more)
    shares = torch.tensor([[0.5, 3.0, 0.25], [2.0, 1.0, 8.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    view.loop_logprobs = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64) + shares.log()
    return view


def spread(readout: AllLoops, view: TokenView) -> list[list[float]]:
    """Loop by loop, the weight of each of the three tokens."""
    found = [torch.as_tensor(w, dtype=torch.float64).expand(3).tolist() for w in readout.weights(view)]
    assert len(found) == 3
    return found


@pytest.mark.parametrize(
    ("readout", "expected"),
    [
        (AllLoops(), [1 / 3, 1 / 3, 1 / 3]),
        (AllLoops(power=2.0), [1 / 3, 1 / 3, 1 / 3]),  # the power is that of progressive weights
        (AllLoops(weighting="progressive"), [1 / 6, 2 / 6, 3 / 6]),
        (AllLoops(weighting="progressive", power=2.0), [1 / 14, 4 / 14, 9 / 14]),
        (AllLoops(weighting=(0.2, 0.3, 0.7)), [0.2, 0.3, 0.7]),
        (AllLoops(weighting=(0.2, 0.3, 0.7), skip_last=True), [0.2, 0.3, 0.0]),
    ],
)
def test_loops_with_fixed_weights(readout, expected):
    assert readout.loops == "all" and not readout.exits
    assert spread(readout, looped()) == [pytest.approx([w] * 3) for w in expected]


def test_loops_by_exit_probability():
    """Each token has its own; the gate learns from them only when asked to."""
    by_token = [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.0, 0.0, 1.0]]
    exits = torch.tensor(by_token, dtype=torch.float64, requires_grad=True)
    view = looped(exit_probabilities=exits)
    readout = AllLoops(weighting="exit")
    assert readout.exits
    assert spread(readout, view) == [[0.5, 0.1, 0.0], [0.25, 0.2, 0.0], [0.25, 0.7, 1.0]]
    assert not any(w.requires_grad for w in readout.weights(view))
    trained = AllLoops(weighting="exit", train_gate=True)
    assert spread(trained, view) == spread(readout, view)
    first, *_ = trained.weights(view)
    (slope,) = torch.autograd.grad(first.sum(), exits)
    assert slope.tolist() == [[1, 0, 0]] * 3


def test_what_bounds_the_early_loops():
    # Capped at 2, the ratios to the last loop are 1/2, 2, 1/4 in the first and 2, 1, 2 in the second loop. The third
    # token's advantage is below 0.
    capped = AllLoops(weighting=(0.2, 0.3, 0.7), ratio_cap=2.0)
    expected = [[0.1, 0.4, 0.05], [0.6, 0.3, 0.6], [0.7, 0.7, 0.7]]
    assert spread(capped, looped()) == [pytest.approx(w) for w in expected]
    positive = AllLoops(weighting=(0.2, 0.3, 0.7), positive_only=True)
    assert spread(positive, looped()) == [pytest.approx(w) for w in [[0.2, 0.2, 0], [0.3, 0.3, 0], [0.7] * 3]]
    both = AllLoops(weighting=(0.2, 0.3, 0.7), ratio_cap=2.0, positive_only=True)
    expected = [[0.1, 0.4, 0], [0.6, 0.3, 0], [0.7, 0.7, 0.7]]
    assert spread(both, looped()) == [pytest.approx(w) for w in expected]
    # An advantage of 0 is not above 0; one of 1/2 is.
    view = looped()
    view.advantages = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert spread(positive, view)[0] == pytest.approx([0, 0.2, 0.2])


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(ContractError, match="mine: 2 weights for the 3 loops of the model"):
        AllLoops(weighting=(0.5, 0.5)).weights(looped(owner="mine"))
