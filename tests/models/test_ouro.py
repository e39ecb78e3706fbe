"""Published Ouro checkpoints, from the files to logits, samples and a run; no remote code anywhere."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mulligan.config import load_run
from mulligan.errors import UserError
from mulligan.models.loading import load_model, save_model
from mulligan.models.looped import LoopedConfig, LoopedForCausalLM
from mulligan.session import prepare
from mulligan.tasks.chain import Chain
from tests.e2e.helpers import SMALL, call
from tests.e2e.kill_at import coin
from tests.models import published

WEIGHTS = "model.safetensors"
IDS = torch.randint(3, 259, (2, 11), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module", params=[(1, 4), (3, 2)], ids=["one file, MHA", "three files, GQA"])
def checkpoint(request, tmp_path_factory) -> Path:
    files, kv_heads = request.param
    folder = tmp_path_factory.mktemp("hub") / "Ouro-small"
    return published.write(folder, published.small(kv_heads), files=files)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy to change."""
    return published.write(tmp_path / "Ouro-small", published.small())


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the files, by its name there, as float64."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            out |= {name: opened.get_tensor(name).double() for name in opened.keys()}  # noqa: SIM118
    return out


def reference(folder: Path, ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Each loop's logits [T, V] and the exit probabilities [T, L] of one row, in float64, from the files alone."""
    c, w = json.loads((folder / "config.json").read_text()), read(folder)
    size, heads, kv_heads = c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    length, half = len(ids), size // 2

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[f"{name}.weight"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T

    def rope(x):  # [T, heads, size]; the pair (i, i + half) turns by position * theta^(-2i / size)
        angle = torch.arange(length)[:, None, None] * c["rope_theta"] ** (-2 * torch.arange(half).double() / size)
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def attention(x, layer):
        q = rope(linear(x, f"{layer}.q_proj").view(length, heads, size))
        k = rope(linear(x, f"{layer}.k_proj").view(length, kv_heads, size))
        v = linear(x, f"{layer}.v_proj").view(length, kv_heads, size)
        k, v = (t[:, [h * kv_heads // heads for h in range(heads)]] for t in (k, v))  # who shares which
        scores = torch.einsum("thd,shd->hts", q, k) / math.sqrt(size)
        scores += torch.full((length, length), -math.inf).double().triu(1)
        return linear(torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(length, -1), f"{layer}.o_proj")

    def mlp(x, layer):
        gate = linear(x, f"{layer}.gate_proj")
        return linear(gate / (1 + (-gate).exp()) * linear(x, f"{layer}.up_proj"), f"{layer}.down_proj")

    x, logits, exits = w["model.embed_tokens.weight"][ids], [], []
    left = torch.ones(length).double()
    for loop in range(c["total_ut_steps"]):
        for i in range(c["num_hidden_layers"]):
            at = f"model.layers.{i}"
            x = x + norm(attention(norm(x, f"{at}.input_layernorm"), f"{at}.self_attn"), f"{at}.input_layernorm_2")
            fed = mlp(norm(x, f"{at}.post_attention_layernorm"), f"{at}.mlp")
            x = x + norm(fed, f"{at}.post_attention_layernorm_2")
        x = norm(x, "model.norm")
        logits.append(linear(x, "lm_head"))
        gate = linear(x, "model.early_exit_gate")[:, 0] + w["model.early_exit_gate.bias"]
        stop = 1 / (1 + (-gate).exp()) if loop < c["total_ut_steps"] - 1 else torch.ones(length)
        exits.append(left * stop)
        left = left * (1 - stop)
    return logits, torch.stack(exits, -1)


# --- loading --------------------------------------------------------------------------------------------


def test_logits_and_exits_are_the_formulas_on_the_files(checkpoint):
    model = load_model(str(checkpoint), dtype="float64", device="cpu").model
    with torch.no_grad():
        out = model(IDS, output_loops=True)
        for row, ids in enumerate(IDS):
            logits, exits = reference(checkpoint, ids)
            assert len(logits) == len(out.loop_hidden_states) == 4
            for hidden, wanted in zip(out.loop_hidden_states, logits, strict=True):
                torch.testing.assert_close(model.lm_head(hidden[row]), wanted, atol=1e-9, rtol=0)
            torch.testing.assert_close(out.logits[row], logits[-1], atol=1e-9, rtol=0)
            torch.testing.assert_close(out.exit_probabilities[row], exits, atol=1e-9, rtol=0)
    spread = (out.exit_probabilities.amax(-1) < 0.99).float().mean()
    assert spread > 0.5  # the gate is no trivial one


def test_every_tensor_of_the_files_is_in_the_model(checkpoint):
    files, model = read(checkpoint), load_model(str(checkpoint), dtype="float64", device="cpu").model
    weights = model.state_dict()
    assert weights.keys() == files.keys()
    assert all(torch.equal(weights[name], files[name]) for name in files)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_nothing_is_asked_warned_or_run(folder, tmp_path):
    """In a process of its own, where nobody could answer a question and warnings are errors."""
    script = """
import sys, mulligan
from transformers import AutoModelForCausalLM, AutoTokenizer
from mulligan.models.loading import load_model
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for trust in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], **trust)
    assert type(model).__module__ == "mulligan.models.looped", type(model)
assert str(model.dtype) == "torch.bfloat16", model.dtype
assert load_model(sys.argv[1], trust_remote_code=True).model.config.total_ut_steps == 4
ids = tokenizer("1+1=", return_tensors="pt").input_ids
assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] <= len("1+1=") + 3
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
except RuntimeError as error:
    assert str(error) == "remote code of the checkpoint was run"
else:
    raise AssertionError("the trap does not work")
"""
    unknown = shutil.copytree(folder, tmp_path / "unknown")
    (unknown / "config.json").write_text(json.dumps(published.small() | {"model_type": "nobody-knows-it"}))
    said = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(folder), str(unknown)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert (said.returncode, said.stdout) == (0, ""), said.stderr
    # transformers' own progress bar is all that may be said.
    lines = said.stderr.replace("\r", "\n").splitlines()
    assert all(not line.strip() or line.startswith("Loading weights") for line in lines), said.stderr


def test_tokenizer_and_ids_are_the_files(checkpoint):
    loaded = load_model(str(checkpoint), device="cpu")
    assert loaded.tokenizer.encode("1+1<|im_end|>")[-1] == 2
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("né 7")) == "né 7"
    assert (loaded.tokenizer.eos_token_id, loaded.model.config.eos_token_id) == (0, 0)
    assert loaded.tokenizer.chat_template == published.CHATML
    assert loaded.model.config.rope_parameters == {"rope_theta": 1e6, "rope_type": "default"}


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "model.layers.1.mlp.up_proj.weight",
            "model.layers.1.mlp.w3.weight",
            "lacks model.layers.1.mlp.up_proj.weight",
        ),
        ("lm_head.weight", "head.weight", "lacks lm_head.weight"),  # the head is untied: the embeddings are no stand-in
        ("model.early_exit_gate.bias", "model.exit_gate.bias", "lacks model.early_exit_gate.bias"),
        (None, "model.lookahead_gate.weight", "a looped model has no model.lookahead_gate.weight (1 weights would"),
        (None, "model.layers.2.mlp.up_proj.weight", "a looped model has no model.layers.2.mlp.up_proj.weight (1"),
    ],
)
def test_wrong_names_are_refused(folder, old, new, said):
    weights = load_file(folder / WEIGHTS)
    weights[new] = torch.zeros(3) if old is None else weights.pop(old)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_model(str(folder), device="cpu")
    assert f"{folder}: " in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"early_exit_step": 2}, "early_exit_step must be None, not 2"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types must all be 'full_attention'"),
        ({"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported"),
        ({"early_exit_threshold": -1.0}, "early_exit_threshold must be a number from 0 to 1"),
        ({"early_exit_threshold": "0.5"}, "early_exit_threshold must be a number from 0 to 1"),
        ({"early_exit_threshold": math.nan}, "early_exit_threshold must be a number from 0 to 1"),
    ],
)
def test_settings_that_mean_something_else_are_refused(folder, change, said):
    (folder / "config.json").write_text(json.dumps(published.small() | change))
    with pytest.raises(UserError) as caught:
        load_model(str(folder), device="cpu")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_of_later_releases_are_read(folder):
    """The keys of transformers 5, none for the threshold, and keys of a fork that change nothing here."""
    c = published.small() | {"early_exit_threshold": None, "rltt_logprob_chunk_size": 2048, "dtype": "bfloat16"}
    c["rope_parameters"] = {"rope_theta": c.pop("rope_theta"), "rope_type": "default"}
    del c["rope_scaling"], c["torch_dtype"]
    before = load_model(str(folder), dtype="float64", device="cpu").model(IDS).logits
    (folder / "config.json").write_text(json.dumps(c))
    after = load_model(str(folder), dtype="float64", device="cpu").model
    torch.testing.assert_close(after(IDS).logits, before, atol=0, rtol=0)
    assert after.config.early_exit_threshold == 1.0


