"""The embedded sampler against transformers' own generate, full forwards, and itself in other company."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from mulligan.errors import UserError
from mulligan.sampling import Sampler, embedded, prefill
from mulligan.sampling.cache import can_grow
from mulligan.sampling.embedded import EmbeddedSampler, draw
from mulligan.seeds import seed_of
from tests.sampling.helpers import ask, build, collect, drawn

LETTERS = range(3, 29)


def contexts(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randint(3, 29, (length,), generator=generator).tolist()) for length in lengths]


def generate(model, prompts, steps, *eos):
    """Greedy texts of ``transformers.generate``, cut after the first of the tokenizer's EOS (1) and ``eos``."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    ends = [1, *eos]
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=steps, eos_token_id=ends, pad_token_id=0
    )
    rows = []
    for row in out[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        rows.append(tuple(row[:end]))
    return rows


def greedy_is_generate(model, tokenizer, prompts, steps):
    sampler = EmbeddedSampler(model, tokenizer, temperature=0.0, max_new_tokens=steps)
    ours = drawn(sampler, [ask(p, index=i) for i, p in enumerate(prompts)])
    assert [row for (row,) in ours] == generate(model, prompts, steps)


@pytest.mark.parametrize("lengths", [(7, 7, 7), (3, 11, 6, 1, 11)], ids=["same", "padded"])
def test_greedy_is_generate(model, tokenizer, lengths):
    greedy_is_generate(model, tokenizer, contexts(*lengths), 12)


def test_greedy_is_generate_with_eos(model, tokenizer, monkeypatch):
    prompts = contexts(4, 9, 6, 9, 2, 5)
    free = generate(model, prompts, 14)
    eos = max(set(free[0]), key=lambda token: sum(token in row[2:-2] for row in free))
    monkeypatch.setattr(model.generation_config, "eos_token_id", [eos, 29])
    expected = generate(model, prompts, 14, eos, 29)
    assert len({len(row) for row in expected}) > 1
    groups = collect(EmbeddedSampler(model, tokenizer, temperature=0.0, max_new_tokens=14), [ask(p) for p in prompts])
    assert [c.tokens for (c,) in groups] == expected
    assert [c.finish for (c,) in groups] == ["stop" if row[-1] in (1, 29, eos) else "length" for row in expected]


@pytest.mark.parametrize("kind", ["sliding", "convolutions", "positions"])
def test_other_architectures(tokenizer, kind):
    if kind == "sliding":
        model = build(MistralForCausalLM, MistralConfig, sliding_window=5, initializer_range=0.2)
    elif kind == "convolutions":
        model = build(Lfm2ForCausalLM, Lfm2Config, layer_types=["conv", "full_attention"], initializer_range=0.2)
    else:
        model = build(GPT2LMHeadModel, GPT2Config, n_positions=64, initializer_range=0.2)
    assert can_grow(model.config) == (kind != "convolutions")
    greedy_is_generate(model, tokenizer, contexts(3, 11, 6, 1, 11), 12)


def test_a_recurrent_model_is_refused(tokenizer):
    model = MambaForCausalLM(MambaConfig(vocab_size=30, hidden_size=8, state_size=4, num_hidden_layers=1))
    with pytest.raises(UserError, match="past_key_values"):
        EmbeddedSampler(model, tokenizer)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_behaviour_logprobs_are_those_of_a_full_forward(model, tokenizer, temperature):
    requests = [ask(p, 5, index=i, seed=i) for i, p in enumerate(contexts(3, 9, 5))]
    requests[1] = replace(requests[1], prefix=(4, 5, 6))
    sampler = EmbeddedSampler(model, tokenizer, temperature=temperature, max_new_tokens=15)
    for request, completions in zip(requests, collect(sampler, requests), strict=True):
        for completion in completions:
            prompt = request.context + request.prefix
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion.tokens])).logits[0, len(prompt) - 1 : -1]
            expected = (logits / (temperature or 1.0)).log_softmax(-1)
            expected = expected.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]
            assert torch.allclose(torch.tensor(completion.behavior_logprobs), expected, atol=1e-5, rtol=0)


