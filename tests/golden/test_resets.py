"""SRPO and RRPO (arXiv 2605.25507) as exact numbers.

The batch: four fresh chains of 2, 5, 3 and 4 tokens, of which the first passes. The second is the parent: R4 and R5
re-enter its first two tokens and go on with five of their own, with the ratios 0.5, 0.9, 1, 1.1, 2; R4 passes.
"""

from __future__ import annotations

from math import sqrt

import pytest
import torch

from mulligan.assign import assign
from mulligan.methods import PRESETS, build_schedule
from mulligan.methods.srpo import srpo
from mulligan.objective import START, Clipped, Reinforce, sequence_mean
from mulligan.reset import (
    Reset,
    SelfDiagnosis,
    early_step,
    entropy_step,
    oracle_step,
    random_step,
    remember_shares,
    restart,
)
from mulligan.rollout import fresh
from mulligan.types import DIAGNOSIS, RESET, Verdict
from tests.golden.tables import (
    DOWN_LOSSES,
    DOWN_SLOPES,
    EPS,
    MAX_NEW_TOKENS,
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
from tests.helpers import TEXTS, Probe, assert_near, make_forest, tiny

LENGTHS = (2, 5, 3, 4)
FRESH_ONES = [sample_of(uid, float(uid == 0), length) for uid, length in enumerate(LENGTHS)]
PARENT = FRESH_ONES[1]
R4, R5 = 4, 5
RESETS = [
    sample_of(uid, reward, group=1, origin=RESET, prefix=PARENT.tokens[:2], parent=PARENT.uid)
    for uid, reward in ((R4, 1.0), (R5, 0.0))
]
SAID = sample_of(6, 0.0, 3, group=2, origin=DIAGNOSIS, parent=PARENT.uid, verdict=Verdict.UNGRADED)
TREE = [*FRESH_ONES, SAID, *RESETS]
# Fresh: 1, 0, 0, 0: mean 1/4, std sqrt(3)/4. Resets: 1, 0: mean 1/2, std 1/2. One baseline for both would be 1/3.
STD = sqrt(3) / 4 + EPS
A = 0.5 / (0.5 + EPS)
NAMES = ("srpo", "rrpo", "early-random", "reset-entropy", "reset-restart", "reset-oracle", "srpo-permuted")


@pytest.mark.parametrize("name", NAMES)
def test_every_reset_method_has_the_same_objective(name):
    # -A log pi, log pi = -1, -2, ...; the mean over six rows of each row's own mean.
    found = table(method_of(name), TREE, ratios={R4: RATIOS, R5: RATIOS})
    assert set(found) == {0, 1, 2, 3, R4, R5}
    up, down = 0.75 / STD, -0.25 / STD
    check(found[0], advantage=up, weight=1 / 12, losses=[up, 2 * up], slopes=[-up] * 2)
    for uid, length in list(enumerate(LENGTHS))[1:]:
        losses = [down * (t + 1) for t in range(length)]
        check(found[uid], advantage=down, weight=1 / (6 * length), losses=losses, slopes=[-down] * length)
    # Of the resets five tokens each, those behind the prefix; no ratio is read.
    check(found[R4], advantage=A, weight=1 / 30, losses=[A, 2 * A, 3 * A, 4 * A, 5 * A], slopes=[-A] * 5)
    check(found[R5], advantage=-A, weight=1 / 30, losses=[-A, -2 * A, -3 * A, -4 * A, -5 * A], slopes=[A] * 5)
    # F0: 3 up / 12. The failures: down (1 + n) / 2 / 6 with n = 5, 3, 4, together 7.5 / 6. The resets cancel out.
    assert sum(line.loss for line in found.values()) == pytest.approx(up * 3 / 12 + down * 7.5 / 6)


@pytest.mark.parametrize("name", ["srpo", "rrpo", "early-random"])
def test_the_clipped_ablation(name):
    found = table(method_of(name, surrogate="clipped"), TREE, ratios={R4: RATIOS, R5: RATIOS})
    check(found[R4], advantage=A, weight=1 / 30, losses=times(A, UP_LOSSES), slopes=times(A, UP_SLOPES))
    check(found[R5], advantage=-A, weight=1 / 30, losses=times(A, DOWN_LOSSES), slopes=times(A, DOWN_SLOPES))


def test_a_group_without_variance_has_no_advantage():
    """Each of the two by itself: resets that all fail say nothing, whatever the fresh chains did."""
    hopeless = [sample_of(s.uid, 0.0, group=1, origin=RESET, prefix=PARENT.tokens[:2]) for s in RESETS]
    found = table(srpo(), [*FRESH_ONES, *hopeless])
    assert [found[uid].advantage for uid in (R4, R5)] == [0.0, 0.0] and found[0].advantage > 1
    solved = [sample_of(uid, 1.0, 3) for uid in range(4)]
    found = table(srpo(), [*solved, *RESETS])
    assert [found[uid].advantage for uid in range(4)] == [0.0] * 4
    assert found[R4].advantage == pytest.approx(A, rel=3e-7)


def test_two_fresh_groups_have_a_baseline_each():
    """Without a failure the second group is fresh, too; with one in it, it is compared with its own group alone."""
    second = [sample_of(4 + k, float(k > 0), 2, group=1) for k in range(4)]
    found = table(srpo(), [*(sample_of(uid, 1.0, 3) for uid in range(4)), *second])
    assert [found[uid].advantage for uid in range(4)] == [0.0] * 4
    # 0, 1, 1, 1: mean 3/4
    assert [found[uid].advantage for uid in range(4, 8)] == pytest.approx([-0.75 / STD, *[0.25 / STD] * 3], rel=3e-7)


def test_a_diagnosis_is_never_trained():
    for name in NAMES:
        assert {row.sample.uid for row in rows_of(method_of(name), TREE)} == {0, 1, 2, 3, R4, R5}


# ---- the prefix --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_prefix_has_exactly_no_gradient(name):
    """d loss / d log-prob of every response token, the prefix's among them."""
    method = method_of(name)
    rows = rows_of(method, TREE)
    leaves = [torch.full((len(row.tokens),), -1.5, dtype=torch.float64, requires_grad=True) for row in rows]
    weights = method.terms[0].aggregation(rows, MAX_NEW_TOKENS)
    loss = torch.zeros((), dtype=torch.float64)
    for row, leaf, weight in zip(rows, leaves, weights, strict=True):
        loss = loss - weight * (row.advantages[row.mask].double() * leaf[row.mask]).sum()
        assert row.mask.tolist() == [False] * row.sample.branch + [True] * len(row.sample.behavior_logprobs)
        assert row.advantages[: row.sample.branch].tolist() == [0.0] * row.sample.branch
    loss.backward()
    for row, leaf in zip(rows, leaves, strict=True):
        assert leaf.grad is not None
        assert leaf.grad[: row.sample.branch].tolist() == [0.0] * row.sample.branch
        assert bool((leaf.grad[row.sample.branch :] != 0).all())


@pytest.mark.parametrize("kind", ["qwen3", "looped"])
def test_a_real_update_scores_nothing_of_the_prefix(kind):
    """No hidden state that predicts a prefix token passes on a gradient, and the loss is that of the formula."""
    model = tiny(kind)
    probe = Probe(model, tokens_per_micro_batch=1)  # a row at a time, in the order of length
    method = srpo()
    rows = assign(method, make_forest(TREE), TEXTS, probe.learner.fill_streams, MAX_NEW_TOKENS)
    states: list[torch.Tensor] = []

    def keep(_, __, out) -> None:
        out.last_hidden_state.retain_grad()
        states.append(out.last_hidden_state)

    hook = model.base_model.register_forward_hook(keep)
    loss, gradient = probe.update(rows, method)
    hook.remove()
    order = sorted(range(6), key=lambda i: (len(rows[i].context) + len(rows[i].tokens), i))
    for index, state in zip(order, states, strict=True):
        row, grad = rows[index], state.grad
        assert grad is not None
        touched = grad[0].abs().sum(-1) > 0
        first = len(row.context) + row.sample.branch - 1  # predicts the first own token
        assert touched.tolist() == [False] * first + [True] * len(row.sample.behavior_logprobs) + [False]

    model.zero_grad()
    expected = 0.0
    for row in rows:
        logits = model(torch.tensor([[*row.context, *row.tokens]])).logits[0]
        own = range(row.sample.branch, len(row.tokens))
        table_ = torch.log_softmax(logits, -1)
        logprobs = torch.stack([table_[len(row.context) + j - 1, row.tokens[j]] for j in own])
        mine = -row.advantages[-1].double() * logprobs.mean() / 6
        mine.backward()
        expected += mine.item()
    assert loss == pytest.approx(expected, rel=1e-9)
    own_gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert_near(gradient, own_gradient)


# ---- presets -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("srpo", SelfDiagnosis(temperature=0.3)),
        ("rrpo", random_step),
        ("early-random", early_step),
        ("reset-entropy", entropy_step),
        ("reset-restart", restart),
        ("reset-oracle", oracle_step),
        ("srpo-permuted", SelfDiagnosis(temperature=0.3, permuted=True)),
    ],
)
def test_the_presets_differ_in_the_position_alone(name, at):
    method = build_schedule(name, {"chains": 5, "resets": 3}).schedule.at(0)
    assert method.passes == (fresh(5), Reset(3, at))
    (term,) = method.terms
    assert (term.surrogate, term.aggregation) == (Reinforce(), sequence_mean)
    assert term.reads == () and not term.regularisers
    assert method.remember is (remember_shares if name == "srpo-permuted" else None)
    assert method_of(name).passes == (fresh(4), Reset(4, at))


def test_settings_and_published_presets():
    assert method_of("srpo", diagnosis_temperature=0.0).passes[1] == Reset(4, SelfDiagnosis(temperature=0.0))
    clipped = method_of("rrpo", surrogate="clipped").terms[0]
    assert clipped.surrogate == Clipped() and clipped.reads == (START,)
    run = {"sampling.temperature": 0.7, "optimizer.updates_per_batch": 4}
    for name in ("srpo", "rrpo", "early-random"):
        assert method_of(f"{name}-published") == method_of(name)
        assert PRESETS[f"{name}-published"].run == run and not PRESETS[name].run
