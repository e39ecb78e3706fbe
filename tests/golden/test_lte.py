"""LTE (arXiv 2510.26109) and its controls as exact numbers, and what of a hint reaches the learner.

The batch: four fresh samples of five tokens that all fail, and a second round behind a hint: H4 passes with five
tokens, H5 fails, H6 passes with two tokens, H7 fails. So H4 and H6 replace two of the failures. Of the ratios 0.5, 0.9,
1, 1.1, 2, H4's are u = pi(o|x) / pi_start(o|hint, x), the failures' rho = pi(o|x) / pi_start(o|x); H6's are 1.
"""

from __future__ import annotations

import pytest
import torch

from mulligan.assign import assign
from mulligan.method import Method, Term
from mulligan.methods import PRESETS
from mulligan.methods.grpo import grpo
from mulligan.methods.lte import grpo_extra, lte
from mulligan.objective import SAMPLED, START, Clipped, EntropyBonus, Shaped
from mulligan.rollout import climb
from mulligan.sampling.scripted import ScriptedSampler
from mulligan.select import SwapFailures
from mulligan.types import EXTRA, FRESH, HINTED, Forest, Row, Sample
from tests.golden.tables import (
    DOWN_LOSSES,
    DOWN_SLOPES,
    EPS,
    HINT,
    MAX_NEW_TOKENS,
    PROBLEM,
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
from tests.golden.test_losses import Case
from tests.helpers import TASK, TEXTS, TOKENIZER, Probe, assert_near, flat, make_forest, tiny

H4, H5, H6, H7 = range(4, 8)
FAILURES = [sample_of(uid, 0.0) for uid in range(4)]
SECOND = [
    sample_of(uid, reward, length, group=1, origin=HINTED)
    for uid, reward, length in ((H4, 1.0, 5), (H5, 0.0, 3), (H6, 1.0, 2), (H7, 0.0, 4))
]
TREE = [*FAILURES, *SECOND]
GIVEN = dict.fromkeys((0, 1, 2, 3, H4), RATIOS)
# Rewards 1, 1, 0, 0: mean 1/2, std 1/2.
A = 0.5 / (0.5 + EPS)
# f(u) = u / (u + 1/10) at 0.5, 0.9, 1, 1.1, 2, and its slope in log u, (1/10) u / (u + 1/10)^2
F = (0.5 / 0.6, 0.9 / 1.0, 1.0 / 1.1, 1.1 / 1.2, 2.0 / 2.1)
F_SLOPE = (0.05 / 0.36, 0.09 / 1.0, 0.1 / 1.21, 0.11 / 1.44, 0.2 / 4.41)


def stayed(found: dict) -> list[int]:
    return [uid for uid in found if uid < 4]


def test_lte():
    # 5 + 2 hinted tokens and 2 * 5 of the failures that stay, one denominator: 17.
    found = table(lte(4), TREE, ratios=GIVEN)
    assert len(found) == 4 and {H4, H6} < set(found)
    check(found[H4], advantage=A, weight=1 / 17, losses=times(-A, F), slopes=times(-A, F_SLOPE))
    check(found[H6], advantage=A, weight=1 / 17, losses=[-A / 1.1] * 2, slopes=[-A * 0.1 / 1.21] * 2)
    for uid in stayed(found):
        check(found[uid], advantage=-A, weight=1 / 17, losses=times(A, DOWN_LOSSES), slopes=times(A, DOWN_SLOPES))


def test_gamma():
    # gamma = 1/2, u = 1: f = 1 / 1.5, slope 0.5 / 2.25; u = 1/2: f = 1/2, slope 1/4, the largest there is.
    found = table(lte(4, gamma=0.5), TREE, ratios={H6: (1.0, 0.5)})
    check(found[H6], advantage=A, weight=1 / 17, losses=[-A / 1.5, -A / 2], slopes=[-A * 0.5 / 2.25, -A / 4])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_shaped_ratio_of_both_signs(sign):
    """No clip in either direction; a small ratio is what it pays most for."""
    case = Case((RATIOS,), (float(sign),))
    view = case.view()
    view.streams = {SAMPLED.name: view.streams[START.name]}
    losses = Shaped()(view)
    (slope,) = torch.autograd.grad(losses.sum(), view.policy_logprobs)
    assert losses.tolist() == pytest.approx(times(-sign, F))
    assert slope.tolist() == pytest.approx(times(-sign, F_SLOPE))


def test_a_clipped_ratio_in_place_of_the_shaped_one():
    found = table(lte(4, ratio="clipped"), TREE, ratios=GIVEN)
    check(found[H4], advantage=A, weight=1 / 17, losses=times(A, UP_LOSSES), slopes=times(A, UP_SLOPES))
    for uid in stayed(found):
        check(found[uid], advantage=-A, weight=1 / 17, losses=times(A, DOWN_LOSSES), slopes=times(A, DOWN_SLOPES))


def test_separate_denominators():
    # The 7 hinted tokens have one, the 10 others another.
    found = table(lte(4, separate=True), TREE, ratios=GIVEN)
    check(found[H4], advantage=A, weight=1 / 7, losses=times(-A, F), slopes=times(-A, F_SLOPE))
    check(found[H6], advantage=A, weight=1 / 7, losses=[-A / 1.1] * 2, slopes=[-A * 0.1 / 1.21] * 2)
    for uid in stayed(found):
        check(found[uid], advantage=-A, weight=1 / 10, losses=times(A, DOWN_LOSSES), slopes=times(A, DOWN_SLOPES))


def test_most():
    # One rescue: rewards 1, 0, 0, 0; mean 1/4, std sqrt(3)/4. 5 + 3 * 5 tokens.
    found = table(lte(4, most=1), TREE, ratios=GIVEN)
    assert len(found) == 4 and H4 in found and H6 not in found
    std = 3**0.5 / 4 + EPS
    check(
        found[H4], advantage=0.75 / std, weight=1 / 20, losses=times(-0.75 / std, F), slopes=times(-0.75 / std, F_SLOPE)
    )
    assert [found[uid].advantage for uid in stayed(found)] == pytest.approx([-0.25 / std] * 3, rel=3e-7)


def test_as_many_rescues_as_failures():
    """By default one failure stays, whatever the second round brings; as published none, and nothing is learned."""
    every = [*FAILURES, *(sample_of(uid, 1.0, group=1, origin=HINTED) for uid in range(4, 8))]
    found = table(lte(4), every)
    assert len(stayed(found)) == 1 and len(found) == 4
    # Rewards 1, 1, 1, 0: mean 3/4, std sqrt(3)/4.
    std = 3**0.5 / 4 + EPS
    assert sorted(line.advantage for line in found.values()) == pytest.approx(
        [-0.75 / std, *[0.25 / std] * 3], rel=3e-7
    )
    published = table(method_of("lte-published", group_size=4), every)
    assert set(published) == {4, 5, 6, 7} and {line.advantage for line in published.values()} == {0.0}


def test_lte_dagger_and_published():
    plain, dagger = lte(), method_of("lte-dagger")
    assert dagger.replace(name="lte", regularisers=()) == plain
    assert dagger.terms[0].regularisers == (EntropyBonus(coefficient=1e-3),)
    assert lte(entropy_bonus=0.5).terms[0].regularisers == (EntropyBonus(coefficient=0.5),)
    published = method_of("lte-published")
    assert published.replace(select=plain.terms[0].select) == plain
    assert published.terms[0].select == SwapFailures(origin=HINTED, most=8)
    for name in ("lte-published", "lte-dagger-published", "grpo-extra-published"):
        assert PRESETS[name].run == {"optimizer.updates_per_batch": 4}


def test_grpo_extra():
    """LTE's swap with samples of the plain prompt: PPO's surrogate, one ratio, one denominator."""
    extra = [sample_of(s.uid, s.grade.reward, len(s.tokens), group=1, origin=EXTRA) for s in SECOND]
    found = table(grpo_extra(4), [*FAILURES, *extra], ratios=GIVEN)
    assert len(found) == 4
    check(found[H4], advantage=A, weight=1 / 17, losses=times(A, UP_LOSSES), slopes=times(A, UP_SLOPES))
    check(found[H6], advantage=A, weight=1 / 17, losses=[-A] * 2, slopes=[-A] * 2)
    for uid in stayed(found):
        check(found[uid], advantage=-A, weight=1 / 17, losses=times(A, DOWN_LOSSES), slopes=times(A, DOWN_SLOPES))
    assert grpo_extra().terms[0].reads == (START,)


def test_silent_failures():
    # The failures' A is 0; they stay in the denominator.
    found = table(method_of("lte-silent-failures", group_size=4), TREE, ratios=GIVEN)
    check(found[H4], advantage=A, weight=1 / 17, losses=times(-A, F), slopes=times(-A, F_SLOPE))
    for uid in stayed(found):
        check(found[uid], advantage=0, weight=1 / 17, losses=[0] * 5, slopes=[0] * 5)


def test_other_answers_is_lte_but_for_whose_answers_they_are():
    control = method_of("lte-other-answers")
    assert control.terms == lte().terms
    fresh, hinted = control.passes
    assert (fresh, hinted.n, hinted.source) == (lte().passes[0], 8, "other")


# ---- where some pass, it is GRPO ---------------------------------------------------------------


def mixed(first: int) -> list[Sample]:
    return [sample_of(first + k, reward, 3 + k, group=first) for k, reward in enumerate((0.0, 1.0, 0.0))]


@pytest.mark.parametrize("kind", ["qwen3", "looped"])
def test_groups_with_a_pass_and_unrescued_ones_are_grpos(kind):
    """Loss and gradient, with real ratios: the second of two updates. No stream behind another context is computed."""
    solved = [sample_of(30 + k, 1.0, 4, group=30) for k in range(2)]
    hopeless = [sample_of(40 + k, 0.0, 4, group=40) for k in range(3)]
    retried = [sample_of(50 + k, 0.0, 6, group=41, origin=HINTED) for k in range(3)]
    found = []
    for method, tree in ((lte(3), [*hopeless, *retried]), (grpo(3), hopeless)):
        probe = Probe(tiny(kind), rate=0.3, epochs=2)
        forest = make_forest(mixed(10), solved, tree, mixed(20))
        rows = assign(method, forest, TEXTS, probe.learner.fill_streams, MAX_NEW_TOKENS)
        assert len(rows) == 11 and all(row.sample.origin == FRESH and not row.streams for row in rows)
        metrics = probe.learner.update(rows, method, 0)
        found.append((metrics["update/loss"], probe.gradients, metrics["update/ratio_off"]))
    (loss, gradients, off), (expected, others, _) = found
    assert loss == pytest.approx(expected, rel=1e-12) and off > 0.01
    for mine, theirs in zip(gradients, others, strict=True):
        assert_near(mine, theirs, 1e-12)


# ---- the hint and the learner ------------------------------------------------------------------


def grown() -> Forest:
    """Two problems: of the first every fresh sample fails with the answer 123 and behind the hint two of three pass;
    the second is solved by one sample of three."""

    def script(request, attempt: int) -> str:
        right = attempt > 0 if request.origin == HINTED else attempt == 1 and request.problem.index == 1
        return TASK.solution(request.problem) if right else r"\boxed{123}"

    cast = [(i, TASK.problem("train", i)) for i in range(2)]
    passes = lte(3).passes
    sampler = ScriptedSampler(TOKENIZER, script)
    return Forest(0, climb(cast, passes, seed=0, texts=TEXTS, sampler=sampler, grade=TASK.grade))


def log_p(model, context: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *response]])).logits[0]
    return torch.log_softmax(logits, -1)[len(context) - 1 : -1].gather(1, torch.tensor(response)[:, None])[:, 0]