def test_company_changes_nothing(model, tokenizer, monkeypatch):
    requests = [ask(p, 6, index=i, seed=i, max_new_tokens=4 + 5 * i) for i, p in enumerate(contexts(3, 14, 5, 9))]
    requests[2] = replace(requests[2], temperature=0.5)
    requests[3] = replace(requests[3], prefix=(7, 8))
    whole = drawn(EmbeddedSampler(model, tokenizer), requests)
    assert len({row for group in whole for row in group}) > 12
    for max_rows in (1, 4, 7):
        assert drawn(EmbeddedSampler(model, tokenizer, max_rows=max_rows), requests) == whole
    assert drawn(EmbeddedSampler(model, tokenizer), requests[::-1]) == whole[::-1]
    assert [drawn(EmbeddedSampler(model, tokenizer), [request])[0] for request in requests] == whole
    monkeypatch.setattr(prefill, "_TOKENS", 6)
    monkeypatch.setattr(embedded, "_COMPACT_AT", 1.0)
    assert drawn(EmbeddedSampler(model, tokenizer), requests) == whole


def test_a_prefix_is_continued_as_the_sample_went_on(model, tokenizer):
    (context,) = contexts(6)
    request = ask(context, 8, max_new_tokens=20)
    ((*samples,),) = collect(EmbeddedSampler(model, tokenizer), [request])
    again = [
        ask(context, seeds=(request.seeds[i],), prefix=sample.tokens[:k], max_new_tokens=20 - k)
        for i, sample in enumerate(samples)
        for k in (1, 4, len(sample.tokens) - 1)
        if 0 < k < len(sample.tokens)
    ]
    rest = drawn(EmbeddedSampler(model, tokenizer), again)
    assert [(*request.prefix, *row) for request, (row,) in zip(again, rest, strict=True)] == [
        s.tokens for s in samples for k in (1, 4, len(s.tokens) - 1) if 0 < k < len(s.tokens)
    ]


def test_num_loops_is_passed_on(looped, tokenizer):
    prompts = contexts(5, 5)
    one = EmbeddedSampler(looped, tokenizer, temperature=0.0, max_new_tokens=6, num_loops=1)
    ((first,), _) = drawn(one, [ask(p) for p in prompts])
    with torch.no_grad():
        logits = looped(torch.tensor([prompts[0]]), num_loops=1).logits[0, -1]
    assert first[0] == logits.argmax()


def test_lengths(qwen, tokenizer):
    prompts = contexts(5, 60, 63)
    sampler = EmbeddedSampler(qwen, tokenizer, max_new_tokens=7)
    sampler._eos = sampler._eos[:0]
    requests = [ask(p, 2, index=i) for i, p in enumerate(prompts)] + [ask(prompts[0], max_new_tokens=3)]
    groups = collect(sampler, requests)
    assert [[len(c.tokens) for c in group] for group in groups] == [[7, 7], [4, 4], [1, 1], [3]]  # 64 positions
    assert all(c.finish == "length" and len(c.behavior_logprobs) == len(c.tokens) for g in groups for c in g)


def test_rows_at_the_context_length_wait_within_it(tokenizer, monkeypatch):
    # A learned position table has no row 64; the finished row must not ask for it while it waits.
    model = build(GPT2LMHeadModel, GPT2Config, n_positions=64, initializer_range=0.2)
    monkeypatch.setattr(embedded, "_COMPACT_AT", 1.0)
    sampler = EmbeddedSampler(model, tokenizer, max_new_tokens=12)
    sampler._eos = sampler._eos[:0]
    groups = drawn(sampler, [ask(p) for p in contexts(62, 4)])
    assert [len(row) for (row,) in groups] == [2, 12]


