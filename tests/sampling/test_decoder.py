"""Decoding with compiled kernels: what the model's own code draws, for every kind of model and of batch."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mulligan.errors import UserError
from mulligan.models.norms import take_norms
from mulligan.models.rotary import take_rotary
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.sampling.precision import RoundedSampler
from tests.helpers import needs_compiler
from tests.sampling.helpers import build, collect
from tests.sampling.test_forks import REQUESTS, alike, events

pytestmark = needs_compiler
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),  # with biases
}


def taken(model):
    """As :func:`mulligan.models.loading.load_model` leaves it."""
    model = copy.deepcopy(model)
    take_norms(model)
    take_rotary(model)
    return model


@pytest.fixture(params=["qwen", "looped", *KINDS])
def known(request):
    if request.param in KINDS:
        return taken(build(*KINDS[request.param]))
    return taken(request.getfixturevalue(request.param))


@pytest.mark.parametrize("max_rows", [4, 7, 256])
def test_it_draws_what_the_models_own_code_draws(known, tokenizer, max_rows):
    own, compiled = (EmbeddedSampler(known, tokenizer, max_rows=max_rows, kernels=kernels) for kernels in (False, True))
    alike(events(compiled), events(own))
    assert compiled.stats | {"seconds": 0} == own.stats | {"seconds": 0}


@pytest.mark.parametrize("settings", [{"num_loops": 2}, {"exit_threshold": 0.6}, {"num_loops": 5}])
def test_loops_and_exits(looped, tokenizer, settings):
    model = taken(looped)
    model.model.early_exit_gate.weight.data.normal_(0.0, 0.4, generator=torch.Generator().manual_seed(2))
    own, compiled = (EmbeddedSampler(model, tokenizer, kernels=kernels, **settings) for kernels in (False, True))
    alike(events(compiled), events(own))
    assert compiled.stats["exit_loops"] == own.stats["exit_loops"]


def test_weights_that_change_are_seen(known, tokenizer):
    compiled = EmbeddedSampler(known, tokenizer, kernels=True)
    before = events(compiled)
    with torch.no_grad():
        for p in known.parameters():
            p.mul_(1.1)
    layer = known.base_model.layers[0]
    layer.mlp.up_proj.weight = torch.nn.Parameter(-layer.mlp.up_proj.weight)  # another object
    after = events(compiled)
    assert after != before
    alike(after, events(EmbeddedSampler(known, tokenizer)))


def test_a_rounded_copy(known, tokenizer):
    """bfloat16 rounds in other places, so that tokens may differ; most do not, and their log-probs are near."""
    groups = [
        collect(RoundedSampler(known, tokenizer, kernels=kernels, max_new_tokens=6), REQUESTS)
        for kernels in (True, False)
    ]
    pairs = [(one, two) for mine, its in zip(*groups, strict=True) for one, two in zip(mine, its, strict=True)]
    same = [(one, two) for one, two in pairs if one.tokens == two.tokens]
    assert len(same) > len(pairs) / 2
    for one, two in same:
        assert one.behavior_logprobs == pytest.approx(two.behavior_logprobs, abs=0.15)


def test_logits_that_are_no_numbers_are_reported(known, tokenizer):
    compiled = EmbeddedSampler(known, tokenizer, kernels=True)
    known.base_model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="are not finite"):
        collect(compiled, REQUESTS)


def test_what_it_does_not_know_is_refused(qwen, tokenizer):
    scaled = taken(build(GraniteForCausalLM, GraniteConfig, logits_scaling=2.0))
    with pytest.raises(UserError, match=r"^model\.kernels: granite does more between its layers than it knows$"):
        EmbeddedSampler(scaled, tokenizer, kernels=True)
    hooked = taken(qwen)
    hooked.model.layers[1].self_attn.o_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match=r"^model\.kernels: the layers of qwen3 \(Qwen3DecoderLayer\) are not"):
        EmbeddedSampler(hooked, tokenizer, kernels=True)
