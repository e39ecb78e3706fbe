"""LoRA: the base until the first update, exactly; only the adapter moves; it is saved, merged and found again."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mulligan.checkpoint import load_checkpoint
from mulligan.config import load_run
from mulligan.errors import UserError
from mulligan.learner.packing import Item, pack
from mulligan.learner.scoring import score
from mulligan.learner.update import Learner, Plan
from mulligan.methods import build_schedule
from mulligan.models.adapters import (
    Lora,
    adapter_names,
    adapter_off,
    add_adapter,
    fingerprint,
    has_adapter,
    merged,
    save_adapter,
)
from mulligan.models.loading import LoadedModel, load_model, save_model
from mulligan.models.tokenizer import pico_tokenizer
from mulligan.rundir import load_run_model
from mulligan.session import prepare
from mulligan.types import Stream
from tests.e2e.helpers import SMALL, call, make_model
from tests.helpers import VOCABULARY, make_row, make_sample, tiny, tokens

KINDS = ["qwen3", "tied", "looped"]
TOKENIZER = pico_tokenizer()


def base(kind: str, dtype: torch.dtype = torch.float32):
    if kind != "tied":
        return tiny(kind, dtype)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": True}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **ids, initializer_range=0.2)).to(dtype).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, *tokens(12)]])).logits


def adapted(kind: str, dtype: torch.dtype = torch.float32, *, rank: int = 3, seed: int = 0, targets=("all-linear",)):
    model = base(kind, dtype)
    add_adapter(model, Lora(rank, 8.0, tuple(targets)), seed)
    return model


def perturb(model) -> None:
    """An adapter that does something, in place of training."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))


# --- a fresh adapter ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_is_the_base_bit_for_bit(kind):
    model = adapted(kind)
    assert torch.equal(logits(model), logits(base(kind)))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == adapter_names(model) and has_adapter(model) and not has_adapter(base(kind))
    assert not any("lm_head" in name or "embed" in name for name in trained)


def test_a_is_of_the_seed_and_the_layer_alone():
    def a(seed: int) -> list[torch.Tensor]:
        return [p.detach() for name, p in adapted("qwen3", seed=seed).named_parameters() if "lora_A" in name]

    torch.manual_seed(1)
    first = a(0)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert all(torch.equal(x, y) for x, y in zip(first, a(0), strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first, a(1), strict=True))
    same_shape = [x for x in first if x.shape == first[0].shape]
    assert len(same_shape) > 2 and not torch.equal(same_shape[0], same_shape[1])
    # Uniform between -1/sqrt(d) and 1/sqrt(d) with d = 16: +-0.25.
    assert 0.2 < float(max(x.abs().max() for x in same_shape)) < 0.25
    torch.manual_seed(1)
    a(0)
    assert torch.equal(torch.get_rng_state(), state)  # no generator was advanced


def test_the_formula():
    """y = W x + (alpha / rank) B A x, from the tensors by hand: alpha 8, rank 3."""
    model = adapted("qwen3", torch.float64)
    perturb(model)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    wanted = x @ layer.base_layer.weight.T + 8.0 / 3 * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)  # the adapter is float32


