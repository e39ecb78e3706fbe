"""What a run is built of."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mulligan import policy
from mulligan.assign import assign
from mulligan.config import LoraSection, MethodSection, ModelSection, OptimizerSection, Run, load_run
from mulligan.learner.update import turn_dropout_off
from mulligan.models.loading import load_model, save_model
from mulligan.models.tokenizer import pico_tokenizer
from mulligan.policy import choose_dtype
from mulligan.session import prepare
from mulligan.types import Stream
from tests.e2e.helpers import SMALL, call, make_model, metrics
from tests.helpers import make_forest, make_sample, tokens


def test_the_reference_stays_where_the_policy_began():
    run = Run(
        model=ModelSection(name="pico", device="cpu"),
        method=MethodSection.model_validate({"name": "grpo", "kl": 0.5}),
        optimizer=OptimizerSection(learning_rate=0.01),
    )
    session = prepare(run)
    learner, method = session.learner, session.schedule.at(0)
    problem = session.task.problem("train", 0)
    samples = [
        make_sample(
            uid=i, problem=problem, context=session.texts.prompt(problem), response=tokens(4 + i), reward=float(i)
        )
        for i in range(2)
    ]

    def scores(model: str) -> list[torch.Tensor]:
        return learner.score_samples(samples, Stream(model=model))

    def update() -> dict[str, float]:
        rows = assign(method, make_forest(samples), session.texts, learner.fill_streams, run.sampling.max_new_tokens)
        return learner.update(rows, method, 0)

    began = scores("reference")
    assert all(torch.equal(a, b) for a, b in zip(began, scores("policy"), strict=True))
    assert update().get("update/penalty", 0.0) == pytest.approx(0.0, abs=1e-6)  # but for rounding
    assert all(torch.equal(a, b) for a, b in zip(began, scores("reference"), strict=True))
    assert all(float((a - b).abs().max()) > 0.1 for a, b in zip(began, scores("policy"), strict=True))
    # k3 of what the second update sees: the mean over its tokens of exp(d) - d - 1, d = reference - policy.
    d = torch.cat(began) - torch.cat(scores("policy"))
    assert update()["update/penalty"] == pytest.approx(0.5 * float((d.exp() - d - 1).mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("asked", "device", "rank", "wanted"),
    [
        ("auto", "cpu", 0, "float32"),
        ("auto", "cpu", 8, "float32"),
        ("auto", "cuda", 0, "float32"),  # small updates are lost in bfloat16 weights
        ("auto", "cuda", 8, "bfloat16"),  # of a base that never changes
        ("bfloat16", "cpu", 0, "bfloat16"),
        ("float32", "cuda", 8, "float32"),
    ],
)
def test_the_dtype_that_is_chosen(asked, device, rank, wanted, monkeypatch):
    monkeypatch.setattr(policy, "choose_device", lambda name: torch.device(device))
    assert choose_dtype(ModelSection(dtype=asked), LoraSection(rank=rank)).dtype == wanted


def test_the_resolved_run_says_what_was_chosen():
    session = prepare(load_run(None, ["model.device=cpu", "lora.rank=2", "optimizer.name=SGD"]))
    assert {k: session.resolved["model"][k] for k in ("dtype", "chat")} == {"dtype": "float32", "chat": "off"}
    taken = {k: session.resolved["optimizer"][k] for k in ("name", "weight_decay", "betas", "eps")}
    assert taken == {"name": "SGD", "weight_decay": 0.0, "betas": None, "eps": None}


def test_there_is_no_dropout_in_training(tmp_path):
    """Sampler and learner must have the same policy, whatever the published config says of dropout."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"vocab_size": 68, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 1}
    config = Qwen3Config(**sizes, **ids, head_dim=8, attention_dropout=0.5, max_position_embeddings=96)
    save_model(Qwen3ForCausalLM(config), pico_tokenizer(), tmp_path)
    model = load_model(str(tmp_path), device="cpu").model.train()

    def twice() -> bool:
        with torch.no_grad():
            a, b = (model(torch.arange(1, 30)[None]).logits for _ in range(2))
        return torch.equal(a, b)

    assert not twice()
    turn_dropout_off(model)
    assert twice()
    session = prepare(load_run(None, [f"model.name={tmp_path}", "task.level=1", "sampling.max_new_tokens=8"]))
    attention = session.learner.model.model.layers[0].self_attn
    assert attention.attention_dropout == 0.0


@pytest.mark.parametrize("kind", ["looped", "qwen3"])
def test_gradient_checkpointing_trains_alike(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base", kind)
    found = []
    for on in ("false", "true"):
        more = (f"model.gradient_checkpointing={on}", "method.entropy_bonus=0.1", "method.kl=0.1", "task.level=1")
        said = call("train", "--model", "base", "--out", on, "--steps", "2", *SMALL, *more)
        assert said.code == 0, said
        found.append([m for m in metrics(tmp_path / on) if "update/loss" in m])
    for plain, checked in zip(*found, strict=True):
        for key in ("update/loss", "update/gradient_norm", "rollout/samples"):
            assert checked[key] == pytest.approx(plain[key], rel=1e-4, abs=1e-6)


def test_gradient_checkpointing_is_on_where_the_run_says_so():
    for on in (False, True):
        run = load_run(None, [f"model.gradient_checkpointing={str(on).lower()}", "model.name=pico-qwen3"])
        assert prepare(run).learner.model.is_activation_checkpointing is on
