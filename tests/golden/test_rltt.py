"""RLTT (arXiv 2602.10520) as exact numbers, and against the paper's formula on a looped model of three loops.

``L = -(1/G) sum_i (1/|y_i|) sum_j sum_t w_t log P_t(y_ij) A_i + beta KL(last loop, frozen reference)``.
"""

from __future__ import annotations

import copy
from math import sqrt

import pytest
import torch

from mulligan.assign import assign
from mulligan.errors import ContractError, UserError
from mulligan.learner.update import frozen_models
from mulligan.method import Method
from mulligan.methods import PRESETS
from mulligan.methods.controls import rltt_distillation
from mulligan.methods.rltt import rltt
from mulligan.objective import KL, REFERENCE, AllLoops, LastLoop, TokenView
from mulligan.types import Row
from tests.golden.tables import EPS, MAX_NEW_TOKENS, check, method_of, sample_of, table
from tests.helpers import LOOPS, TEXTS, Probe, Weights, assert_near, flat, make_forest, make_row, tiny

P, N, S = range(3)
GROUP = [sample_of(P, 1.0, 3), sample_of(N, 0.0, 2), sample_of(S, 0.0, 1)]
# Rewards 1, 0, 0: mean 1/3, std sqrt(2)/3.
UP, DOWN = 2 / 3 / (sqrt(2) / 3 + EPS), -1 / 3 / (sqrt(2) / 3 + EPS)
WEIGHTINGS = ("uniform", "progressive", "exit")


def test_the_last_loops_loss_is_reinforces():
    # -A log pi with log pi = -1, -2, -3; the mean over three rows of each row's own mean.
    found = table(rltt(), GROUP)
    check(found[P], advantage=UP, weight=1 / 9, losses=[UP, 2 * UP, 3 * UP], slopes=[-UP] * 3)
    check(found[N], advantage=DOWN, weight=1 / 6, losses=[DOWN, 2 * DOWN], slopes=[-DOWN] * 2)
    check(found[S], advantage=DOWN, weight=1 / 3, losses=[DOWN], slopes=[-DOWN])
    # (2 UP + 1.5 DOWN + DOWN) / 3
    assert sum(line.loss for line in found.values()) == pytest.approx((2 * UP + 2.5 * DOWN) / 3)


# ---- weights -----------------------------------------------------------------------------------
# Tokens: two of A = +1, one of A = -1, one of A = 0. Log-probs of the last loop: -1 throughout. P_1 / P_3 is 1/2, 4,
# 1/4 and 2; P_2 / P_3 is 1, 1/10, 3 and 1.
RATIOS = ((0.5, 4.0, 0.25, 2.0), (1.0, 0.1, 3.0, 1.0), (1.0, 1.0, 1.0, 1.0))
EXITS = ((0.5, 0.25, 0.25), (0.1, 0.2, 0.7), (0.0, 0.0, 1.0), (0.2, 0.2, 0.6))


def weights_of(method: Method) -> list[list[float]]:
    """By loop, the weight of each of the four tokens."""
    row = make_row(sample_of(0, 1.0, 4), 1.0)
    logprobs = torch.tensor(RATIOS, dtype=torch.float64).log() - 1
    view = TokenView(
        policy_logprobs=logprobs[-1],
        advantages=torch.tensor([1.0, 1.0, -1.0, 0.0], dtype=torch.float64),
        row=torch.zeros(4, dtype=torch.long),
        rows=[row],
        streams={},
        exit_probabilities=torch.tensor(EXITS, dtype=torch.float64),
        loop_logprobs=logprobs,
    )
    found = method.terms[0].readout.weights(view)
    return [(torch.as_tensor(w, dtype=torch.float64) * torch.ones(4, dtype=torch.float64)).tolist() for w in found]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"weighting": "uniform"}, [[1 / 3] * 4] * 3),
        ({"weighting": "progressive"}, [[1 / 6] * 4, [2 / 6] * 4, [3 / 6] * 4]),
        ({"weighting": "progressive", "power": 2.0}, [[1 / 14] * 4, [4 / 14] * 4, [9 / 14] * 4]),
        ({"weighting": "progressive", "power": 0.0}, [[1 / 3] * 4] * 3),
        ({}, [[0.5, 0.1, 0, 0.2], [0.25, 0.2, 0, 0.2], [0.25, 0.7, 1, 0.6]]),
        # min(2, ratio) is 1/2, 2, 1/4, 2 and 1, 1/10, 2, 1, a third of each; the last loop keeps its third.
        (
            {"weighting": "uniform", "ratio_cap": 2.0},
            [[1 / 6, 2 / 3, 1 / 12, 2 / 3], [1 / 3, 1 / 30, 2 / 3, 1 / 3], [1 / 3] * 4],
        ),
        # A > 0 alone: not the third token, and not the fourth, which has none to learn from.
        ({"weighting": "uniform", "positive_only": True}, [[1 / 3, 1 / 3, 0, 0]] * 2 + [[1 / 3] * 4]),
        (
            {"ratio_cap": 1.0, "positive_only": True},
            [[0.25, 0.1, 0, 0], [0.25, 0.02, 0, 0], [0.25, 0.7, 1, 0.6]],
        ),
    ],
    ids=["uniform", "progressive", "squared", "power-0", "exit", "capped", "positive-only", "capped-positive"],
)
def test_weights(settings, expected):
    assert weights_of(rltt(**settings)) == [pytest.approx(line) for line in expected]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_of_a_token_add_up_to_one(weighting):
    total = torch.tensor(weights_of(rltt(weighting=weighting))).sum(0)
    assert total.tolist() == pytest.approx([1.0] * 4)