def test_adapters_are_float32_on_a_bfloat16_base():
    model = adapted("qwen3", torch.bfloat16)
    kinds = {p.requires_grad: p.dtype for p in model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16 and torch.equal(logits(model), logits(base("qwen3", torch.bfloat16)))


def test_targets():
    some = adapted("qwen3", targets=("q_proj", "down_proj"))
    names = adapter_names(some)
    assert names is not None and {name.split(".")[-4] for name in names} == {"q_proj", "down_proj"}
    head = adapted("qwen3", targets=("lm_head",))  # untied: may be adapted, when named
    assert any("lm_head" in name for name, p in head.named_parameters() if p.requires_grad)
    with pytest.raises(UserError, match=r"lora.targets: 'q_pro' is no linear layer of it \(did you mean 'q_proj'\?\)"):
        adapted("qwen3", targets=("q_pro",))
    with pytest.raises(UserError, match="'embed_tokens' is no linear layer"):
        adapted("qwen3", targets=("embed_tokens",))
    with pytest.raises(UserError, match="'lm_head' is tied to the embeddings"):
        adapted("tied", targets=("lm_head",))
    with pytest.raises(UserError, match="leave the others out"):
        adapted("qwen3", targets=("all-linear", "q_proj"))


# --- learning -------------------------------------------------------------------------------------------


def learner_of(model, method, **plan) -> Learner:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    return Learner(model, TOKENIZER, optimizer, Plan(**plan), rate=lambda _: 0.05)


def rows() -> list:
    samples = [make_sample(uid=i, response=tokens(5 + i, i), reward=float(i), group=0) for i in range(2)]
    return [make_row(sample, 1.0 - 2 * i) for i, sample in enumerate(samples)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_base_with_the_adapter_off(kind):
    model, method = adapted(kind), build_schedule("grpo", {"kl": 0.5}).schedule.at(0)
    learner = learner_of(model, method)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = rows()
    reference = Stream(model="reference")
    for step in range(2):
        learner.fill_streams(batch, [reference], lambda row, _: row.context)
        learner.update(batch, method, step)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and moved <= (adapter_names(model) or set())
    samples = [row.sample for row in batch]
    plain = learner_of(base(kind), method)
    wanted = plain.score_samples(samples, Stream(model="policy"))
    for ours, theirs in zip(learner.score_samples(samples, reference), wanted, strict=True):
        assert torch.equal(ours, theirs)
    off = [float((a - b).abs().max()) for a, b in zip(learner.score_samples(samples, Stream()), wanted, strict=True)]
    assert min(off) > 0.01  # the policy is the base no more
    assert {p.requires_grad for p in model.parameters()} == {True, False}  # and trains on


def test_no_second_copy_of_the_base_for_the_reference(tmp_path):
    run = load_run(None, ["lora.rank=2", "method.kl=0.1", "model.device=cpu", "model.name=pico-qwen3"])
    session = prepare(run)
    assert session.learner.frozen == {}
    sizes = [p.numel() for group in session.learner.optimizer.param_groups for p in group["params"]]
    assert sum(sizes) == sum(p.numel() for p in session.learner.model.parameters() if p.requires_grad)


def test_switching_off_survives_an_error():
    model = adapted("qwen3")
    perturb(model)
    on = logits(model)
    with pytest.raises(RuntimeError), adapter_off(model):
        assert not torch.equal(logits(model), on)
        raise RuntimeError
    assert torch.equal(logits(model), on)


def test_undoing_an_update_puts_the_adapter_back():
    model, method = adapted("tied"), build_schedule("reinforce", {}).schedule.at(0)
    learner = learner_of(model, method)
    before = copy.deepcopy(model.state_dict())
    undo = learner.snapshot()
    learner.update(rows(), method, 0)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# --- gradient checkpointing ---------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_memory_alone(kind, lora):
    """Loss and gradients as without, and less than half of the activations kept between the passes."""
    found = []
    for checkpointing in (False, True):
        model = adapted(kind) if lora else base(kind)
        perturb(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        items = [Item((1, 5), tokens(n, n), torch.ones(n, dtype=torch.bool), 1.0) for n in (40, 23)]
        parameters, kept = {id(p) for p in model.parameters()}, []

        def keep(tensor, parameters=parameters, kept=kept):
            kept.append(0 if id(tensor) in parameters else tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = score(model, pack(items, 0, model.device)).logprobs.sum()
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients, sum(kept)))
    (plain, plain_gradients, much), (checked, checked_gradients, little) = found
    torch.testing.assert_close(checked, plain, rtol=1e-6, atol=0.0)
    assert plain_gradients.keys() == checked_gradients.keys() != set()
    for name, gradient in plain_gradients.items():
        torch.testing.assert_close(checked_gradients[name], gradient, rtol=1e-4, atol=1e-5)
    assert little < 0.5 * much, (little, much)


# --- merging and saving ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_merged(kind, tmp_path):
    model = adapted(kind)
    perturb(model)
    on = logits(model)
    plain = merged(LoadedModel(model, TOKENIZER, "toy"))
    assert type(plain) is type(base(kind)) and not has_adapter(plain)
    assert plain.state_dict().keys() == base(kind).state_dict().keys()
    assert float((on - logits(base(kind))).abs().max()) > 0.05
    torch.testing.assert_close(logits(plain), on, rtol=0.0, atol=1e-5)
    assert torch.equal(logits(model), on) and has_adapter(model)  # what was given is as it was
    save_model(plain, TOKENIZER, tmp_path / "out")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "out")).model), on, rtol=0.0, atol=1e-5)
    whole = LoadedModel(base(kind), TOKENIZER, "toy")
    assert merged(whole) is whole.model


