from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mulligan.models.looped import LoopedConfig, LoopedForCausalLM
from tests.sampling.helpers import character_tokenizer

SIZES = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def build(model, config, **sizes):
    """A model with random weights large enough that its greedy texts do not repeat themselves at once."""
    torch.manual_seed(3)
    net = model(config(**(SIZES | sizes)))
    with torch.no_grad():
        net.get_output_embeddings().weight.normal_(0.0, 0.35)
        net.get_input_embeddings().weight.normal_(0.0, 1.0)
    return net.eval()


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """For models of this size a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="package")
def qwen():
    return build(Qwen3ForCausalLM, Qwen3Config, head_dim=8, initializer_range=0.2)


@pytest.fixture(scope="package")
def looped():
    return build(LoopedForCausalLM, LoopedConfig, total_ut_steps=3)


@pytest.fixture(params=["qwen", "looped"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="package")
def tokenizer():
    return character_tokenizer()
