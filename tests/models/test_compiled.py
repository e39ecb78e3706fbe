"""Compiled layers: the same numbers, the same run when it goes on, and one clear line where it cannot be done."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mulligan.errors import UserError
from mulligan.models.compiled import compile_layers, is_compiled
from mulligan.models.looped import LoopedConfig, LoopedForCausalLM
from mulligan.models.norms import take_norms
from mulligan.models.rotary import take_rotary

SIZES = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


def build(kind, config):
    torch.manual_seed(0)
    model = kind(config(**SIZES, **HEADS)).eval()
    take_norms(model)
    take_rotary(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "config"),
    [(Qwen3ForCausalLM, Qwen3Config), (LlamaForCausalLM, LlamaConfig), (LoopedForCausalLM, LoopedConfig)],
    ids=["qwen3", "llama", "looped"],
)
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_losses_and_gradients_are_as_near_to_exact_ones(kind, config, half):
    model = build(kind, config)
    plain = copy.deepcopy(model)
    exact = copy.deepcopy(model).double()
    dtype = torch.bfloat16 if half else None
    compile_layers(model, dtype)
    assert is_compiled(model) and is_compiled(copy.deepcopy(model)) and not is_compiled(plain)
    assert all(p.grad is None for p in model.parameters())
    for shape in ((1, 7), (3, 9), (5, 300)):
        tokens = torch.arange(shape[0] * shape[1]).view(shape) * 7 % 31
        found = []
        for one in (model, plain, exact):
            one.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=half and one is not exact):
                loss = one(tokens, labels=tokens).loss
            loss.backward()
            grads = [p.grad.double().flatten() for p in one.parameters() if p.grad is not None]
            found.append((loss.double(), torch.cat(grads)))
        (ours, by_ours), (_, by_theirs), (true, by_true) = found
        assert abs(ours - true) <= (0.01 if half else 1e-6) * true
        assert (by_ours - by_true).norm() <= 4 * (by_theirs - by_true).norm()
        assert (by_theirs - by_true).norm() <= 0.5 * by_true.norm()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[:1, :1]).logits, plain(tokens[:1, :1]).logits)
        cached = [one(tokens[:, :4], use_cache=True).past_key_values for one in (model, plain)]
        after = [one(tokens[:, 4:5], past_key_values=c).logits for one, c in zip((model, plain), cached, strict=True)]
    torch.testing.assert_close(*after, rtol=1e-5, atol=1e-5)


def test_no_compiler_is_one_clear_error():
    torch._dynamo.reset()
    # Not by monkeypatch, which leaves their config without the keys.
    compiler = torch._inductor.config.patch({"cpp.cxx": ("/no/such/compiler",)})
    caches = torch.compiler.config.patch(force_disable_caches=True)  # pyright: ignore
    with compiler, caches, pytest.raises(UserError, match=r"^model\.compile: it does not compile here: .*compiler.*$"):
        compile_layers(build(LlamaForCausalLM, LlamaConfig))
    torch._dynamo.reset()


def test_what_it_does_not_know_is_refused():
    with pytest.raises(UserError, match=r"^model\.compile: the layers of gemma2 \(Gemma2DecoderLayer\) are not"):
        compile_layers(build(Gemma2ForCausalLM, Gemma2Config))
    model = build(LlamaForCausalLM, LlamaConfig)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = torch.nn.Sequential(mlp.up_proj)
    with pytest.raises(UserError, match=r"^model\.compile: the layers of llama \(LlamaDecoderLayer\) are not"):
        compile_layers(model)


def test_layers_that_compute_otherwise_are_refused():
    """A decoder layer of the same parts that scales what it adds, as Granite's."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**SIZES, **HEADS, residual_multiplier=0.5)).eval()
    take_norms(model)
    take_rotary(model)
    with pytest.raises(UserError, match="the layers of granite"):
        compile_layers(model)
