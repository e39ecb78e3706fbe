"""Pre-training resumes bit for bit, and its loss is Ouro's."""

from __future__ import annotations

import math

import pytest
import torch

from mulligan.base.corpus import Example
from mulligan.base.pretrain import Phase, Recipe, batch_loss, build_model, encode, pretrain
from mulligan.models.tokenizer import pico_tokenizer

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LOOPED = {**TINY, "num_key_value_heads": 2, "total_ut_steps": 2, "max_position_embeddings": 256}


def recipe(**changes) -> Recipe:
    settings = {
        "seed": 1,
        "architecture": "ouro",
        "model": LOOPED,
        "rows": 4,
        "pool": 2,
        "learning_rate": 1e-2,
        "warm_up": 2,
        "phases": [Phase(updates=4, mixture={"easy": 1}), Phase(updates=4, mixture={"judge": 1, "alone": 1})],
    }
    return Recipe.model_validate({**settings, **changes})


def test_an_interrupted_pretraining_ends_bitwise_equal(tmp_path):
    class Enough(Exception):
        pass

    whole = pretrain(recipe(), tmp_path / "whole", every=2, report=lambda _: None)
    done = []

    def stop(model, *_):
        done.append(1)
        if len(done) == 6:
            raise Enough
        return batch_loss(model, *_)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Enough):
        patch.setattr("mulligan.base.pretrain.batch_loss", stop)
        pretrain(recipe(), tmp_path / "cut", every=2, report=lambda _: None)
    again = pretrain(recipe(), tmp_path / "cut", every=2, report=lambda _: None)
    for (name, left), right in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@torch.no_grad()
def test_the_loss_is_the_exit_weighted_cross_entropy_less_the_exits_entropy():
    tokenizer = pico_tokenizer()
    model = build_model(recipe(), tokenizer).double().eval()
    rows = [encode(tokenizer, Example("x=1:1x+2?", "1x+2=1+2=3;\\boxed{3}")), encode(tokenizer, Example("", "T;"))]
    loss, last = batch_loss(model, rows, 0.1)
    total, final, count = 0.0, 0.0, 0
    for ids, start in rows:
        out = model(input_ids=torch.tensor([ids]), output_loops=True)
        for at in range(start - 1, len(ids) - 1):
            exits = out.exit_probabilities[0, at].tolist()
            each = [float(-model.lm_head(h[0, at]).log_softmax(-1)[ids[at + 1]]) for h in out.loop_hidden_states]
            entropy = -sum(p * math.log(p) for p in exits)
            total += sum(p * ce for p, ce in zip(exits, each, strict=True)) - 0.1 * entropy
            final, count = final + each[-1], count + 1
    # batch_loss takes its logits in float32
    assert float(loss) == pytest.approx(total / count, rel=1e-5)
    assert float(last) == pytest.approx(final / count, rel=1e-5)


def test_a_phase_with_a_rate_of_its_own_begins_a_new_cosine():
    r = recipe(
        warm_up=1,
        floor=0.1,
        phases=[
            Phase(updates=10, mixture={"easy": 1}),
            Phase(updates=10, mixture={"easy": 1}),
            Phase(updates=10, mixture={"easy": 1}, learning_rate=4e-3),
        ],
    )
    assert r.rate_at(0) == pytest.approx(1e-2)
    assert r.rate_at(10) == pytest.approx(1e-2 * (0.1 + 0.9 * 0.5))  # halfway through the first two phases
    assert r.rate_at(20) == pytest.approx(4e-3)
    assert r.rate_at(25) == pytest.approx(4e-3 * (0.1 + 0.9 * 0.5))
