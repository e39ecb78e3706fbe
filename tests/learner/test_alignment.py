"""The cosine of the gradients of log P(y) and log P(y|x), against plain autograd."""

from __future__ import annotations

import pytest
import torch

from mulligan.learner.alignment import alignment
from tests.helpers import TASK, TEXTS, flat, make_sample, tiny, tokens


def samples(n: int) -> list:
    problems = [TASK.problem("train", index) for index in range(n)]
    return [make_sample(uid=k, problem=p, response=tokens(6, k)) for k, p in enumerate(problems)]


def log_prob(model, context, response) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([[*context, *response]])).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(response)), list(response)].sum()


@pytest.mark.parametrize("kind", ["qwen3", "looped"])
def test_it_is_the_mean_cosine_of_the_two_gradients(kind):
    model, drawn = tiny(kind), samples(3)
    cosines = []
    for sample in drawn:
        found = []
        for context in ((1,), TEXTS.prompt(sample.request.problem)):
            model.zero_grad()
            log_prob(model, context, sample.tokens).backward()
            grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
            found.append(flat(grads))
        cosines.append(float(torch.nn.functional.cosine_similarity(*found, dim=0)))
    model.zero_grad()
    told = alignment(model, drawn, TEXTS, most=8)
    assert told["diagnose/alignment"] == pytest.approx(sum(cosines) / 3, rel=1e-5)
    assert told["diagnose/aligned"] == sum(c > 0 for c in cosines) / 3
    assert all(p.grad is None for p in model.parameters())  # the update to come finds nothing left behind


def test_it_takes_as_many_samples_as_asked_spread_over_all():
    model, drawn = tiny("qwen3"), samples(6)
    assert alignment(model, drawn, TEXTS, most=2) == alignment(model, [drawn[0], drawn[3]], TEXTS, most=2)
    assert alignment(model, [], TEXTS, most=2) == {}
