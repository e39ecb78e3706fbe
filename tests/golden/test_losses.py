"""Loss and slope of every family member as exact numbers.

The batch: row P with A = +2 and row N with A = -1, each with the ratios 0.5, 0.9, 1, 1.1, 2, and row S with
A = +1 and the ratios 1, 1. So N = 12 tokens in R = 3 rows; ``max_new_tokens`` is 10. The policy's log-probs
are -1, -2, -3, -4, -5 in P and N, and -1, -2 in S.

A table holds for each token the loss before its weight, and d loss / d policy log-prob. With
rho = exp(policy - start), d rho / d policy = rho; a slope is 0 where the clipped branch is the smaller one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

import pytest
import torch

from mulligan.errors import ContractError
from mulligan.methods import build_schedule
from mulligan.objective import (
    KL,
    REFERENCE,
    START,
    Cispo,
    Clipped,
    EntropyBonus,
    SequenceClipped,
    TokenView,
    constant,
    sequence_mean,
    token_mean,
)
from mulligan.types import Row
from tests.helpers import make_row, make_sample

RATIOS = (0.5, 0.9, 1.0, 1.1, 2.0)
MAX_NEW_TOKENS = 10


@dataclass
class Case:
    """Rows with the ratios and log-probs of their tokens."""

    ratios: tuple[tuple[float, ...], ...] = (RATIOS, RATIOS, (1.0, 1.0))
    advantages: tuple[float, ...] = (2.0, -1.0, 1.0)

    @property
    def rows(self) -> list[Row]:
        return [
            make_row(make_sample(uid=i, response=(5,) * len(r)), a)
            for i, (r, a) in enumerate(zip(self.ratios, self.advantages, strict=True))
        ]

    def view(self, **more) -> TokenView:
        rows = self.rows
        policy = torch.tensor([-(t + 1.0) for r in self.ratios for t in range(len(r))], dtype=torch.float64)
        ratios = torch.tensor([x for r in self.ratios for x in r], dtype=torch.float64)
        return TokenView(
            policy_logprobs=policy.requires_grad_(),
            advantages=torch.cat([row.advantages for row in rows]).double(),
            row=torch.cat([torch.full((len(r),), i) for i, r in enumerate(self.ratios)]),
            rows=rows,
            streams={START.name: policy.detach() - ratios.log()},
            **more,
        )


def token_losses(part, case: Case) -> tuple[list[float], list[float]]:
    """Of each token: the loss before its weight, and the slope of their plain sum."""
    view = case.view()
    losses = part(view)
    (slope,) = torch.autograd.grad(losses.sum(), view.policy_logprobs)
    return losses.detach().tolist(), slope.tolist()


def of_method(name: str, case: Case, **settings) -> tuple[float, list[float]]:
    """Loss and slopes of a preset's only term on these advantages, weights included."""
    schedule = build_schedule(name, settings).schedule
    (term,) = schedule.at(0).terms
    view = case.view()
    assert term.weight == 1 and not term.regularisers and term.readout.loops is None
    weights = torch.tensor(term.aggregation(view.rows, MAX_NEW_TOKENS), dtype=torch.float64)[view.row]
    loss = (weights * term.surrogate(view)).sum()
    (slope,) = torch.autograd.grad(loss, view.policy_logprobs)
    return loss.detach().item(), slope.tolist()


def over(denominator: float, *values: float) -> list[float]:
    return [v / denominator for v in values]


# PPO's surrogate, -min(rho A, clip(rho, 0.8, 1.2) A):
#   P, A = +2:  rho    0.5        0.9   1     1.1   2
#        rho A         1          1.8   2     2.2   4
#        clipped A     1.6        1.8   2     2.2   2.4
#        loss          -1         -1.8  -2    -2.2  -2.4    (sum -9.4)
#        slope -rho A  -1         -1.8  -2    -2.2  0
#   N, A = -1:
#        rho A         -0.5       -0.9  -1    -1.1  -2
#        clipped A     -0.8       -0.9  -1    -1.1  -1.2
#        loss          0.8        0.9   1     1.1   2       (sum 5.8)
#        slope         0          0.9   1     1.1   2
#   S, A = +1: loss -1, -1 (sum -2); slope -1, -1
PPO_LOSS = [-1, -1.8, -2, -2.2, -2.4, 0.8, 0.9, 1, 1.1, 2, -1, -1]
PPO_SLOPE = [-1, -1.8, -2, -2.2, 0, 0, 0.9, 1, 1.1, 2, -1, -1]


