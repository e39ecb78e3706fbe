"""Adaptive exit while sampling: each token is drawn from its own loop, and the loops are counted."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from mulligan.errors import UserError
from mulligan.sampling.embedded import EmbeddedSampler
from tests.sampling.helpers import ask, collect, drawn

PROMPTS = ((5, 9, 11, 4), (7, 8), (20, 6, 6, 13, 17, 5), (18, 3, 9, 9), (4, 25, 14, 22))


@pytest.fixture(scope="module")
def leaning(looped):
    """The looped model with a gate that makes tokens exit after different loops."""
    model = copy.deepcopy(looped)
    generator = torch.Generator().manual_seed(2)
    model.model.early_exit_gate.weight.data.normal_(0.0, 0.4, generator=generator)
    model.model.early_exit_gate.bias.data.zero_()
    return model


def fixed(looped, probability: float):
    """The looped model with a gate that always stops with this probability."""
    model = copy.deepcopy(looped)
    model.model.early_exit_gate.weight.data.zero_()
    model.model.early_exit_gate.bias.data.fill_(math.log(probability / (1 - probability)))
    return model


@pytest.mark.parametrize("max_rows", [256, 2])
def test_log_probs_and_loops_are_those_of_a_forward_without_cache(leaning, tokenizer, max_rows):
    sampler = EmbeddedSampler(leaning, tokenizer, exit_threshold=0.6, max_rows=max_rows)
    # Of several lengths, so that rows that have ended wait beside others, and leave the batch.
    shapes = zip(PROMPTS, (3, 1, 40, 2, 1), (9, 2, 12, 7, 1), strict=True)
    requests = [ask(p, n, index=i, max_new_tokens=limit) for i, (p, n, limit) in enumerate(shapes)]
    loops = []
    for request, completions in zip(requests, collect(sampler, requests), strict=True):
        for completion in completions:
            start, ids = len(request.context) - 1, torch.tensor([[*request.context, *completion.tokens]])
            with torch.no_grad():
                out = leaning(ids, exit_threshold=0.6)
            wanted = out.logits[0, start:-1].log_softmax(-1).gather(1, ids[0, start + 1 :, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.behavior_logprobs), wanted, atol=1e-5, rtol=0)
            loops += out.exit_loops[0, start:-1].tolist()
    assert len(set(loops)) > 1
    assert sampler.stats["exit_loops"] == sum(loops)
    assert sampler.stats["decode_tokens"] == len(loops)


@pytest.mark.parametrize(
    # s = 0.4 over three loops: 0.4, 0.64, then the rest.
    ("threshold", "loop"),
    [(0.0, 1), (0.3, 1), (0.5, 2), (0.9, 3)],
)
def test_the_loop_by_hand(looped, tokenizer, threshold, loop):
    model = fixed(looped, 0.4)
    requests = [ask(p, 2, index=i) for i, p in enumerate(PROMPTS)]
    adaptive = EmbeddedSampler(model, tokenizer, max_new_tokens=6, exit_threshold=threshold)
    # What loop 1 gives does not depend on later loops, nor what loop 2 gives on loop 3: so the texts are the same.
    shallow = EmbeddedSampler(model, tokenizer, max_new_tokens=6, num_loops=loop)
    assert drawn(adaptive, requests) == drawn(shallow, requests)
    assert adaptive.stats["exit_loops"] == loop * adaptive.stats["decode_tokens"] > 0
    assert shallow.stats["exit_loops"] == 0


def test_none_is_the_configs_threshold_and_one_the_last_loop(looped, tokenizer):
    model = fixed(looped, 0.4)
    plain = drawn(EmbeddedSampler(model, tokenizer, max_new_tokens=6), [ask(PROMPTS[0], 4)])
    model.config.early_exit_threshold = 0.3
    first, last = (EmbeddedSampler(model, tokenizer, max_new_tokens=6, exit_threshold=q) for q in (None, 1.0))
    assert drawn(last, [ask(PROMPTS[0], 4)]) == plain
    assert drawn(first, [ask(PROMPTS[0], 4)]) != plain
    assert first.stats["exit_loops"] == first.stats["decode_tokens"] > 0
    assert last.stats["exit_loops"] == 0


def test_what_cannot_be(looped, qwen, tokenizer):
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(UserError, match=f"exit_threshold is {wrong}, but must be a number from 0 to 1"):
            EmbeddedSampler(looped, tokenizer, exit_threshold=wrong)
    for setting in ({"exit_threshold": 1.0}, {"num_loops": 2}):
        with pytest.raises(UserError, match="Qwen3ForCausalLM has no loops"):
            EmbeddedSampler(qwen, tokenizer, **setting)