def test_merging_is_checked(monkeypatch):
    from peft.tuners.lora import Linear

    model = adapted("qwen3")
    perturb(model)
    monkeypatch.setattr(Linear, "merge", lambda self, safe_merge: None)  # a merge that does nothing
    with pytest.raises(UserError, match="toy: merging the adapter moves logits by"):
        merged(LoadedModel(model, TOKENIZER, "toy"))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's own, not ours
@pytest.mark.parametrize("kind", ["qwen3", "tied"])
def test_peft_reads_the_saved_adapter(kind, tmp_path):
    from peft import PeftModel

    model = adapted(kind)
    perturb(model)
    save_model(base(kind), TOKENIZER, tmp_path / "base")
    save_adapter(LoadedModel(model, TOKENIZER, "toy"), tmp_path / "adapter", str(tmp_path / "base"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs.eval()), logits(model), rtol=0.0, atol=1e-6)
    assert str(tmp_path / "base") in (tmp_path / "adapter" / "adapter_config.json").read_text()


# --- runs -----------------------------------------------------------------------------------------------


def train(*more: str):
    return call("train", "--out", "run", "lora.rank=2", "optimizer.learning_rate=0.02", "task.level=1", *SMALL, *more)


def weights(directory) -> dict[str, torch.Tensor]:
    found = load_checkpoint(directory / "checkpoints")
    assert found is not None
    return {**found.tensors["model"], **{f"optimizer/{k}": v for k, v in found.tensors["optimizer"].items()}}


@pytest.mark.parametrize("kind", ["looped", "qwen3"])
def test_a_run_is_saved_resumed_evaluated_and_tied_to_its_base(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base", kind)
    more = ("--model", "base", "method.kl=0.1", "method.entropy_bonus=0.1")
    assert train(*more, "--steps", "4").code == 0
    whole = weights(tmp_path / "run")
    # The checkpoint holds the adapter and its two moments, and nothing of the base.
    assert all(re.search(r"\.lora_[AB]\.default\.weight", name) for name in whole)
    (tmp_path / "run").rename(tmp_path / "whole")

    assert train(*more, "--steps", "2").code == 0
    assert train(*more, "--steps", "4", "--resume").code == 0
    halves = weights(tmp_path / "run")
    assert halves.keys() == whole.keys() and all(torch.equal(halves[name], whole[name]) for name in whole)

    loaded, _ = load_run_model(tmp_path / "run")
    ours = {n: p for n, p in loaded.model.named_parameters() if p.requires_grad}
    assert ours.keys() == {n for n in whole if not n.startswith("optimizer/")}
    assert all(torch.equal(p, whole[name]) for name, p in ours.items())
    assert call("eval", "run", "--problems", "2", "--samples", "1").code == 0
    assert call("replay", "run", "--step", "3", "--method", "rloo").code == 0

    monkeypatch.chdir(tmp_path / "base")  # the base is found from elsewhere, too
    load_run_model(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    other = load_model("base").model
    with torch.no_grad():
        next(other.parameters()).mul_(1.001)
    save_model(other, TOKENIZER, "base")
    with pytest.raises(UserError, match="base has other weights now than those that its adapter was trained on"):
        load_run_model(tmp_path / "run")
    said = train(*more, "--steps", "6", "--resume")
    assert said.code == 2 and "other weights now" in said.err
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"run: its base model cannot be loaded: .*base: no such directory"):
        load_run_model(tmp_path / "run")


def test_fingerprint():
    model = adapted("qwen3")
    first = fingerprint(model)
    perturb(model)
    assert fingerprint(model) == first  # of the base alone
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.base_layer.weight.add_(1e-3)
    assert fingerprint(model) != first
