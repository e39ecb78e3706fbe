"""RMS norms with fewer passes: the same numbers, and only where they are RMS norms."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mulligan.models.norms import rms_norm, take_norms
from tests.helpers import assert_same_gradients

SMALL = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def build(model, config):
    torch.manual_seed(0)
    return model(config).eval()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.floats(1e-8, 1.0), st.integers(0, 999))
def test_values_and_gradients_are_those_of_the_formula(size, rows, eps, seed):
    generator = torch.Generator().manual_seed(seed)
    x, weight, push = (
        torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((rows, size), (size,), (rows, size))
    )
    x, weight = x.requires_grad_(), weight.requires_grad_()
    plain = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
    ours = rms_norm(x, weight, eps)
    torch.testing.assert_close(ours, plain)
    for mine, its in zip(
        torch.autograd.grad(ours, (x, weight), push), torch.autograd.grad(plain, (x, weight), push), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("model", "norms"),
    [
        # Two a layer, two more for queries and keys in Qwen3, and the last one.
        (build(Qwen3ForCausalLM, Qwen3Config(**SMALL, **HEADS)), 9),
        (build(LlamaForCausalLM, LlamaConfig(**SMALL, **HEADS)), 5),
        # 1 + weight in the one, layer norms in the other.
        (build(Gemma2ForCausalLM, Gemma2Config(**SMALL, **HEADS)), 0),
        (build(GPT2LMHeadModel, GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2)), 0),
    ],
    ids=["qwen3", "llama", "gemma2", "gpt2"],
)
def test_a_model_gives_the_same_and_saves_the_same(model, norms):
    plain = copy.deepcopy(model)
    assert take_norms(model) == norms
    assert take_norms(model) == 0  # they have been taken
    twin = copy.deepcopy(model)  # whose norms must have weights of their own
    tokens = torch.arange(12)[None]
    for one in (model, twin):
        assert_same_gradients(one, plain, tokens)
    assert model.state_dict().keys() == plain.state_dict().keys()
    rounded, own = model.bfloat16()(tokens).logits, plain.bfloat16()(tokens).logits
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, own, rtol=0.05, atol=0.05)
