"""What must not change a loss or a gradient: micro-batches, order, padding, splitting, neighbours."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.assign import assign
from mulligan.errors import UserError
from mulligan.method import Method, Term
from mulligan.methods.cispo import cispo
from mulligan.methods.dr_grpo import dr_grpo
from mulligan.methods.grpo import grpo
from mulligan.methods.gspo import gspo
from mulligan.methods.rloo import rloo
from mulligan.objective import START, LastLoop, Reinforce, TokenView, constant, sequence_mean, token_mean
from mulligan.types import Forest, Row
from tests.helpers import (
    LOOPS,
    TEXTS,
    Probe,
    assert_near,
    flat,
    make_forest,
    make_row,
    make_sample,
    tiny,
    tokens,
)

few = settings(max_examples=6, deadline=None, derandomize=True)
KL_AND_ENTROPY = {"kl": 0.1, "entropy_bonus": 0.05}
METHODS = {
    "grpo": grpo(),
    "grpo-regularised": grpo(**KL_AND_ENTROPY),
    "grpo-sequence": grpo(aggregation="sequence"),
    "dr-grpo": dr_grpo(),
    "gspo": gspo(clip_low=0.2, clip_high=0.2),
    "cispo": cispo(),
    "rloo": rloo(),
}


@cache
def probe(kind: str) -> Probe:
    """Its rate is 0, so that it can be used for ever."""
    reference = tiny(kind)
    with torch.no_grad():
        for weight in reference.parameters():
            weight *= 1.05
    return Probe(tiny(kind), reference=reference, max_new_tokens=40)


def result(kind: str, rows: list[Row], method: Method, budget: int = 10_000):
    """Loss and gradient under a token budget for micro-batches."""
    learner = probe(kind)
    learner.learner.plan.tokens_per_micro_batch = budget
    return learner.update(rows, method)


def filled(kind: str, rows: list[Row], method: Method, seed: int) -> list[Row]:
    """Start log-probs near the policy's, and every other declared stream."""
    learner = probe(kind).learner
    learner.fill_streams(rows, list(dict.fromkeys(s for t in method.terms for s in (START, *t.reads))), _own_context)
    generator = torch.Generator().manual_seed(seed)
    for row in rows:
        row.streams[START.name] = row.streams[START.name] + 0.3 * torch.randn(len(row.tokens), generator=generator)
    return rows


def _own_context(row: Row, name: str) -> tuple[int, ...]:
    return row.context


@st.composite
def batches(draw) -> list[Row]:
    """Rows of very different lengths, with prefixes, several trainable spans and zeros among the advantages."""
    rows = []
    for uid in range(draw(st.integers(2, 7))):
        length, prefix = draw(st.integers(1, 30)), draw(st.sampled_from([0, 0, 3]))
        advantage = (
            draw(st.sampled_from([1.0, -0.5, 0.7, -2.0])) if uid < 2 else draw(st.sampled_from([0.0, 1.5, -1.0]))
        )
        sample = make_sample(
            uid=uid,
            group=uid // 2,
            context=(1, *tokens(draw(st.integers(0, 20)), seed=uid)),
            prefix=tokens(prefix, seed=50),
            response=tokens(length, seed=100 + uid),
            temperature=draw(st.sampled_from([None, 0.7])),
        )
        row = make_row(sample, advantage)
        if length > 4 and draw(st.booleans()):
            row.mask[prefix + 2 : prefix + 4] = False
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", METHODS)
@few
@given(rows=batches(), budget=st.sampled_from([1, 40, 90, 200]), seed=st.integers(0, 99), data=st.data())
def test_micro_batches_and_order_change_nothing(name, rows, budget, seed, data):
    """A budget of 1 has every row alone and unpadded; the largest pads all rows to the longest."""
    method = METHODS[name]
    rows = filled("qwen3", rows, method, seed)
    loss, gradient = result("qwen3", rows, method)
    again = data.draw(st.permutations(rows))
    other_loss, other = result("qwen3", again, method, budget)
    assert other_loss == pytest.approx(loss, rel=1e-9, abs=1e-12)
    assert_near(other, gradient, may_vanish=True)


@few
@given(rows=batches(), budget=st.sampled_from([1, 60]), seed=st.integers(0, 99))
def test_micro_batches_change_nothing_for_loops(rows, budget, seed):
    method = grpo(**KL_AND_ENTROPY).replace(readout=Loops(weights_=(0.2, 0.3, 0.5)))
    rows = filled("looped", rows, method, seed)
    loss, gradient = result("looped", rows, method)
    other_loss, other = result("looped", rows[::-1], method, budget)
    assert other_loss == pytest.approx(loss, rel=1e-9, abs=1e-12)
    assert_near(other, gradient, may_vanish=True)