def test_clipped_by_token():
    losses, slope = token_losses(Clipped(), Case())
    assert losses == pytest.approx(PPO_LOSS)
    assert slope == pytest.approx(PPO_SLOPE)


def test_dual_clip():
    # Dual clip 1.5 caps the loss of A < 0 at 1.5 * 1: only N's rho = 2 is above (2 becomes 1.5, slope 0). A > 0
    # is as before. With 10 nothing of this batch is capped.
    losses, slope = token_losses(Clipped(dual=1.5), Case())
    assert losses == pytest.approx([*PPO_LOSS[:9], 1.5, -1, -1])
    assert slope == pytest.approx([*PPO_SLOPE[:9], 0, -1, -1])
    losses, slope = token_losses(Clipped(dual=10.0), Case())
    assert losses == pytest.approx(PPO_LOSS)
    assert slope == pytest.approx(PPO_SLOPE)


def test_grpo():
    # Twelve tokens, one denominator: (-9.4 + 5.8 - 2) / 12
    loss, slope = of_method("grpo", Case())
    assert loss == pytest.approx(-5.6 / 12)
    assert slope == pytest.approx(over(12, *PPO_SLOPE))


def test_grpo_with_the_papers_sequence_mean():
    # (-9.4 / 5 + 5.8 / 5 - 2 / 2) / 3 = (-1.88 + 1.16 - 1) / 3; weights 1/15 in P and N, 1/6 in S
    loss, slope = of_method("grpo", Case(), aggregation="sequence")
    assert loss == pytest.approx(-1.72 / 3)
    assert slope == pytest.approx([*over(15, *PPO_SLOPE[:10]), *over(6, -1, -1)])


def test_dr_grpo():
    # 3 rows of at most 10 tokens: -5.6 / 30
    loss, slope = of_method("dr-grpo", Case())
    assert loss == pytest.approx(-5.6 / 30)
    assert slope == pytest.approx(over(30, *PPO_SLOPE))


def test_dapo():
    # Clip-higher, 1.28: only P's rho = 2 changes, from -2.4 to -2.56. (-9.56 + 5.8 - 2) / 12
    loss, slope = of_method("dapo", Case())
    assert loss == pytest.approx(-5.76 / 12)
    assert slope == pytest.approx(over(12, *PPO_SLOPE))


def test_dapo_takes_gradient_up_to_its_higher_clip():
    # rho = 1.25, A = 1: within 1.28 (loss -1.25, slope -1.25), beyond GRPO's 1.2 (loss -1.2, slope 0)
    case = Case(ratios=((1.25,),), advantages=(1.0,))
    assert of_method("dapo", case) == (pytest.approx(-1.25), pytest.approx([-1.25]))
    assert of_method("grpo", case) == (pytest.approx(-1.2), pytest.approx([0]))


def test_reinforce_pp():
    loss, slope = of_method("reinforce++", Case())
    assert loss == pytest.approx(-5.6 / 12)
    assert slope == pytest.approx(over(12, *PPO_SLOPE))


def test_gspo():
    # P and N: s = (0.5 * 0.9 * 1 * 1.1 * 2) ** (1/5) = 0.99 ** 0.2 = 0.99799, below 1 - 3e-4.
    #   P, A = +2: min(2 s, 2 * 0.9997) = 2 s, not clipped: loss -2 s; slope of the row's loss by each of its five
    #              log-probs: -2 s / 5
    #   N, A = -1: min(-s, -0.9997) = -0.9997: loss 0.9997, slope 0
    #   S, A = +1: s = 1: loss -1, slope -1 / 2
    # Mean over the three rows.
    s = 0.99**0.2
    loss, slope = of_method("gspo", Case())
    assert loss == pytest.approx((-2 * s + 0.9997 - 1) / 3)
    assert slope == pytest.approx([*[-2 * s / 15] * 5, *[0] * 5, -1 / 6, -1 / 6])