def test_exit_probabilities_of_a_model_add_up_to_one():
    """Of every token, with a gate that is not shut: lambda_t prod_{j<t} (1 - lambda_j), the last one has the rest."""
    model = tiny("looped")
    ids = torch.tensor([[*GROUP[0].request.context, *GROUP[0].tokens]])
    with torch.no_grad():
        out = model(ids, output_loops=True)
        gates = [torch.sigmoid(model.model.early_exit_gate(h))[..., 0] for h in out.loop_hidden_states]
    found = out.exit_probabilities
    assert torch.allclose(found.sum(-1), torch.ones_like(found[..., 0]), atol=1e-12)
    left = torch.ones_like(gates[0])
    for loop, gate in enumerate(gates[:-1]):
        assert torch.allclose(found[..., loop], left * gate, atol=1e-12)
        left = left * (1 - gate)
    assert torch.allclose(found[..., -1], left, atol=1e-12)
    assert float(found.min()) > 0 and float(found.std()) > 0.1


# ---- the formula -------------------------------------------------------------------------------


def update(model, method: Method, **plan) -> tuple[float, Weights, list[Row]]:
    probe = Probe(model, **plan)
    rows = assign(method, make_forest(GROUP), TEXTS, probe.learner.fill_streams, MAX_NEW_TOKENS)
    return *probe.update(rows, method), rows