def test_the_order_of_rows_does_not_choose_the_parts_of_a_batch():
    """Several updates a batch: which groups come together depends on seed and step alone."""
    rows = [make_row(make_sample(uid=i, group=i, response=tokens(5, seed=i)), 1.0 + i) for i in range(6)]
    found = []
    for given_rows in (rows, rows[::-1]):
        learner = Probe(tiny("qwen3"), updates_per_batch=3)
        learner.update(given_rows, rloo(), step=4)
        found.append(learner.gradients)
    for left, right in zip(*found, strict=True):
        assert_near(left, right)


@few
@given(rows=batches(), seed=st.integers(0, 99))
def test_splitting_a_batch_adds_up(rows, seed):
    """With a constant denominator the whole is the sum of its parts, each by its share of the rows."""
    method = dr_grpo()
    rows = filled("looped", rows, method, seed)
    loss, gradient = result("looped", rows, method)
    parts = [rows[:1], rows[1:]]
    shares = [len(part) / len(rows) for part in parts]
    found = [result("looped", part, method) for part in parts]
    assert sum(s * f[0] for s, f in zip(shares, found, strict=True)) == pytest.approx(loss, rel=1e-9, abs=1e-12)
    total = {n: sum(s * f[1][n] for s, f in zip(shares, found, strict=True)) for n in gradient}
    assert_near(total, gradient, may_vanish=True)


# ---- denominators ------------------------------------------------------------------------------


def two_rows() -> list[Row]:
    return [
        make_row(make_sample(uid=0, response=tokens(4, seed=1)), 1.0),
        make_row(make_sample(uid=1, response=tokens(6, seed=2)), -0.5),
    ]


# Beside 2 rows of 4 + 6 tokens comes one of 10: tokens 10 -> 20, rows 2 -> 3.
@pytest.mark.parametrize(
    ("aggregation", "factor"),
    [(token_mean, 10 / 20), (sequence_mean, 2 / 3), (constant, 2 / 3)],
    ids=["token", "sequence", "constant"],
)
def test_rows_of_advantage_zero_stay_in_the_denominator(aggregation, factor):
    method = grpo().replace(aggregation=aggregation)
    loss, gradient = result("looped", two_rows(), method)
    silent = make_row(make_sample(uid=2, response=tokens(10, seed=3)), 0.0)
    more_loss, more = result("looped", [*two_rows(), silent], method)
    assert more_loss == pytest.approx(factor * loss, rel=1e-9)
    assert_near(more, {n: factor * g for n, g in gradient.items()})


def test_a_batch_without_any_advantage_is_a_loss_of_zero():
    loss, gradient = result("looped", [make_row(make_sample(), 0.0)], grpo())
    assert loss == 0.0
    assert float(flat(gradient).abs().max()) == 0.0
    metrics = probe("looped").learner.update([], grpo(), 0)
    assert metrics["update/loss"] == 0.0 and metrics["update/rows"] == 0.0


def test_a_regulariser_reads_rows_of_advantage_zero_too():
    silent = make_row(make_sample(uid=2, response=tokens(10, seed=3)), 0.0)
    method = grpo(kl=1.0)
    (row,) = filled("looped", [silent], method, 0)
    loss, gradient = result("looped", [row], method)
    assert loss > 0 and float(flat(gradient).norm()) > 0


@dataclass(frozen=True)
class Given:
    """A credit that gives each row what is written down for its uid; None drops the row."""

    by_uid: tuple[float | None, ...]
    reads: tuple = ()

    def __call__(self, rows, forest, max_new_tokens):
        return [self.by_uid[row.sample.uid] for row in rows]


def assigned(method: Method, forest: Forest) -> list[Row]:
    return assign(method, forest, TEXTS, probe("qwen3").learner.fill_streams, 40)


def test_rows_dropped_by_the_credit_leave_the_denominator():
    samples = [make_sample(uid=i, response=tokens(4 + 2 * i, seed=i)) for i in range(3)]
    method = grpo().replace(credit=Given((1.0, -0.5, None)))
    rows = assigned(method, make_forest(samples))
    assert [row.sample.uid for row in rows] == [0, 1]
    loss, gradient = result("looped", rows, method)
    without = assigned(method, make_forest(samples[:2]))
    assert result("looped", without, method)[0] == pytest.approx(loss, rel=1e-12)
    # And with 0 in place of None it would be another number: 10 of 18 tokens.
    silenced = grpo().replace(credit=Given((1.0, -0.5, 0.0)))
    other_loss, other = result("looped", assigned(silenced, make_forest(samples)), silenced)
    assert other_loss == pytest.approx(loss * 10 / 18, rel=1e-9)
    assert_near(other, {n: g * 10 / 18 for n, g in gradient.items()})


