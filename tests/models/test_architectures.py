"""Published architectures, small and with random weights: sampler, learner and transformers agree on all of them."""

from __future__ import annotations

import pytest
import torch
import transformers

from mulligan.learner.packing import Item, pack
from mulligan.learner.scoring import check_head, score
from mulligan.learner.update import Learner, Plan
from mulligan.methods import build_schedule
from mulligan.models.loading import load_model, save_model
from mulligan.models.tokenizer import pico_tokenizer
from mulligan.sampling.embedded import EmbeddedSampler
from tests.e2e.helpers import call, metrics
from tests.helpers import VOCABULARY, flat, make_row, make_sample, tokens
from tests.sampling.helpers import ask, collect

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# A window of 5 tokens, so that the sequences here run far past it; heads of 20 where width / heads is 12.
WINDOW = {"sliding_window": 5, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
ARCHITECTURES = {
    "Qwen3": {"head_dim": 20, "tie_word_embeddings": True},
    "Llama": {"tie_word_embeddings": False, "attention_bias": True},
    "Mistral": {"sliding_window": 5, "head_dim": 20},
    "Gemma": {"head_dim": 20},
    "Gemma2": {"head_dim": 20, "query_pre_attn_scalar": 9, "final_logit_softcapping": 3.0, **WINDOW},
    "Gemma3": {"head_dim": 20, "query_pre_attn_scalar": 9, **WINDOW},
    "SmolLM3": {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
    "Olmo": {"clip_qkv": 2.0},
    "Olmo2": {},
    "Olmo3": WINDOW,
    "Granite": {"logits_scaling": 8.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.4},
    "Cohere": {"logit_scale": 0.25},
}
CONFIG = {"Gemma3": "Gemma3TextConfig"}


def build(name: str) -> transformers.PreTrainedModel:
    config = getattr(transformers, CONFIG.get(name, f"{name}Config"))
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = getattr(transformers, f"{name}ForCausalLM")(config(**(SIZES | ARCHITECTURES[name])))
        with torch.no_grad():  # wide enough that logits reach the soft cap and greedy texts do not repeat themselves
            model.get_input_embeddings().weight.normal_(0.0, 0.5)
            model.get_output_embeddings().weight.normal_(0.0, 1.0)
    return model.eval()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def folder(request, tmp_path_factory):
    where = tmp_path_factory.mktemp("models") / request.param
    model = build(request.param)
    model.generation_config.eos_token_id = 2
    save_model(model, pico_tokenizer(), where)
    return where


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder), dtype="float32", device="cpu")


def contexts(*lengths: int) -> list[tuple[int, ...]]:
    return [(1, *tokens(length, length)) for length in lengths]


def learner_logprobs(model, pairs) -> list[torch.Tensor]:
    items = [Item(c, r, torch.ones(len(r), dtype=torch.bool), 1.0) for c, r in pairs]
    batch = pack(items, 0, model.device)
    with torch.no_grad():
        found = score(model, batch).logprobs[-1]
    return [found[batch.row == k] for k in range(len(items))]


def test_it_is_this_architecture(folder, loaded):
    assert type(loaded.model) is getattr(transformers, f"{folder.name}ForCausalLM")


def test_sampler_and_learner_agree(loaded):
    """The same log-probs from the cache, token by token, and from one padded forward pass: to 1e-5 nats."""
    asked = contexts(3, 17, 9)
    sampler = EmbeddedSampler(loaded.model, loaded.tokenizer, max_new_tokens=20)
    drawn = collect(sampler, [ask(c, 2, index=i) for i, c in enumerate(asked)])
    pairs = [(c, done) for c, group in zip(asked, drawn, strict=True) for done in group]
    assert max(len(done.tokens) for _, done in pairs) > 10  # well past the window
    ours = learner_logprobs(loaded.model, [(c, done.tokens) for c, done in pairs])
    for (_, done), mine in zip(pairs, ours, strict=True):
        torch.testing.assert_close(mine, torch.tensor(done.behavior_logprobs), rtol=0.0, atol=1e-5)


def test_the_learner_scores_the_models_own_logits(loaded):
    """Head, soft cap and scales included, on every token."""
    (context,), response = contexts(4), tokens(30, 1)
    (ours,) = learner_logprobs(loaded.model, [(context, response)])
    with torch.no_grad():
        logits = loaded.model(torch.tensor([[*context, *response]])).logits[0, len(context) - 1 : -1]
    theirs = logits.log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)
    check_head(loaded.model)


def test_greedy_is_generate(loaded):
    asked = contexts(3, 17, 9)
    sampler = EmbeddedSampler(loaded.model, loaded.tokenizer, temperature=0.0, max_new_tokens=16)
    for (done,), context in zip(collect(sampler, [ask(c, index=i) for i, c in enumerate(asked)]), asked, strict=True):
        out = loaded.model.generate(
            torch.tensor([context]),
            attention_mask=torch.ones(1, len(context), dtype=torch.long),
            do_sample=False,
            max_new_tokens=16,
            pad_token_id=0,
        )
        assert done.tokens == tuple(out[0, len(context) :].tolist())


def test_padding_and_micro_batches_do_not_move_the_loss(folder):
    """One row a pass, without padding, against all rows of a step side by side."""
    rows = [
        make_row(make_sample(uid=i, context=c, response=tokens(3 + 5 * i, i), reward=i % 2, group=0), 1.0 - i)
        for i, c in enumerate(contexts(2, 12, 5))
    ]
    found = []
    for budget in (1, 4096):
        model = load_model(str(folder), dtype="float64", device="cpu").model
        plan = Plan(tokens_per_micro_batch=budget, clip_norm=0.0)
        learner = Learner(
            model, pico_tokenizer(), torch.optim.SGD(model.parameters(), lr=0.0), plan, rate=lambda _: 0.0
        )
        loss = learner.update(rows, build_schedule("reinforce", {}).schedule.at(0), 0)["update/loss"]
        found.append((loss, flat({n: p.grad for n, p in model.named_parameters() if p.grad is not None})))
    (one, alone), (other, together) = found
    assert one == pytest.approx(other, rel=1e-6) and one != 0.0
    # Some norms are float32 whatever the dtype of the model is.
    assert float((alone - together).norm()) <= 1e-5 * float(alone.norm())


def test_train_a_step(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call(
        *("train", "--model", folder, "--steps", "1", "--out", "run", "sampling.prompts=2", "method.group_size=2"),
        *("sampling.max_new_tokens=6", "eval.problems=2", "eval.samples=1", "method.entropy_bonus=0.1", "task.level=1"),
    )
    assert said.code == 0, said
    (step,) = [m for m in metrics(tmp_path / "run") if "update/loss" in m]
    assert step["mismatch/max"] < 1e-5 and step["update/gradient_norm"] > 0
