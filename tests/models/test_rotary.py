"""Rotary embedding in fewer operations: the formula's numbers, and only in layers that are written so."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Glm4Config,
    Glm4ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mulligan.models.norms import take_norms
from mulligan.models.rotary import is_own, norm_and_rotate, rotate, take_rotary
from tests.helpers import assert_same_gradients

SMALL = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def build(model, config):
    torch.manual_seed(0)
    return model(config).eval()


def pairs(x, cos, sin):
    """Element by element, as the paper has it."""
    out, half = torch.empty_like(x), x.shape[-1] // 2
    for i in range(half):
        a, b = x[..., i], x[..., i + half]
        out[..., i] = a * cos[..., i] - b * sin[..., i]
        out[..., i + half] = b * cos[..., i + half] + a * sin[..., i + half]
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 999))
def test_values_and_gradients_are_those_of_the_formula(tokens, heads, half, normed, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, push = draw(2, tokens, heads, 2 * half), draw(2 * half), draw(2, tokens, heads, 2 * half)
    cos, sin = draw(1, tokens, 1, 2 * half), draw(1, tokens, 1, 2 * half)
    inputs = (x.requires_grad_(), weight.requires_grad_()) if normed else (x.requires_grad_(),)
    if normed:
        plain = pairs(x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight, cos, sin)
        ours = norm_and_rotate(x, weight, 1e-3, cos, sin)
    else:
        plain, ours = pairs(x, cos, sin), rotate(x, cos, sin)
    torch.testing.assert_close(ours, plain)
    for mine, its in zip(
        torch.autograd.grad(ours, inputs, push), torch.autograd.grad(plain, inputs, push), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        again = norm_and_rotate(x, weight, 1e-3, cos, sin) if normed else rotate(x, cos, sin)
    torch.testing.assert_close(again, plain)


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (build(Qwen3ForCausalLM, Qwen3Config(**SMALL, **HEADS)), 2),
        (build(Qwen2ForCausalLM, Qwen2Config(**SMALL, **HEADS)), 2),  # biases
        (build(LlamaForCausalLM, LlamaConfig(**SMALL, **HEADS)), 2),
        (build(GraniteForCausalLM, GraniteConfig(**SMALL, **HEADS, attention_multiplier=0.2)), 2),
        # Neighbours are paired in the one, half of a head is rotated in the next, the last has sinks.
        (build(CohereForCausalLM, CohereConfig(**SMALL, **HEADS)), 0),
        (build(Glm4ForCausalLM, Glm4Config(**SMALL, **HEADS)), 0),
        (build(GptOssForCausalLM, GptOssConfig(**SMALL, **HEADS, num_local_experts=2, num_experts_per_tok=1)), 0),
    ],
    ids=["qwen3", "qwen2", "llama", "granite", "cohere", "glm4", "gpt-oss"],
)
def test_a_model_gives_the_same_and_saves_the_same(model, layers):
    plain = copy.deepcopy(model)
    take_norms(model)
    assert take_rotary(model) == layers
    assert take_rotary(model) == 0  # they have been taken
    assert sum(map(is_own, model.modules())) == layers
    tokens = torch.arange(14).view(2, 7)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    for one in (model, copy.deepcopy(model)):
        assert_same_gradients(one, plain, tokens, attention_mask=mask)
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        found, its = (one(tokens[:1, :4], use_cache=True) for one in (model, plain))
        for one in (found, its):
            assert one.past_key_values.get_seq_length() == 4
        found, its = (
            one(tokens[:1, 4:5], past_key_values=o.past_key_values) for one, o in ((model, found), (plain, its))
        )
        torch.testing.assert_close(found.logits, its.logits, rtol=1e-5, atol=1e-6)
        rounded, own = model.bfloat16()(tokens).logits, plain.bfloat16()(tokens).logits
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, own, rtol=0.05, atol=0.05)


def test_mixed_precision_keeps_what_is_normed_in_full():
    model = build(Qwen3ForCausalLM, Qwen3Config(**SMALL, **HEADS))
    plain = copy.deepcopy(model)
    take_norms(model)
    take_rotary(model)
    tokens = torch.arange(12)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = model(tokens).logits, plain(tokens).logits
    exact = plain(tokens).logits
    assert (ours - exact).abs().mean() <= 1.1 * (theirs - exact).abs().mean()
    ours.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