def gradient_of(model) -> Weights:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def loops_of(model, row: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [loops, T] of a row's tokens and exit probabilities [T, loops], both with gradient."""
    out = model(torch.tensor([[*row.context, *row.tokens]]), output_loops=True)
    first, target = len(row.context) - 1, torch.tensor(row.tokens)[:, None]
    read = [
        torch.log_softmax(model.lm_head(h[0]), -1)[first:-1].gather(1, target)[:, 0] for h in out.loop_hidden_states
    ]
    return torch.stack(read), out.exit_probabilities[0, first:-1]


def by_formula(model, settings: dict, rows: list[Row]) -> Weights:
    """The gradient of the paper's loss, term by term, with the options' definitions written out."""
    model.zero_grad()
    for row in rows:
        logprobs, exits = loops_of(model, row)
        advantage = row.advantages[-1].double()
        for t in range(LOOPS):
            match settings.get("weighting", "exit"):
                case "uniform":
                    w = torch.full((len(row.tokens),), 1 / 3, dtype=torch.float64)
                case "progressive":
                    a = settings.get("power", 1.0)
                    total = sum((k + 1) ** a for k in range(LOOPS))
                    w = torch.full((len(row.tokens),), (t + 1) ** a / total, dtype=torch.float64)
                case _:
                    w = exits[:, t] if settings.get("train_gate") else exits[:, t].detach()
            if t < LOOPS - 1:
                cap = settings.get("ratio_cap")
                if cap is not None:
                    w = w * torch.minimum((logprobs[t] - logprobs[-1]).exp().detach(), torch.tensor(cap).double())
                if settings.get("positive_only") and advantage <= 0:
                    continue
            loss = -(w * logprobs[t] * advantage).sum() / len(row.tokens) / len(rows)
            loss.backward(retain_graph=True)
    return gradient_of(model)


@pytest.mark.parametrize(
    "settings",
    [
        {"weighting": "uniform"},
        {"weighting": "progressive", "power": 2.0},
        {},
        {"train_gate": True},
        {"ratio_cap": 1.5},
        {"positive_only": True},
        {"ratio_cap": 1.5, "positive_only": True, "train_gate": True},
    ],
    ids=["uniform", "progressive", "exit", "gate", "capped", "positive", "all"],
)
def test_the_gradient_is_the_papers(settings):
    model = tiny("looped")
    _, gradient, rows = update(model, rltt(**settings), tokens_per_micro_batch=40)
    assert_near(gradient, by_formula(model, settings, rows))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_early_loops_have_a_gradient_of_their_own(weighting):
    """Another than the last loop's alone, also without that one."""
    settings = {"weighting": weighting}
    _, every, _ = update(tiny("looped"), rltt(**settings))
    _, last, _ = update(tiny("looped"), rltt(**settings).replace(readout=LastLoop()))
    _, early, _ = update(tiny("looped"), rltt().replace(readout=AllLoops(weighting=weighting, skip_last=True)))
    # The gates of this model let most tokens go on to the last loop.
    assert float((flat(every) - flat(last)).norm()) > 1e-3 * float(flat(last).norm())
    assert float(flat(early).norm()) > 1e-3 * float(flat(last).norm())
    # Of all the weights of a loop, that of the first alone: what it says is what is pushed.
    _, first, _ = update(tiny("looped"), rltt().replace(readout=AllLoops(weighting=(1.0, 0.0, 0.0))))
    assert float(flat(first).norm()) > 0.1 * float(flat(last).norm())


def gate(gradient: Weights) -> float:
    found = [float(g.abs().max()) for n, g in gradient.items() if "early_exit_gate" in n]
    assert len(found) == 2  # weight and bias
    return max(found)


@pytest.mark.parametrize("settings", [{"weighting": w} for w in WEIGHTINGS] + [{"ratio_cap": 2.0}])
def test_the_gate_learns_nothing_unless_told(settings):
    _, gradient, _ = update(tiny("looped"), rltt(**settings))
    assert gate(gradient) == 0.0


def test_the_gate_learns_when_told():
    _, gradient, _ = update(tiny("looped"), rltt(train_gate=True))
    _, still, _ = update(tiny("looped"), rltt())
    assert gate(gradient) > 0
    others = [n for n in gradient if "early_exit_gate" not in n]
    assert any(float((gradient[n] - still[n]).abs().max()) > 0 for n in others)  # through the gate's input


# ---- when it is REINFORCE ----------------------------------------------------------------------


def same_loops(model):
    """The model, all of whose loops are its last one."""

    def repeat(_, __, out):
        out.loop_hidden_states = (out.last_hidden_state,) * LOOPS

    model.base_model.register_forward_hook(repeat)
    return model


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_with_equal_loops_it_is_reinforce(weighting):
    """Weights that sum to 1 then change nothing, in loss and gradient; so does any cap of at least 1."""
    settings = {"weighting": weighting}
    expected, gradient, _ = update(tiny("looped"), rltt(**settings).replace(readout=LastLoop()))
    for more in ({}, {"ratio_cap": 1.0}):
        loss, mine, _ = update(same_loops(tiny("looped")), rltt(**settings, **more))
        assert loss == pytest.approx(expected, rel=1e-12)
        assert_near(mine, gradient)
    # What bounds wrong answers in early loops takes their part of the gradient away.
    _, mine, _ = update(same_loops(tiny("looped")), rltt(**settings, positive_only=True))
    assert float((flat(mine) - flat(gradient)).norm()) > 1e-3 * float(flat(gradient).norm())


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_with_one_loop_it_is_reinforce(weighting):
    def one_loop():
        model = tiny("looped")
        model.config.total_ut_steps = model.model.config.total_ut_steps = 1
        return model

    loss, gradient, _ = update(one_loop(), rltt(weighting=weighting, positive_only=True))
    expected, theirs, _ = update(one_loop(), rltt().replace(readout=LastLoop()))
    assert loss == pytest.approx(expected, rel=1e-12)
    assert_near(gradient, theirs)
    _, three, _ = update(tiny("looped"), rltt().replace(readout=LastLoop()))
    assert float((flat(three) - flat(theirs)).norm()) > 0.01 * float(flat(theirs).norm())


# ---- KL ----------------------------------------------------------------------------------------


def test_kl_is_to_a_frozen_reference():
    """k3 at the last loop, d = reference - policy; the same weights as the loss. With a reference that is the policy it
    is 0, which is what the release computes."""
    model = tiny("looped")
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight *= 1.1
    method = rltt(kl=0.5)
    assert method.terms[0].reads == (REFERENCE,) and frozen_models([method]) == {"reference": None}
    assert frozen_models([rltt()]) == {}
    probe = Probe(model, reference=other)
    rows = assign(method, make_forest(GROUP), TEXTS, probe.learner.fill_streams, MAX_NEW_TOKENS)
    metrics = probe.learner.update(rows, method, 0)
    plain, gradient, _ = update(model, rltt())

    model.zero_grad()
    penalty = torch.zeros((), dtype=torch.float64)
    for row in rows:
        with torch.no_grad():
            reference = loops_of(other, row)[0][-1].float().double()  # as a row stores it
        d = reference - loops_of(model, row)[0][-1]
        penalty = penalty + 0.5 * (d.exp() - d - 1).mean() / len(rows)
    penalty.backward()
    assert penalty.item() > 1e-3
    assert metrics["update/penalty"] == pytest.approx(penalty.item(), rel=1e-9)
    assert metrics["update/loss"] == pytest.approx(plain + penalty.item(), rel=1e-9)
    pulled = {n: gradient[n] + g for n, g in gradient_of(model).items()}
    assert_near(probe.gradients[0], pulled)

    same = Probe(tiny("looped"), reference=copy.deepcopy(model))
    rows = assign(method, make_forest(GROUP), TEXTS, same.learner.fill_streams, MAX_NEW_TOKENS)
    assert abs(same.learner.update(rows, method, 0).get("update/penalty", 0.0)) < 1e-12
    with pytest.raises(ContractError, match="needs a frozen reference"):
        assign(method, make_forest(GROUP), TEXTS, Probe(tiny("looped")).learner.fill_streams, MAX_NEW_TOKENS)


# ---- presets -----------------------------------------------------------------------------------


def test_published():
    method, preset = method_of("rltt-published"), PRESETS["rltt-published"]
    assert method.terms[0].readout == AllLoops(weighting="exit", train_gate=True)
    assert method.terms[0].regularisers == (KL(coefficient=1e-3),)
    assert preset.run == {"optimizer.updates_per_batch": 2} and not PRESETS["rltt"].run
    assert rltt().terms[0].readout == AllLoops(weighting="exit") and rltt().terms[0].regularisers == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "uniform", "train_gate": True}, "train_gate has no effect with weighting=uniform"),
        ({"power": 2.0}, "power has no effect with weighting=exit"),
    ],
)
def test_settings_that_would_do_nothing(settings, message):
    with pytest.raises(UserError, match=f"^rltt: {message}"):
        rltt(**settings)


