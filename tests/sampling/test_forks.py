"""Rows that go on from prompts which are kept once: attention against a dense reference, sampling against copies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from mulligan.models.forks import Forks, forked_attention, hidden
from mulligan.sampling.embedded import EmbeddedSampler
from tests.sampling.helpers import ask, build, collect
from tests.sampling.test_embedded import contexts

INF = float("inf")


def test_places_by_hand():
    # Rows 0 and 2 go on from prompt 1, row 1 from prompt 0; nobody from prompt 2. Two places a prompt.
    forks = Forks.of(torch.tensor([1, 0, 1]), torch.tensor([0, 2, 0]), 3)
    assert forks.rows.tolist() == [1, 0, 0, 2, 0, 0]
    assert forks.place.tolist() == [2, 0, 3]
    assert forks.prompt_bias is not None
    assert forks.prompt_bias[:, 0, 0].tolist() == [[0.0, 0.0, 0.0], [-INF, -INF, 0.0], [0.0, 0.0, 0.0]]
    assert Forks.of(torch.tensor([0, 0]), torch.tensor([0]), 3).prompt_bias is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 7)), min_size=1, max_size=8),
    st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    st.integers(0, 9),
)
def test_attention_is_that_of_rows_by_themselves(lengths, rows, heads, seed):
    """Prompts of any lengths, rows with any columns of their own, grouped heads; float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    (queries, shared), size = heads, 4
    of, own = [p % len(lengths) for p, _ in rows], [n for _, n in rows]
    wide, long = max(own), max(lengths)
    q, k, v = normal(len(rows), queries, 1, size), *(normal(len(rows), shared, wide, size) for _ in range(2))
    prompts = [normal(len(lengths), shared, long, size) for _ in range(2)]
    for states in prompts:
        for states_of, length in zip(states, lengths, strict=True):
            states_of[:, : long - length] = 1e3  # padding that would be noticed
    pads = torch.tensor([wide - n for n in own])
    forks = Forks.of(torch.tensor(of), torch.tensor([long - n for n in lengths]), long)
    setattr(k, "prompts", tuple(prompts))  # noqa: B010
    found = forked_attention(q, k, v, replace(forks, own_bias=hidden(pads, wide)[:, None]), 0.7)
    for row, (prompt, n) in enumerate(zip(of, own, strict=True)):
        keys, values = (
            torch.cat([states[prompt][:, long - lengths[prompt] :], mine[row][:, wide - n :]], 1)
            for states, mine in zip(prompts, (k, v), strict=True)
        )
        keys, values = (x.repeat_interleave(queries // shared, 0) for x in (keys, values))
        expected = (0.7 * q[row] @ keys.transpose(1, 2)).softmax(-1) @ values
        assert torch.allclose(found[row], expected, atol=1e-12, rtol=0)


def test_keys_without_their_prompts_are_an_error():
    q = torch.zeros(1, 1, 1, 4)
    with pytest.raises(ValueError, match="shared prompts"):
        forked_attention(q, q, q, Forks.of(torch.tensor([0]), torch.tensor([0]), 1))


def test_who_forks(model, tokenizer):
    assert EmbeddedSampler(model, tokenizer)._forks
    sliding = build(MistralForCausalLM, MistralConfig, sliding_window=5)
    own_positions = build(GPT2LMHeadModel, GPT2Config, n_positions=64)
    assert not EmbeddedSampler(sliding, tokenizer)._forks
    assert sliding.config._attn_implementation == "sdpa"
    assert EmbeddedSampler(own_positions, tokenizer)._forks


REQUESTS = [
    ask(p, 1 + i % 4, index=i, seed=i, max_new_tokens=3 + 4 * (i % 5))
    for i, p in enumerate(contexts(3, 14, 5, 9, 5, 1, 21, 2))
]


def events(sampler):
    """Passes that follow on passes, prompts of very different lengths, rows that end and join at any time."""
    out = []

    def on_done(request, completions):
        out.append((request.problem.index, request.origin, completions))
        if request.origin != "fresh":
            return ()
        again = replace(request, n=2, seeds=(7, 8), prefix=completions[0].tokens[:3], origin="reset")
        return [again, replace(again, context=(5,) * 17 + request.context, prefix=(), origin="hinted")]

    sampler.run(REQUESTS, on_done)
    return out


def alike(ours, theirs):
    assert len(ours) == len(theirs) == 24
    for (*which, mine), (*other, its) in zip(ours, theirs, strict=True):
        assert which == other
        for one, two in zip(mine, its, strict=True):
            assert (one.tokens, one.finish) == (two.tokens, two.finish)
            assert one.behavior_logprobs == pytest.approx(two.behavior_logprobs, abs=1e-5)


@pytest.mark.parametrize("max_rows", [4, 7, 256])
def test_rows_with_copies_of_their_prompts_draw_the_same(model, tokenizer, max_rows):
    def once(forks):
        sampler = EmbeddedSampler(model, tokenizer, max_rows=max_rows)
        sampler._forks = forks
        return events(sampler), sampler.stats["prefill_tokens"]

    (ours, read), (theirs, read_by_copies) = once(True), once(False)
    assert read <= read_by_copies
    alike(ours, theirs)


def test_a_prompt_that_still_has_rows_is_not_computed_again(model, tokenizer):
    (context,) = contexts(9)
    requests = [ask(context, 2, index=0, max_new_tokens=12), ask(context, 2, index=1, seed=5, max_new_tokens=3)]
    sampler = EmbeddedSampler(model, tokenizer, max_rows=3)
    sampler._eos = sampler._eos[:0]
    collect(sampler, [*requests, ask(context, 2, index=2, seed=9, max_new_tokens=3)])
    assert sampler.stats["prefill_tokens"] == 9
    assert sampler.stats["refills"] > 2
