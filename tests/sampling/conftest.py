from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mulligan.models.looped import LoopedConfig, LoopedForCausalLM
from tests.sampling.helpers import build, character_tokenizer


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