@pytest.mark.parametrize("stop", ["a", "xy"])
def test_stop_strings(model, tokenizer, stop):
    requests = [ask(p, 40, index=i, seed=i, max_new_tokens=24) for i, p in enumerate(contexts(4, 6))]
    free = [c for group in collect(EmbeddedSampler(model, tokenizer), requests) for c in group]
    # Make the string one that appears: for "xy", the two tokens that follow each other most often.
    texts = [tokenizer.decode(c.tokens[:-1]) for c in free]
    if stop == "xy":
        pairs = [text[i : i + 2] for text in texts for i in range(len(text) - 1) if "<" not in text]
        stop = max(set(pairs), key=pairs.count)
    stopped = [c for group in collect(EmbeddedSampler(model, tokenizer, stop=[stop]), requests) for c in group]
    hits = 0
    for before, after in zip(free, stopped, strict=True):
        assert after.tokens == before.tokens[: len(after.tokens)]
        text = tokenizer.decode(after.tokens)
        if len(after.tokens) < len(before.tokens):
            hits += 1
            assert stop in text and after.finish == "stop"
        assert stop not in tokenizer.decode(after.tokens[:-1])
    assert hits > 3


def test_a_request_overrides_the_stop_strings(qwen, tokenizer):
    request = ask(contexts(4)[0], 8, max_new_tokens=10)
    sampler = EmbeddedSampler(qwen, tokenizer, stop=[tokenizer.decode([t]) for t in LETTERS])
    mixed = drawn(sampler, [request, replace(request, stop=("<pad><pad><pad><pad>",))])
    assert all(len(row) == 1 or set(row[:-1]).isdisjoint(LETTERS) for row in mixed[0])
    assert mixed[1] == drawn(EmbeddedSampler(qwen, tokenizer), [request])[0]


def test_on_done_may_ask_for_more(qwen, tokenizer):
    (context,) = contexts(5)
    order, modes = [], []

    def on_done(request, completions):
        order.append((request.origin, len(completions)))
        modes.append(torch.is_grad_enabled())
        if request.origin == "fresh":
            return [
                replace(request, n=1, seeds=(c.tokens[0],), prefix=c.tokens[:1], origin="reset") for c in completions
            ]
        if request.origin == "reset" and len(request.prefix) == 1:
            return [replace(request, prefix=request.prefix * 2, origin="again")]
        return ()

    sampler = EmbeddedSampler(qwen, tokenizer, max_new_tokens=4, max_rows=2)
    assert isinstance(sampler, Sampler)
    sampler._eos = sampler._eos[:0]
    sampler.run([ask(context, 3)], on_done)
    assert order == [("fresh", 3)] + [("reset", 1)] * 3 + [("again", 1)] * 3
    assert all(modes)
    assert sampler.stats["samples"] == 9


def test_stats_count_each_prompt_once(qwen, tokenizer):
    sampler = EmbeddedSampler(qwen, tokenizer, max_new_tokens=5)
    sampler._eos = sampler._eos[:0]
    a, b = contexts(5, 8)
    collect(sampler, [ask(a, 3), ask(b, 2), ask(a, 2, seed=1)])
    seconds = sampler.stats.pop("seconds")
    assert seconds > 0
    assert sampler.stats == {
        "refills": 1, "samples": 7, "prefill_tokens": 13, "decode_tokens": 35, "decode_rows": 28, "exit_loops": 0
    }  # fmt: skip


def test_a_request_is_reported_at_once_and_what_it_asks_for_takes_its_place(qwen, tokenizer):
    # Two places. 3 tokens, then 4 more in the place that falls free, beside one row of 9.
    short, long = contexts(5, 7)
    requests = [ask(long, max_new_tokens=9), ask(short, index=1, max_new_tokens=3)]
    order = []

    def on_done(request, completions):
        order.append((request.problem.index, request.origin, sampler.stats["decode_rows"]))
        if request.origin == "fresh" and request.problem.index == 1:
            return [replace(request, max_new_tokens=4, origin="hinted")]
        return ()

    sampler = EmbeddedSampler(qwen, tokenizer, max_rows=2)
    sampler._eos = sampler._eos[:0]
    sampler.run(requests, on_done)
    # Rows computed after the first tokens: 2 steps of both and 1 of the long one alone (what is reported then joins
    # behind it) are 5; 3 of both and 1 of the long one are 7 more; 1 more for its ninth token.
    assert order == [(1, "fresh", 5), (1, "hinted", 12), (0, "fresh", 13)]
    assert sampler.stats["refills"] == 2