@pytest.mark.parametrize(
    ("layers", "tensors", "parameters"),
    [
        # A layer: 4 * 2048^2 + 3 * 2048 * 5632 + 4 * 2048 = 51,388,416; two embeddings of 49152 * 2048 = 100,663,296;
        # a norm of 2048 and a gate of 2049: 24 * 51,388,416 + 2 * 100,663,296 + 4097, and with 48 the number of
        # parameters that the Hub shows for the 2.6B model.
        (24, 24 * 11 + 5, 1_434_652_673),
        (48, 533, 2_667_974_657),
    ],
)
def test_full_sizes(layers, tensors, parameters):
    c = published.config(layers)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**c))
    assert isinstance(model, LoopedForCausalLM)
    wanted = published.shapes(c)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == wanted
    assert len(wanted) == tensors
    assert sum(p.numel() for p in model.parameters()) == sum(map(math.prod, wanted.values())) == parameters


def test_what_is_saved_is_laid_out_as_published(checkpoint, tmp_path):
    loaded = load_model(str(checkpoint), dtype="bfloat16", device="cpu")
    save_model(loaded.model, loaded.tokenizer, tmp_path / "again")
    before, after = read(checkpoint), read(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    c = json.loads((tmp_path / "again" / "config.json").read_text())
    assert c["architectures"] == ["OuroForCausalLM"]
    assert "auto_map" not in c  # it would point at files that are not there
    assert not list((tmp_path / "again").glob("*.py"))
    again = load_model(str(tmp_path / "again"), dtype="bfloat16", device="cpu").model
    torch.testing.assert_close(again(IDS).logits, loaded.model(IDS).logits, atol=0, rtol=0)
    fresh = LoopedForCausalLM(LoopedConfig(**{k: c[k] for k in ("hidden_size", "num_attention_heads", "vocab_size")}))
    fresh.save_pretrained(tmp_path / "fresh", max_shard_size="1GB")
    assert json.loads((tmp_path / "fresh" / "config.json").read_text())["architectures"] == ["OuroForCausalLM"]


# --- the command line -----------------------------------------------------------------------------------


EVAL = ("--problems", "2", "--samples", "1", "--max-new-tokens", "4", "--json")


def test_evaluation_at_fewer_loops_and_with_adaptive_exit(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call("eval", folder, *EVAL, "--loops", "1,4")
    assert (said.code, said.err) == (0, ""), said
    assert [row["loops"] for row in json.loads(said.out)["grid"]] == [1, 4]
    said = call("eval", folder, *EVAL, "--exit-threshold", "0")
    assert (said.code, said.err) == (0, ""), said
    assert json.loads(said.out)["exit_loop"] == 1.0


def test_a_run_on_a_published_checkpoint(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Chain, "verify", coin)
    said = call("train", "--model", folder, "--steps", "2", "--out", "run", "model.dtype=float32", *SMALL)
    assert said.code == 0, said
    assert said.err == ""
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["mismatch/max"] for line in steps if "mismatch/max" in line]
    assert len(gaps) == 2
    assert max(gaps) < 1e-4
    assert call("eval", "run", *EVAL).code == 0


# --- how many loops a run has ---------------------------------------------------------------------------


def test_a_run_with_fewer_loops(tmp_path, monkeypatch):
    """Sampler, learner, reference and what is saved have the run's number of loops; early exit is not trained."""
    monkeypatch.setattr(Chain, "verify", coin)
    pico = load_model("pico", device="cpu")
    pico.model.config.early_exit_threshold = 0.0  # a run reads out the last loop all the same
    save_model(pico.model, pico.tokenizer, tmp_path / "pico")
    out = tmp_path / "run"
    settings = ("--steps", "1", "--out", out, "model.loops=2", "method.kl=0.1", "model.dtype=float32", *SMALL)
    said = call("train", "--model", tmp_path / "pico", *settings)
    assert said.code == 0, said
    (step,) = [s for s in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "mismatch/max" in s]
    assert step["mismatch/max"] < 1e-5
    assert step.get("update/penalty", 0.0) == pytest.approx(0.0, abs=1e-6)  # the reference runs two loops too
    assert json.loads((out / "model" / "config.json").read_text())["total_ut_steps"] == 2
    assert "loops = 2" in (out / "run.toml").read_text()

    session = prepare(load_run(out / "run.toml"))
    ids = torch.tensor([session.texts.prompt(session.task.problem("train", 0))])
    with torch.no_grad():
        two = pico.model(ids, num_loops=2, exit_threshold=1.0).logits
        torch.testing.assert_close(session.loaded.model(ids, exit_threshold=1.0).logits, two, atol=0, rtol=0)
        assert not torch.allclose(pico.model(ids, exit_threshold=1.0).logits, two, atol=1e-2)


def test_more_loops_are_possible_and_none_without_loops():
    run = load_run(None, ["model.loops=6", "model.device=cpu", "model.dtype=float32"])
    assert prepare(run).loaded.model.config.total_ut_steps == 6
    with pytest.raises(UserError, match=r"model\.loops is 2, but a qwen3 model has no loops"):
        prepare(load_run(None, ["model.name=pico-qwen3", "model.loops=2", "model.device=cpu", "model.dtype=float32"]))
    with pytest.raises(UserError, match=r"model\.loops"):
        load_run(None, ["model.loops=0"])