def test_gspo_on_rows_of_one_ratio():
    # Two tokens a row, so the row's ratio is theirs. Clip [0.9997, 1.0004].
    #   A = +2: 0.5, 0.9, 1: unclipped, losses -1, -1.8, -2; 1.1 and 2: clipped, -2 * 1.0004, slope 0
    #   A = -1: 0.5 and 0.9: clipped, 0.9997, slope 0; 1, 1.1, 2: unclipped, losses 1, 1.1, 2
    # Ten rows; each of a row's two tokens has half of its slope, -A s / 2 / 10.
    case = Case(ratios=tuple((r, r) for r in RATIOS * 2), advantages=(2.0,) * 5 + (-1.0,) * 5)
    loss, slope = of_method("gspo", case)
    assert loss == pytest.approx((-1 - 1.8 - 2 - 2 * 2.0008 + 2 * 0.9997 + 1 + 1.1 + 2) / 10)
    by_row = [-1, -1.8, -2, 0, 0, 0, 0, 1, 1.1, 2]
    assert slope == pytest.approx([v / 20 for v in by_row for _ in range(2)])


def test_gspo_ratio_is_the_geometric_mean_of_its_own_row():
    # Rows (2, 0.5) and (4,): geometric means 1 and 4; A = -1, wide clip: losses 1, 1 and 4
    case = Case(ratios=((2.0, 0.5), (4.0,)), advantages=(-1.0, -1.0))
    losses, slope = token_losses(SequenceClipped(low=0.9, high=9.0), case)
    assert losses == pytest.approx([1, 1, 4])
    # Of the plain sum over tokens: the first row's loss counts twice, half of it by each log-prob: 1, 1; then 4.
    assert slope == pytest.approx([1, 1, 4])


# CISPO, -sg(min(rho, cap)) A log pi; the slope is -min(rho, cap) A.
#   P, A = +2: 2 rho |log pi|: 1 * 1, 1.8 * 2, 2 * 3, 2.2 * 4, 4 * 5      = 1, 3.6, 6, 8.8, 20    (sum 39.4)
#   N, A = -1: the same by -1/2                                           = -0.5, -1.8, -3, -4.4, -10  (-19.7)
#   S, A = +1: 1 * 1, 1 * 2                                               = 1, 2   (3)
def test_cispo():
    losses, slope = token_losses(Cispo(), Case())
    assert losses == pytest.approx([1, 3.6, 6, 8.8, 20, -0.5, -1.8, -3, -4.4, -10, 1, 2])
    assert slope == pytest.approx([-1, -1.8, -2, -2.2, -4, 0.5, 0.9, 1, 1.1, 2, -1, -1])
    loss, weighted = of_method("cispo", Case())
    assert loss == pytest.approx(22.7 / 12)
    assert weighted == pytest.approx(over(12, *slope))


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    # cap 1.5: at rho = 2 the weight is 1.5: P 1.5 * 2 * 5 = 15, slope -3; N -1.5 * 5 = -7.5, slope 1.5.
    # Sum 22.7 - 5 + 2.5 = 20.2. The default cap of 5: at rho = 8, A = 1, log pi = -1 the loss is 5.
    loss, slope = of_method("cispo", Case(), cap=1.5)
    assert loss == pytest.approx(20.2 / 12)
    assert slope == pytest.approx(over(12, -1, -1.8, -2, -2.2, -3, 0.5, 0.9, 1, 1.1, 1.5, -1, -1))
    assert of_method("cispo", Case(((8.0,),), (1.0,))) == (pytest.approx(5), pytest.approx([-5]))


@pytest.mark.parametrize("name", ["rloo", "reinforce", "maxrl"])
def test_without_a_ratio(name):
    # -A log pi: P 2 * (1 + 2 + 3 + 4 + 5) = 30; N -15; S 1 + 2 = 3; together 18. Slopes -A, whatever rho.
    loss, slope = of_method(name, Case())
    assert loss == pytest.approx(18 / 12)
    assert slope == pytest.approx(over(12, *[-2] * 5, *[1] * 5, -1, -1))


@pytest.mark.parametrize("name", ["grpo", "dr-grpo", "dapo", "gspo"])
def test_on_policy_every_ratio_method_has_reinforces_gradient(name):
    """At rho = 1 nothing is clipped, and the slope is -A times the token's weight, for both signs."""
    case = Case(ratios=((1.0,) * 3, (1.0,) * 3), advantages=(2.0, -1.0))
    _, slope = of_method(name, case)
    weight = 1 / (2 * MAX_NEW_TOKENS) if name == "dr-grpo" else 1 / 6
    assert slope == pytest.approx([-2 * weight] * 3 + [weight] * 3)


# ---- regularisers ------------------------------------------------------------------------------


