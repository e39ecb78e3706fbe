"""Runs in reduced precision: what is resolved, that resuming is exact, and that nothing is measured twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mulligan import session as sessions
from mulligan.checkpoint import read_checkpoint
from mulligan.config import load_run, read_toml
from mulligan.learner.update import Learner
from mulligan.policy import choose_precision
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.sampling.precision import RoundedSampler
from mulligan.session import prepare, settle_dtype
from tests.e2e.helpers import SMALL, call, ended_alike, make_model, metrics, refused
from tests.helpers import needs_compiler

HALF = ("sampling.dtype=bfloat16", "model.compute_dtype=bfloat16")
TRAIN = ("train", "--out", "run", *SMALL, "task.level=1", "model.device=cpu")
# The shipped models pass and fail, so that there is something to learn.
SHIPPED = (*TRAIN, "sampling.prompts=2", "sampling.max_new_tokens=40", "eval.problems=1")


def run(folder: Path, monkeypatch, *argv: str | Path) -> Path:
    """``mulligan`` in a folder; the run's directory."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    said = call(*argv)
    assert said.code == 0, said
    return folder / "run"


def mismatches(run: Path) -> list[float]:
    return [line["mismatch/max"] for line in metrics(run) if "mismatch/max" in line]


# --- exact ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("pico", ("optimizer.updates_per_batch=2", "optimizer.epochs=2")),
        ("pico-qwen3", ("lora.rank=2",)),
    ],
)
def test_a_resumed_run_ends_like_one_that_was_not_stopped(model, more, tmp_path, monkeypatch):
    argv = (*SHIPPED, "--model", model, *HALF, *more)
    whole = run(tmp_path / "whole", monkeypatch, *argv, "--steps", "3")
    run(tmp_path / "parts", monkeypatch, *argv, "--steps", "2")
    ended_alike(whole, run(tmp_path / "parts", monkeypatch, *argv, "--steps", "3", "--resume"))
    kept = read_checkpoint(whole / "checkpoints" / "step-00000003").tensors
    floating = [t for part in ("model", "optimizer") for t in kept[part].values() if t.is_floating_point()]
    assert {tensor.dtype for tensor in floating} == {torch.float32}
    trained = [line["update/gradient_norm"] for line in metrics(whole) if "update/gradient_norm" in line]
    assert len(trained) == 3 and any(trained)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["pico", "pico-qwen3"])
def test_a_compiled_run_goes_on_as_it_would_have(model, tmp_path, monkeypatch):
    argv = (*SHIPPED, "--model", model, "model.compile=true")
    for more in ((), HALF):
        folder = tmp_path / f"of{len(more)}"
        folder.mkdir()
        whole = run(folder / "whole", monkeypatch, *argv, *more, "--steps", "3")
        torch._dynamo.reset()  # another process has compiled nothing
        run(folder / "parts", monkeypatch, *argv, *more, "--steps", "2")
        torch._dynamo.reset()
        ended_alike(whole, run(folder / "parts", monkeypatch, *argv, *more, "--steps", "3", "--resume"))


@needs_compiler
@pytest.mark.parametrize("model", ["pico", "pico-qwen3"])
@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_a_run_with_kernels_goes_on_as_it_would_have(model, half, tmp_path, monkeypatch):
    argv = (*SHIPPED, "--model", model, "model.kernels=true", *(HALF if half else ()))
    whole = run(tmp_path / "whole", monkeypatch, *argv, "--steps", "3")
    assert all(off < (1.0 if half else 1e-5) for off in mismatches(whole))
    run(tmp_path / "parts", monkeypatch, *argv, "--steps", "2")
    ended_alike(whole, run(tmp_path / "parts", monkeypatch, *argv, "--steps", "3", "--resume"))


def test_kernels_and_an_adapter_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(call(*SHIPPED, "--model", "pico-qwen3", "model.kernels=true", "lora.rank=2"), "model.kernels", "lora.rank")