def test_what_is_kept_of_a_padded_prompt_starts_an_empty_batch(model, tokenizer):
    # Ten places take 7 of the first and 3 of the second, padded by 3. All end at once; the other 4 are then alone.
    requests = [ask(p, 7, index=i, seed=i) for i, p in enumerate(contexts(9, 6))]
    few, many = (EmbeddedSampler(model, tokenizer, max_new_tokens=8, max_rows=rows) for rows in (10, 14))
    few._eos = many._eos = many._eos[:0]
    assert drawn(few, requests) == drawn(many, requests)
    assert (few.stats["prefill_tokens"], few.stats["refills"]) == (15, 2)


@pytest.mark.parametrize("max_rows", [3, 5])
def test_a_group_that_joins_in_parts_is_prefilled_once(model, tokenizer, max_rows):
    requests = [ask(p, 7, index=i, seed=i, max_new_tokens=3 + 4 * i) for i, p in enumerate(contexts(9, 4, 6))]
    sampler = EmbeddedSampler(model, tokenizer, max_rows=max_rows)
    assert drawn(sampler, requests) == drawn(EmbeddedSampler(model, tokenizer), requests)
    assert sampler.stats["prefill_tokens"] == 19
    assert sampler.stats["refills"] > 3


def test_places_do_not_stand_empty(qwen, tokenizer):
    # 40 samples of 1 to 20 tokens in 8 places: waves of 8 would take 5 x 20 steps at worst.
    requests = [ask(p, index=i, max_new_tokens=1 + i % 20) for i, p in enumerate(contexts(*[5] * 40))]
    sampler = EmbeddedSampler(qwen, tokenizer, max_rows=8)
    sampler._eos = sampler._eos[:0]
    widths, forward = [], sampler._forward

    def noted(ids, positions, mask, cache):
        if ids.shape[1] == 1:
            widths.append((len(ids), cache.get_seq_length() + 1))
        return forward(ids, positions, mask, cache)

    sampler._forward = noted
    collect(sampler, requests)
    rows = sum(n for n, _ in widths)
    assert rows == sampler.stats["decode_rows"]
    assert rows / (8 * len(widths)) > 0.65
    # Columns follow the live rows: a prompt and 20 tokens, though the batch went on for much longer.
    assert max(width for _, width in widths) <= 25 < len(widths)


@pytest.mark.parametrize("max_rows", [4, 256])
def test_the_same_requests_give_the_same_bits(model, tokenizer, max_rows):
    def once():
        events = []

        def on_done(request, completions):
            events.append((request.problem.index, request.origin, tuple(completions)))
            if request.origin == "fresh":
                return [replace(request, n=1, seeds=(7,), prefix=completions[0].tokens[:3], origin="reset")]
            return ()

        EmbeddedSampler(model, tokenizer, max_new_tokens=12, max_rows=max_rows).run(requests, on_done)
        return events

    requests = [ask(p, 3, index=i, seed=i) for i, p in enumerate(contexts(3, 14, 5, 9, 5))]
    first = once()
    assert len(first) == 10
    assert first == once()


def test_sampling_follows_the_softmax(model, tokenizer):
    (context,) = contexts(5)
    n, temperature = 4000, 1.3
    requests = [replace(ask(context), n=n, seeds=tuple(seed_of("frequency", i) for i in range(n)), max_new_tokens=1)]
    sampler = EmbeddedSampler(model, tokenizer, temperature=temperature, max_rows=1500)
    (rows,) = drawn(sampler, requests)
    counts = torch.bincount(torch.tensor([row[0] for row in rows]), minlength=31).double()
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0, -1].double()
    expected = (logits / temperature).softmax(-1) * n
    common = expected > 5
    chi2 = ((counts - expected)[common] ** 2 / expected[common]).sum()
    freedom = int(common.sum())
    assert freedom > 5
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom)