def test_kl_k3():
    # d = reference - policy. k3 = exp(d) - d - 1, slope 1 - exp(d), both times 0.1.
    #   d = 0: 0, 0;  d = ln 2: 2 - ln 2 - 1, slope -1;  d = -ln 2: 0.5 + ln 2 - 1, slope 0.5;  d = 1: e - 2, 1 - e
    view = Case(((1.0,) * 4,), (1.0,)).view()
    d = torch.tensor([0.0, log(2), -log(2), 1.0], dtype=torch.float64)
    view.streams = {REFERENCE.name: view.policy_logprobs.detach() + d}
    losses = KL(coefficient=0.1)(view)
    (slope,) = torch.autograd.grad(losses.sum(), view.policy_logprobs)
    assert losses.detach().tolist() == pytest.approx([0, 0.1 * (1 - log(2)), 0.1 * (log(2) - 0.5), 0.1 * (exp(1) - 2)])
    assert slope.tolist() == pytest.approx([0, -0.1, 0.05, 0.1 * (1 - exp(1))])


def test_entropy_bonus():
    # -0.01 H, by H: -0.01. It is a loss, so it pays for entropy.
    entropy = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    view = Case(((1.0,) * 3,), (1.0,)).view(policy_entropy=entropy)
    losses = EntropyBonus(coefficient=0.01)(view)
    (slope,) = torch.autograd.grad(losses.sum(), entropy)
    assert losses.detach().tolist() == pytest.approx([0, -0.01, -0.02])
    assert slope.tolist() == pytest.approx([-0.01] * 3)


def test_presets_take_regularisers_only_when_asked():
    assert build_schedule("grpo", {}).schedule.at(0).terms[0].regularisers == ()
    (term,) = build_schedule("grpo", {"kl": 0.04, "entropy_bonus": 1e-3}).schedule.at(0).terms
    assert term.regularisers == (KL(coefficient=0.04), EntropyBonus(coefficient=1e-3))
    assert term.reads == (START, REFERENCE) and term.entropy


# ---- aggregation -------------------------------------------------------------------------------


def rows_of_lengths(*lengths: int, prefix: int = 0) -> list[Row]:
    return [make_row(make_sample(uid=i, response=(5,) * n, prefix=(6,) * prefix), 1.0) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("prefix", [0, 3])  # a re-entered prefix is in no denominator
def test_aggregations_on_unequal_lengths(prefix):
    rows = rows_of_lengths(1, 2, 5, prefix=prefix)
    # token: 8 tokens in all. sequence: a third of 1/1, 1/2, 1/5. constant: 3 rows of at most 10.
    assert token_mean(rows, 10) == pytest.approx([1 / 8] * 3)
    assert sequence_mean(rows, 10) == pytest.approx([1 / 3, 1 / 6, 1 / 15])
    assert constant(rows, 10) == pytest.approx([1 / 30] * 3)


def test_aggregations_count_masked_tokens_out():
    rows = rows_of_lengths(4, 4)
    rows[0].mask = torch.tensor([True, False, False, True])
    rows[1].mask = torch.zeros(4, dtype=torch.bool)
    # 2 trainable tokens; the empty row stays a row, and nothing is divided by 0.
    assert token_mean(rows, 10) == [1 / 2] * 2
    assert sequence_mean(rows, 10)[0] == 1 / 4
    assert constant(rows, 10) == [1 / 20] * 2
    assert token_mean(rows[1:], 10) == [0.0]


# ---- the view ----------------------------------------------------------------------------------


def test_row_mean_spreads_each_rows_mean_over_its_tokens():
    view = Case(((1.0, 1.0), (1.0,), (1.0, 1.0, 1.0)), (1.0, 1.0, 1.0)).view()
    values = torch.tensor([1.0, 3.0, 5.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    assert view.row_mean(values).tolist() == [2, 2, 5, 2, 2, 2]


def test_a_view_gives_only_what_was_declared_and_remembers_what_was_read():
    view = Case().view(owner="mine")
    with pytest.raises(ContractError, match=r"mine: reads 'reference_logprobs' but does not declare it"):
        view[REFERENCE]
    with pytest.raises(ContractError, match=r"mine: reads 'policy_entropy' but does not declare it"):
        view.entropy()
    assert view[START].shape == (12,)
    assert view.read == {"reference_logprobs", "policy_entropy", "start_logprobs"}