@pytest.mark.parametrize("more", ["lora.rank=2", "model.gradient_checkpointing=true"])
def test_what_is_not_compiled_is_refused(more, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call(*SHIPPED, "--model", "pico-qwen3", "model.compile=true", more)
    refused(said, "model.compile: not together with", more.split("=")[0])


@pytest.mark.parametrize(("more", "low", "high"), [((), 0.0, 1e-5), (HALF[:1], 1e-4, 1.0), (HALF[1:], 1e-4, 1.0)])
def test_the_distance_of_sampler_and_learner_is_logged(more, low, high, tmp_path, monkeypatch):
    found = mismatches(run(tmp_path, monkeypatch, *SHIPPED, "--steps", "2", *more))
    assert found and all(low <= off < high for off in found)


# --- measured -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "dtype"), [(1.149, "float32"), (1.15, "bfloat16")])
def test_what_is_clearly_faster_is_chosen(ratio, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "speedup", lambda *_: ratio)
    session = prepare(load_run(None, ["model.device=cpu", "sampling.dtype=measured"]))
    assert type(session.sampler) is EmbeddedSampler
    assert settle_dtype(session) == {"time/bfloat16_sampling_speedup": ratio} and settle_dtype(session) == {}
    assert session.run.sampling.dtype == session.resolved["sampling"]["dtype"] == dtype
    assert type(session.sampler) is (RoundedSampler if dtype == "bfloat16" else EmbeddedSampler)
    assert session.precision == [f"sampling.dtype='{dtype}': bfloat16 samples {ratio:.2f} times as fast (1.15 pays)"]


def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    model, ratios = make_model(tmp_path / "model"), iter([2.0])
    monkeypatch.setattr(sessions, "speedup", lambda *_: next(ratios))  # a second measurement would fail
    argv = (*TRAIN, "--model", model, "sampling.dtype=measured")
    folder = run(tmp_path / "parts", monkeypatch, *argv, "--steps", "1")
    assert read_toml(folder / "run.toml")["sampling"]["dtype"] == "bfloat16"
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert first == {"step": 0, "time/bfloat16_sampling_speedup": 2.0}
    run(tmp_path / "parts", monkeypatch, *argv, "--steps", "2", "--resume")
    named = run(tmp_path / "named", monkeypatch, *argv[:-1], "sampling.dtype=bfloat16", "--steps", "2")
    assert (folder / "samples.jsonl").read_bytes() == (named / "samples.jsonl").read_bytes()
    states = [read_checkpoint(r / "checkpoints" / "step-00000002") for r in (folder, named)]
    assert states[0].state["run"] == states[1].state["run"]
    for part in ("model", "optimizer"):
        assert all(t.equal(states[1].tensors[part][name]) for name, t in states[0].tensors[part].items())


def test_a_run_killed_before_its_first_checkpoint_measures_no_more(tmp_path, monkeypatch):
    model, ratios = make_model(tmp_path / "model"), iter([9.0])
    monkeypatch.setattr(sessions, "speedup", lambda *_: next(ratios))
    argv = (*TRAIN, "--model", model, "sampling.dtype=measured", "--steps", "1")
    update = Learner.update
    monkeypatch.setattr(Learner, "update", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "killed", monkeypatch, *argv)
    monkeypatch.setattr(Learner, "update", update)
    folder = run(tmp_path / "killed", monkeypatch, *argv, "--resume")
    assert read_toml(folder / "run.toml")["sampling"]["dtype"] == "bfloat16"


def test_it_is_really_measured(tmp_path, monkeypatch):
    """Whatever the ratio; the line says it, and a resumed run is not measured."""
    monkeypatch.chdir(tmp_path)
    model = make_model(tmp_path / "model")
    argv = (*TRAIN, "--model", model, "sampling.dtype=measured")
    said = call(*argv, "--steps", "1")
    assert said.code == 0 and "times as fast (1.15 pays)\n" in said.out
    assert "times as fast" not in call(*argv, "--steps", "2", "--resume").out
    assert 'dtype = "measured"' in call(*argv, "--dry-run").out


# --- resolved -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "weights", "compute", "sampling"),
    [
        ((), "float32", "float32", "float32"),
        (("sampling.dtype=measured",), "float32", "float32", "measured"),
        (HALF, "float32", "bfloat16", "bfloat16"),
        (("model.dtype=bfloat16",), "bfloat16", "bfloat16", "bfloat16"),
        (("model.dtype=bfloat16", "sampling.dtype=measured"), "bfloat16", "bfloat16", "bfloat16"),
    ],
)
def test_auto_is_the_weights_own(given, weights, compute, sampling):
    run = choose_precision(load_run(None, ["model.device=cpu", *given]))
    assert (run.model.dtype, run.model.compute_dtype, run.sampling.dtype) == (weights, compute, sampling)
    assert choose_precision(run) == run


@pytest.mark.parametrize("key", ["sampling.dtype", "model.compute_dtype"])
def test_float32_of_rounded_weights_is_refused(key):
    refused(call("train", "--dry-run", "model.dtype=bfloat16", f"{key}=float32"), key, "model.dtype='float32'")
    refused(call("train", "--dry-run", f"{key}=float16"), key, "bfloat16", "float16")


def test_the_samplers():
    session = prepare(load_run(None, ["model.device=cpu", *HALF]))
    assert type(session.sampler) is RoundedSampler and session.learner.plan.autocast == torch.bfloat16
    assert session.eval_sampler.model is session.learner.model is not session.sampler.model
    whole = prepare(load_run(None, ["model.device=cpu", "model.dtype=bfloat16"]))
    assert whole.sampler.model is whole.learner.model and whole.learner.plan.autocast is None