@pytest.mark.parametrize("updates", [1, 2])
def test_the_hint_is_where_the_start_was_sampled_and_nowhere_else(updates):
    method, model = lte(3), tiny("qwen3")
    forest = grown()
    probe = Probe(model, epochs=updates)
    asked: list[tuple[str, list[Row]]] = []
    filling = probe.learner.fill_streams

    def fill(rows, streams, build) -> None:
        asked.extend((stream.name, list(rows)) for stream in streams)
        filling(rows, streams, build)

    rows = assign(method, forest, TEXTS, fill, 60)
    assert [row.sample.origin for row in rows].count(HINTED) == 2 and len(rows) == 6
    hinted = [row for row in rows if row.sample.origin == HINTED]
    # One scoring, of the hinted rows alone, before anything is updated.
    assert [(name, len(of)) for name, of in asked] == [(SAMPLED.name, 2)] and asked[0][1] == hinted
    packed: list[tuple[int, ...]] = []
    hook = model.base_model.register_forward_hook(
        lambda module, _, given, __: (
            packed.extend(map(tuple, given["input_ids"].tolist())) if module.training else None
        ),
        with_kwargs=True,
    )
    probe.update(rows, method)
    hook.remove()
    first = forest.trees[0].problem
    hint = TEXTS.hint(first, ["123"])
    for row in rows:
        problem = row.sample.request.problem
        plain = TEXTS.prompt(problem)
        assert row.context == plain
        assert torch.allclose(row.streams[START.name][row.mask].double(), log_p(model, plain, row.tokens), atol=1e-5)
        assert any(ids[: len(plain) + len(row.tokens)] == (*plain, *row.tokens) for ids in packed)
        if row in hinted:
            assert row.sample.request.context == hint != plain
            behind = log_p(model, hint, row.tokens)
            assert torch.allclose(row.streams[SAMPLED.name].double(), behind, atol=1e-5)
            assert not torch.allclose(behind, log_p(model, plain, row.tokens), atol=1e-2)
            assert not row.as_start
        else:
            assert SAMPLED.name not in row.streams and row.as_start == {SAMPLED.name}
    assert not any(ids[: len(hint)] == hint for ids in packed) and len(packed) == 6 * updates