def test_prompts_without_room_are_refused_before_anything_is_drawn(qwen, tokenizer):
    sampler = EmbeddedSampler(qwen, tokenizer, max_rows=1, context_length=20)
    good, long = ask(contexts(5)[0]), ask(contexts(15)[0], index=7, prefix=(4,) * 5)
    with pytest.raises(UserError, match=r"toy/test/7.*15 tokens.*prefix of 5.*20"):
        sampler.run([good, long], lambda request, completions: ())
    assert sampler.stats["refills"] == 0
    with pytest.raises(UserError, match="toy/test/7"):
        sampler.run([good], lambda request, completions: [long])
    assert sampler.stats["refills"] == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask([], 1), "context is empty"),
        (ask([5], 2, seeds=(1,)), "n is 2 with 1 seeds"),
        (ask([5], 0), "n is 0"),
        (ask([5], 1, temperature=-1.0), "temperature is -1.0"),
        (ask([5], 1, temperature=math.nan), "temperature is nan"),
        (ask([5], 1, max_new_tokens=0), "max_new_tokens is 0"),
        (ask([5], 1, stop=("",)), "empty stop string"),
    ],
)
def test_bad_requests(qwen, tokenizer, request_, message):
    with pytest.raises(UserError, match=message):
        collect(EmbeddedSampler(qwen, tokenizer), [request_])


@pytest.mark.parametrize("setting", [{"temperature": -0.1}, {"max_new_tokens": 0}, {"stop": [""]}, {"max_rows": 0}])
def test_bad_settings(qwen, tokenizer, setting):
    with pytest.raises(UserError, match="the sampler: "):
        EmbeddedSampler(qwen, tokenizer, **setting)


def test_modes_are_restored_also_after_an_error(qwen, tokenizer):
    model = copy.deepcopy(qwen).train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    sampler = EmbeddedSampler(model, tokenizer, max_new_tokens=3)
    (ours,), (expected,) = (
        drawn(sampler, [ask([5])]),
        drawn(EmbeddedSampler(qwen, tokenizer, max_new_tokens=3), [ask([5])]),
    )
    assert ours == expected
    assert [module.training for module in model.modules()] == before
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"toy/test/0.*not finite"):
        drawn(sampler, [ask([5])])
    assert [module.training for module in model.modules()] == before


def test_updates_of_the_model_are_seen_at_once(qwen, tokenizer):
    model = copy.deepcopy(qwen)
    sampler = EmbeddedSampler(model, tokenizer, temperature=0.0, max_new_tokens=5)
    before = drawn(sampler, [ask([5, 6])])
    with torch.no_grad():
        model.lm_head.weight.neg_()
    after = drawn(sampler, [ask([5, 6])])
    assert before != after == drawn(EmbeddedSampler(model, tokenizer, temperature=0.0, max_new_tokens=5), [ask([5, 6])])


def test_drawing_from_a_large_vocabulary_is_drawing_from_its_cumulative_sum():
    """Two stages of stretches against one sum in float64; the last stretch is not full, and most tokens are never."""
    generator = torch.Generator().manual_seed(5)
    logits = 4 * torch.randn(400, 3001, generator=generator)
    logits[:, torch.randperm(3001, generator=generator)[:2000]] = -math.inf
    logits[:3, :2990] = -math.inf
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    uniform[:6] = torch.tensor([1e-12, 0.5, 1 - 1e-12] * 2, dtype=torch.float64)
    logits[:3, 2995] = 0.0
    token, logprob = draw(logits, torch.ones(400), uniform)
    probs = logits.double().softmax(-1)
    cdf = probs.cumsum(-1)
    above = cdf.gather(1, token[:, None])[:, 0]
    mine = probs.gather(1, token[:, None])[:, 0]
    assert bool((mine > 0).all()) and bool(logprob.isfinite().all())
    assert bool((above >= uniform - 1e-6).all()) and bool((above - mine <= uniform + 1e-6).all())