def test_distillation_is_advantage_free_in_the_early_loops():
    """The control: -A log P of the last loop, and -w_t log P_t of the others whatever the sample was worth."""
    model = tiny("looped")
    method = rltt_distillation(3)
    loss, gradient, rows = update(model, method)
    assert len(rows) == 6 and {row.term for row in rows} == {0, 1}
    assert [float(row.advantages[-1]) for row in rows if row.term == 1] == [1.0] * 3
    model.zero_grad()
    expected = 0.0
    for row in rows[:3]:
        logprobs, _ = loops_of(model, row)
        learned = -(row.advantages[-1].double() * logprobs[-1]).mean() / 3
        distilled = -(logprobs[:-1] / LOOPS).sum() / len(row.tokens) / 3
        (learned + distilled).backward()
        # The loss that is told is each term's surrogate at the last loop.
        expected += learned.item() - logprobs[-1].mean().item() / 3
    assert_near(gradient, gradient_of(model))
    assert loss == pytest.approx(expected, rel=1e-9)


def test_the_gradient_reaches_every_loop_directly():
    """d loss / d log P_t is w_t times the last loop's, log-probs taken as they are."""
    model = tiny("looped")
    heads: list[torch.Tensor] = []

    def keep(_, __, logits) -> None:
        if logits.requires_grad:
            logits.retain_grad()
            heads.append(logits)

    model.lm_head.register_forward_hook(keep)
    method = rltt(weighting="progressive")
    probe = Probe(model)
    rows = assign(method, make_forest(GROUP[:2]), TEXTS, probe.learner.fill_streams, MAX_NEW_TOKENS)
    probe.update(rows, method)
    assert len(heads) == LOOPS and all(h.shape[0] == sum(len(row.tokens) for row in rows) for h in heads)
    order = sorted(rows, key=lambda row: len(row.context) + len(row.tokens))
    targets = torch.tensor([t for row in order for t in row.tokens])[:, None]
    slopes = torch.cat(
        [torch.full((len(row.tokens),), -float(row.advantages[-1]) / len(row.tokens) / 2) for row in order]
    ).double()
    for t, head in enumerate(heads):
        # d log softmax / d logit of the target is 1 - p.
        p = torch.softmax(head.detach(), -1).gather(1, targets)[:, 0]
        assert head.grad is not None
        found = head.grad.gather(1, targets)[:, 0]
        assert torch.allclose(found, (t + 1) / 6 * slopes * (1 - p), rtol=1e-6, atol=1e-12)
