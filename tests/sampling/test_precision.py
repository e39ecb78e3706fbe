"""Sampling in bfloat16: what is rounded, of which weights, and that the learner never takes it for its own."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mulligan.checkpoint import load_model_tensors, model_tensors
from mulligan.learner.update import Learner, Plan
from mulligan.methods import build_schedule
from mulligan.models.adapters import Lora, adapter_off, add_adapter
from mulligan.models.forks import Forks, forked_attention, hidden
from mulligan.models.loading import load_model, save_model
from mulligan.objective import START
from mulligan.sampling import precision
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.sampling.precision import RoundedSampler, speedup
from mulligan.types import Row
from tests.helpers import flat, make_row, make_sample, tokens
from tests.sampling.helpers import ask, build, collect

REQUESTS = [ask([5, 6, 7, 8], 4), ask([9], 3, index=1), ask(range(3, 20), 2, index=2)]


@pytest.fixture(scope="module")
def tied():
    return build(Qwen3ForCausalLM, Qwen3Config, head_dim=8, initializer_range=0.2, tie_word_embeddings=True)


@pytest.fixture(params=["qwen", "looped", "tied"])
def policy(request):
    return copy.deepcopy(request.getfixturevalue(request.param))


@pytest.fixture
def rounded(tokenizer):
    return partial(RoundedSampler, tokenizer=tokenizer, max_new_tokens=9)


def changed(policy, rounded, change) -> None:
    """``change`` is seen by a sampler that was there before it."""
    sampler = rounded(policy)
    before = collect(sampler, REQUESTS)
    change()
    after = collect(sampler, REQUESTS)
    assert before != after == collect(rounded(policy), REQUESTS)


# --- what is rounded ------------------------------------------------------------------------------------


def test_it_samples_as_the_checkpoint_does_that_is_loaded_in_bfloat16(policy, rounded, tokenizer, tmp_path):
    save_model(policy, tokenizer, tmp_path)
    policy, loaded = (load_model(str(tmp_path), dtype=dtype, device="cpu").model for dtype in ("float32", "bfloat16"))
    sampler = rounded(policy)
    found = collect(sampler, REQUESTS)
    assert found == collect(EmbeddedSampler(loaded, tokenizer, max_new_tokens=9), REQUESTS)
    assert found != collect(EmbeddedSampler(policy, tokenizer, max_new_tokens=9), REQUESTS)
    assert {p.dtype for p in sampler.model.parameters()} == {torch.bfloat16}
    buffers = dict(policy.named_buffers())
    assert all(b.dtype == buffers[n].dtype and b.equal(buffers[n]) for n, b in sampler.model.named_buffers())


def test_the_policy_is_not_touched(policy, rounded):
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.train()
    sampler = rounded(policy)
    collect(sampler, REQUESTS)
    assert policy.training and all(p.requires_grad and p.dtype == torch.float32 for p in policy.parameters())
    assert all(value.equal(before[name]) for name, value in policy.state_dict().items())
    storages = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    assert storages.isdisjoint(p.untyped_storage().data_ptr() for p in sampler.model.parameters())


def test_tied_weights_stay_tied(tied, rounded):
    model = rounded(tied).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# --- of which weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Adafactor"])
def test_it_sees_an_optimizers_step(policy, rounded, name):
    optimizer = getattr(torch.optim, name)(policy.parameters(), lr=0.05)

    def step():
        policy(input_ids=torch.arange(3, 12)[None]).logits.logsumexp(-1).sum().backward()
        optimizer.step()

    changed(policy, rounded, step)


def test_it_sees_weights_that_are_loaded_or_put_back(looped, rounded, tokenizer):
    policy = copy.deepcopy(looped)
    other = {name: value + 0.1 for name, value in model_tensors(policy).items()}
    learner = Learner(policy, tokenizer, torch.optim.SGD(policy.parameters()), Plan(), rate=lambda _: 0.0)
    undo = learner.snapshot()
    changed(policy, rounded, lambda: load_model_tensors(policy, other))
    changed(policy, rounded, undo)
    changed(policy, rounded, lambda: policy.lm_head.weight.data.mul_(1.5))


def test_an_adapter_is_rounded_by_itself(policy, rounded):
    base = collect(rounded(policy), REQUESTS)
    add_adapter(policy, Lora(rank=2, alpha=2.0), seed=0)
    sampler = rounded(policy)
    assert collect(sampler, REQUESTS) == base  # B is 0

    def learn(size: float):
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(size)

    # 1e-4 beside weights of about 0.2: added to them it would be lost in all but the smallest, which round at 0.1 %.
    learn(1e-4)
    small = collect(sampler, REQUESTS)
    assert small != base and small == collect(rounded(policy), REQUESTS)
    changed(policy, rounded, lambda: learn(0.1))
    learnt = collect(sampler, REQUESTS)
    with adapter_off(policy):  # what the learner does for its reference is no business of the sampler's copy
        assert collect(sampler, REQUESTS) == learnt != base
    assert all(p.dtype == torch.bfloat16 for p in sampler.model.parameters())


# --- what the learner makes of it -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "dapo", "reinforce"])
@pytest.mark.parametrize("updates", [1, 2])
def test_the_learner_takes_its_own_numbers_for_the_start(looped, tokenizer, name, updates):
    """The gradient is the same bit for bit whatever the sampler says its log-probs were; only the log tells."""
    found = []
    for said in (-0.5, -3.0):
        model = copy.deepcopy(looped)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        plan = Plan(updates_per_batch=updates, epochs=updates, max_new_tokens=8)
        learner = Learner(model, tokenizer, optimizer, plan, rate=lambda _: 0.1)
        rows: list[Row] = []
        for k in range(4):
            sample = make_sample(uid=k, group=k // 2, context=(4, 5), response=[3 + t % 20 for t in tokens(6, seed=k)])
            sample.behavior_logprobs = (said,) * 6
            rows.append(make_row(sample, 1.0 if k % 2 else -1.0))
        metrics = learner.update(rows, build_schedule(name).schedule.at(0), 0)
        found.append((metrics, {n: p.detach().clone() for n, p in model.named_parameters()}))
        assert all(START.name in row.streams for row in rows) or name == "reinforce"
    (one, weights), (other, again) = found
    assert flat(weights).equal(flat(again)) and not flat(weights).equal(flat(dict(looped.named_parameters())))
    assert one["mismatch/mean"] != other["mismatch/mean"]
    assert {k: v for k, v in one.items() if "mismatch" not in k} == {
        k: v for k, v in other.items() if "mismatch" not in k
    }


# --- what is faster -------------------------------------------------------------------------------------


def test_the_median_of_interleaved_pairs(qwen, tokenizer, monkeypatch):
    """Trials of 90 and 1 s (which warm up), 2 and 1, 8 and 2, 3 and 1: ratios of 2, 4 and 3, the median 3."""
    ends = iter([90.0, 1.0, 2.0, 1.0, 8.0, 2.0, 3.0, 1.0])
    asked: list[tuple[type, int, set[int]]] = []

    class Clock:
        """Stands still but for the trials: what a sampler asks is not counted."""

        now, inside = 0.0, False

        def perf_counter(self) -> float:
            self.now += next(ends) if self.inside else 0.0
            self.inside = not self.inside
            return self.now

    run = EmbeddedSampler.run

    def noted(self, requests, on_done):
        lengths: list[int] = []

        def done(request, completions):
            lengths.extend(len(c.tokens) for c in completions)
            return on_done(request, completions)

        run(self, requests, done)
        asked.append((type(self), len(lengths), set(lengths)))

    monkeypatch.setattr(precision, "time", Clock())
    monkeypatch.setattr(EmbeddedSampler, "run", noted)
    prompts = [(r.problem, r.context) for r in REQUESTS]
    # Of 3 prompts x 8 samples 20 have a place; 100 tokens are 5 each.
    settings = {"max_rows": 20, "max_new_tokens": 50, "stop": ("a",)}
    assert speedup(qwen, tokenizer, prompts, settings, tokens=100, pairs=3) == 3.0
    assert asked == [(EmbeddedSampler, 20, {5}), (RoundedSampler, 20, {5})] * 4


# --- attention to shared prompts ------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_to_shared_prompts_is_float32s_within_rounding(heads, padded):
    """The same bfloat16 numbers in float32, where it has a test of its own; keys are a view of a cache with room."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).bfloat16()

    (queries, shared), size, long, wide = heads, 8, 6, 5
    q, prompts = normal(5, queries, 1, size), (normal(2, shared, long, size), normal(2, shared, long, size))
    k, v = (normal(5, shared, wide + 3, size)[:, :, :wide] for _ in range(2))
    pads = torch.tensor([0, 4, 2, 0, 1])
    for states in (k, v):
        states[1, :, :4] = 100.0  # padding that would be noticed
    forks = Forks.of(torch.tensor([0, 1, 1, 0, 1]), torch.tensor([0, 2]), long)
    if padded:
        forks = replace(forks, own_bias=hidden(pads, wide)[:, None])
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        own = k.to(dtype)
        setattr(own, "prompts", tuple(p.to(dtype) for p in prompts))  # noqa: B010
        found.append(forked_attention(q.to(dtype), own, v.to(dtype), forks).float())
    half, exact = found
    largest = exact.abs().amax(-1, keepdim=True)
    assert bool(((half - exact).abs() < 0.02 * largest + 0.01).all()) and not half.equal(exact)