def test_two_terms_have_denominators_of_their_own():
    samples = [make_sample(uid=i, response=tokens(n, seed=i)) for i, n in enumerate((3, 5, 20))]
    forest = make_forest(samples)

    def only(*uids: int):
        return lambda forest: [Row(sample=s, context=(), group=s.group) for s in forest.samples if s.uid in uids]

    few_, many = (
        Term(select=only(*uids), credit=Given((1.0, -0.5, 2.0)), surrogate=Reinforce()) for uids in ((0, 1), (2,))
    )
    both = Method(name="both", terms=(few_, replace(many, weight=0.25)))
    loss, gradient = result("looped", assigned(both, forest), both)
    alone = []
    for term in (few_, many):
        method = Method(name="alone", terms=(term,))
        alone.append(result("looped", assigned(method, forest), method))
    assert loss == pytest.approx(alone[0][0] + 0.25 * alone[1][0], rel=1e-9)
    assert_near(gradient, {n: alone[0][1][n] + 0.25 * alone[1][1][n] for n in gradient})


# ---- readouts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loops:
    """Loops 1 to L with fixed weights, or with the exit probabilities."""

    weights_: tuple[float, ...] = ()
    loops: tuple[int, ...] = tuple(range(1, LOOPS + 1))

    @property
    def exits(self) -> bool:
        return not self.weights_

    def weights(self, view: TokenView):
        if self.weights_:
            return self.weights_
        assert view.exit_probabilities is not None
        return list(view.exit_probabilities.detach().unbind(1))


@pytest.mark.parametrize("name", METHODS)
@few
@given(rows=batches(), seed=st.integers(0, 99))
def test_all_weight_on_the_last_loop_is_the_last_loop(name, rows, seed):
    method = METHODS[name]
    rows = filled("looped", rows, method, seed)
    loss, gradient = result("looped", rows, method)
    last = (0.0,) * (LOOPS - 1) + (1.0,)
    other_loss, other = result("looped", rows, method.replace(readout=Loops(last)), 60)
    assert other_loss == pytest.approx(loss, rel=1e-9, abs=1e-12)
    assert_near(other, gradient, may_vanish=True)


def test_a_readout_spreads_the_last_loops_derivative():
    """REINFORCE through loops: -A sum_t w_t log P_t, term by term, with fixed and with exit weights."""
    rows = [*two_rows(), make_row(make_sample(uid=3, prefix=(5, 6), response=tokens(3, seed=7)), 2.0)]
    model = probe("looped").model
    for readout in (Loops((0.2, 0.3, 0.5)), Loops()):
        _, gradient = result("looped", rows, rloo().replace(readout=readout))
        model.zero_grad()
        total = sum(int(row.mask.sum()) for row in rows)
        for row in rows:
            out = model(torch.tensor([[*row.context, *row.tokens]]), output_loops=True)
            for t, loop in enumerate(out.loop_hidden_states):
                table = torch.log_softmax(model.lm_head(loop[0]), -1)
                for j in range(row.sample.branch, len(row.tokens)):
                    at = len(row.context) + j - 1
                    weight = readout.weights_[t] if readout.weights_ else out.exit_probabilities[0, at, t].detach()
                    loss = -weight * row.advantages[j].item() * table[at, row.tokens[j]] / total
                    loss.backward(retain_graph=True)
        assert_near(
            gradient, {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        )
        gate = [g for n, g in gradient.items() if "early_exit_gate" in n]
        assert all(float(g.abs().max()) == 0.0 for g in gate)


def test_loops_of_a_model_that_has_none_are_refused():
    with pytest.raises(UserError, match="qwen3 has no loops to read out"):
        result("qwen3", two_rows(), rloo().replace(readout=Loops((0.2, 0.3, 0.5))))
    with pytest.raises(UserError, match="runs loops 1 to 3"):
        result("looped", two_rows(), rloo().replace(readout=Loops((0.5, 0.5), loops=(3, 4))))
    with pytest.raises(UserError, match="runs loops 1 to 3"):
        result("looped", two_rows(), rloo().replace(readout=Loops((1.0,), loops=(0,))))
    assert LastLoop().loops is None