def test_the_gradient_of_a_real_update_is_the_formulas():
    """Against -A u / (u + gamma) and -rho A on plain log-probs, all over the tokens of the batch."""
    method, model = lte(3), tiny("looped")
    probe = Probe(model)
    rows = assign(method, grown(), TEXTS, probe.learner.fill_streams, 60)
    loss, gradient = probe.update(rows, method)
    model.zero_grad()
    total = sum(len(row.tokens) for row in rows)
    expected = 0.0
    for row in rows:
        logits = model(torch.tensor([[*row.context, *row.tokens]])).logits[0]
        table_ = torch.log_softmax(logits, -1)[len(row.context) - 1 : -1]
        policy = table_.gather(1, torch.tensor(row.tokens)[:, None])[:, 0]
        if row.sample.origin == HINTED:
            u = torch.exp(policy - log_p(model, row.sample.request.context, row.tokens).float())
            terms = u / (u + 0.1)
        else:
            terms = torch.exp(policy - policy.detach())
        mine = -(row.advantages[-1].double() * terms).sum() / total
        mine.backward()
        expected += mine.item()
    assert loss == pytest.approx(expected, rel=1e-9)
    own = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    assert_near(gradient, own)
    assert float(flat(gradient).norm()) > 0


def test_a_ratio_to_what_was_sampled_alone():
    """A loss that reads no other start, on rows without a hint, in several updates: there it is the plain start."""
    alone = Method(name="alone", terms=(Term(surrogate=Clipped(below=SAMPLED)),))
    found = []
    for method in (alone, grpo()):
        probe = Probe(tiny("qwen3"), rate=0.1, updates_per_batch=2)
        rows = assign(method, make_forest(mixed(10), mixed(20)), TEXTS, probe.learner.fill_streams, MAX_NEW_TOKENS)
        found.append((probe.update(rows, method)[0], probe.gradients))
    (loss, gradients), (expected, others) = found
    assert loss == expected
    for mine, theirs in zip(gradients, others, strict=True):
        assert_near(mine, theirs)


def test_a_hinted_row_without_its_start_is_an_error():
    """Not taken for a row without a hint."""
    method: Method = lte(3)
    rows = rows_of(method, TREE)
    hinted = next(row for row in rows if row.sample.origin == HINTED)
    assert hinted.sample.request.context == HINT != TEXTS.prompt(PROBLEM)
    with pytest.raises(ValueError, match=r"lte: 'start_logprobs@sampling' is missing in the row of sample [46]"):
        Probe(tiny("qwen3")).update(rows, method)
