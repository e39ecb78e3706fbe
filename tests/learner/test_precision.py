"""The learner below autocast: bfloat16 products, float32 weights, losses and gradients that are those of float32."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from mulligan.learner import scoring
from mulligan.methods import build_schedule
from mulligan.methods.grpo import grpo
from mulligan.models import attention
from mulligan.models.adapters import Lora, add_adapter
from mulligan.models.attention import Branches, tree_attention
from mulligan.objective import REFERENCE, START
from mulligan.types import Row
from tests.helpers import LOOPS, Probe, flat, make_row, make_sample, tiny, tokens

HALF = torch.bfloat16
KINDS = ("qwen3", "looped")


def rows_of(count: int = 6) -> list[Row]:
    """Two groups, each behind a context of its own."""
    contexts = [(1, *tokens(12, seed=50)), (1, *tokens(5, seed=51))]
    samples = [
        make_sample(uid=k, group=k % 2, context=contexts[k % 2], response=tokens(4 + 3 * k, seed=k))
        for k in range(count)
    ]
    return [make_row(sample, [1.0, -0.5, 0.7][k % 3]) for k, sample in enumerate(samples)]


def gradient(model, method=None, *, rows: list[Row] | None = None, **plan) -> torch.Tensor:
    probe = Probe(copy.deepcopy(model), **plan)
    probe.update(rows_of() if rows is None else rows, method or grpo())
    assert all(p.dtype == torch.float32 for p in probe.model.parameters())
    assert all(g.dtype == torch.float32 for g in probe.gradients[-1].values())
    return flat(probe.gradients[-1])


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(left @ right / (left.norm() * right.norm()))


def alike(half: torch.Tensor, exact: torch.Tensor, model, *more, **plan) -> None:
    """About as far off as with rounded weights alone, in float32. The looped model is the more sensitive to either."""
    weights = copy.deepcopy(model)
    for parameter in weights.parameters():
        parameter.data = parameter.data.to(HALF).float()
    rounding = float((gradient(weights, *more, **plan) - exact).norm())
    assert rounding / 3 < float((half - exact).norm()) < 3 * rounding
    assert cosine(half, exact) > 0.98


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_float32s_within_rounding(kind, share):
    model = tiny(kind, torch.float32)
    exact = gradient(model, share_prefixes=share)
    alike(gradient(model, autocast=HALF, share_prefixes=share), exact, model)
    alike(gradient(model, autocast=HALF, share_prefixes=share, tokens_per_micro_batch=30), exact, model)


def test_so_are_those_of_all_loops():
    model = tiny("looped", torch.float32)
    method = build_schedule("rltt").schedule.at(0)
    alike(gradient(model, method, autocast=HALF), gradient(model, method), model, method)


def test_so_are_an_adapters():
    model = tiny("qwen3", torch.float32)
    add_adapter(model, Lora(rank=4), seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.1)
    alike(gradient(model, autocast=HALF), gradient(model), model)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_is_below_the_same_autocast(kind, monkeypatch):
    model = tiny(kind, torch.float32)
    whole = gradient(model, autocast=HALF)
    again = copy.deepcopy(model)
    again.activation_checkpointing_enable({"use_reentrant": False})
    assert cosine(gradient(again, autocast=HALF), whole) > 0.99999
    exact = gradient(model)
    monkeypatch.setattr(scoring, "CHUNK", 8 * 68)  # the head in tiles
    alike(gradient(model, autocast=HALF), exact, model)


@pytest.mark.parametrize("kind", KINDS)
def test_streams_are_float32_and_those_of_the_update(kind):
    """A stream without gradients before the update must not leave weights behind that were cast without gradients."""
    model = tiny(kind, torch.float32)
    probe, plain = Probe(model, autocast=HALF), Probe(copy.deepcopy(model))
    rows, exact = rows_of(), rows_of()
    probe.learner.fill_streams(rows, [START, replace(START, quantity="entropy")], lambda row, _: row.context)
    plain.learner.fill_streams(exact, [START], lambda row, _: row.context)
    for row, other in zip(rows, exact, strict=True):
        assert {stream.dtype for stream in row.streams.values()} == {torch.float32}
        off = (row.streams[START.name] - other.streams[START.name]).abs()
        assert 0 < float(off.mean()) < 0.1
    _, found = probe.update(rows, grpo())
    assert flat(found).equal(gradient(model, autocast=HALF))
    assert not torch.is_autocast_enabled("cpu")


def test_several_updates_and_a_reference():
    model = tiny("looped", torch.float32)
    method = build_schedule("grpo", {"kl": 0.1}).schedule.at(0)
    probe = Probe(model, reference=copy.deepcopy(model), autocast=HALF, epochs=2, updates_per_batch=2)
    rows = rows_of()
    probe.learner.fill_streams(rows, [REFERENCE], lambda row, _: row.context)
    metrics = probe.learner.update(rows, method, 0)
    # The rate is 0: policy, start and reference are the same weights, read in other batches.
    assert metrics["update/ratio_off"] < 0.02 and abs(metrics.get("update/penalty", 0.0)) < 1e-3


def test_exit_probabilities_are_never_in_half_precision():
    model = tiny("looped", torch.float32)
    states = [torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(k)) for k in range(LOOPS)]
    with torch.autocast("cpu", dtype=HALF):
        half = model.model._gates(states)
    assert half.equal(model.model._gates(states))


# --- attention ------------------------------------------------------------------------------------------

TREE = Branches(runs=((0, 5, 1), (5, 3, 2), (11, 4, 1)), shared=((0, 5, 11),))


@pytest.mark.parametrize("threshold", [1 << 15, 0])
def test_attention_over_trees(threshold, monkeypatch):
    """Short rows in float32, where that is faster, bit for bit; long ones in bfloat16."""
    monkeypatch.setattr(attention, "_HALF_PAYS", threshold)
    drawn = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 15, 8, generator=drawn).requires_grad_() for _ in range(3))
    out = tree_attention(q, k, v, TREE)
    exact = torch.autograd.grad(out.square().sum(), (q, k, v))
    with torch.autocast("cpu", dtype=HALF):
        half = tree_attention(q, k, v, TREE)
    found = torch.autograd.grad(half.float().square().sum(), (q, k, v))
    if threshold:
        assert half.equal(out) and all(f.equal(e) for f, e in zip(found, exact, strict=True))
    else:
        assert half.dtype == HALF and not half.float().equal(out)
        for near, wanted in zip((half, *found), (out, *exact), strict=True):
            assert near.dtype == (HALF if near is half else torch.float32)
            assert float((near.float() - wanted).detach().abs().max()) < 0.03 * float(wanted.detach().abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_flat_attention_in_either_precision(kind, monkeypatch):
    model = tiny(kind, torch.float32)
    exact = gradient(model, share_prefixes=False)
    monkeypatch.setattr(attention, "_HALF_PAYS", 0)
    alike(gradient(model, autocast=HALF, share_prefixes=False), exact, model)
    alike(gradient(model, autocast=HALF), exact, model)
