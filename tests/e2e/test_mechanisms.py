"""Each method's mechanism, alive on the shipped pico base: short runs of the real command line."""

from __future__ import annotations

import json

import pytest
import torch

from mulligan.learner.packing import Item, pack
from mulligan.learner.scoring import score
from mulligan.models.loading import load_model
from mulligan.rundir import load_run_model
from tests.e2e.helpers import call, metrics
from tests.e2e.test_real_model import GSM8K, qwen3  # noqa: F401 - a fixture

SHORT = (
    "task.level=4",
    "sampling.prompts=8",
    "eval.problems=4",
    "eval.samples=1",
    "eval.every=0",
    "optimizer.learning_rate=2e-4",
)


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    """Runs a method for some steps; the logged samples, the logged steps and the directory."""

    def run(method: str, steps: int, *more: str):
        out = tmp_path_factory.mktemp("run")
        said = call("train", "--method", method, "--steps", str(steps), "--out", out, *SHORT, *more)
        assert said.code == 0, said
        samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
        return samples, [m for m in metrics(out) if "update/loss" in m], out

    return run


def test_lte_trains_a_rescue_without_its_hint(train):
    samples, steps, _ = train("lte", 2)
    hinted = [s for s in samples if s["origin"] == "hinted"]
    plain = {s["problem"]: s["context_tokens"] for s in samples if s["origin"] == "fresh"}
    trained = [s for s in hinted if s["rows"]]
    assert trained
    for sample in trained:
        (row,) = sample["rows"]
        assert sample["verdict"] == "pass" and row["advantage"] > 0
        assert row["context_tokens"] == plain[sample["problem"]] != sample["context_tokens"]
    assert sum(m["retry/trained"] for m in steps) == len(trained)


def test_srpo_resets_behind_the_first_step_and_trains_only_what_follows(train):
    samples, steps, _ = train("srpo", 2)
    by_uid = {(s["step"], s["uid"]): s for s in samples}
    resets = [s for s in samples if s["origin"] == "reset" and s["branch"] > 0]
    assert resets
    for sample in resets:
        parent = by_uid[sample["step"], sample["parent"]]
        assert parent["verdict"] == "fail" and parent["rows"]
        assert sample["tokens"][: sample["branch"]] == parent["tokens"][: sample["branch"]]
        assert sample["rows"][0]["trained"] == len(sample["tokens"]) - sample["branch"]
    diagnoses = [s for s in samples if s["origin"] == "diagnosis"]
    assert diagnoses and not any(s["rows"] for s in diagnoses)
    assert all(m["reset/agreement"] > 0.3 and m["diagnosis/parse_failures"] < 0.2 for m in steps)


def test_dsrl_sees_no_prompt_for_exactly_its_steps(train):
    samples, _, _ = train("dsrl(steps=2)", 4)
    bos = load_model("pico").tokenizer.bos_token_id
    for sample in samples:
        for row in sample["rows"]:
            if sample["step"] <= 2:
                assert row["context_tokens"] == [bos] and sample["verdict"] == "fail" and row["advantage"] < 0
            else:
                assert row["context_tokens"] == sample["context_tokens"] and len(row["context_tokens"]) > 1
    assert {s["step"] for s in samples if s["rows"]} == {1, 2, 3, 4}


def test_nsr_prerl_lowers_the_marginal_of_what_was_wrong(train):
    samples, _, out = train("nsr-prerl", 1, "diagnose.alignment=1")
    before, after = load_model("pico").model, load_run_model(out)[0].model
    wrong = [s for s in samples if s["rows"]]
    assert wrong and all(s["verdict"] == "fail" for s in wrong)

    def marginal(model) -> float:
        items = [Item((1,), tuple(s["tokens"]), torch.ones(len(s["tokens"]), dtype=torch.bool), 1.0) for s in wrong]
        with torch.no_grad():
            return float(score(model.eval(), pack(items, 0, model.device)).logprobs[-1].sum())

    assert marginal(after) < marginal(before) - 1.0
    (step,) = (m for m in metrics(out) if "update/loss" in m)
    assert -1 <= step["diagnose/alignment"] <= 1 and 0 <= step["diagnose/aligned"] <= 1


def test_rltt_learns_from_loops_before_the_last(train, tmp_path):
    """With no weight on the last loop something is learned all the same; with the gate asked, it moves, too."""
    early = tmp_path / "early.py"
    early.write_text(
        "from mulligan.methods.rltt import rltt\n"
        "from mulligan.objective import AllLoops\n"
        "early = rltt().replace(name='early', readout=AllLoops(weighting=(0.5, 0.5, 0.0, 0.0)))\n"
    )
    _, (step,), _ = train(f"{early}:early", 1)
    assert step["update/gradient_norm"] > 0
    gates = []
    for method in ("rltt", "rltt(train_gate=true)"):
        _, (step,), out = train(method, 1)
        assert step["update/gradient_norm"] > 0
        gates.append(load_run_model(out)[0].model.base_model.early_exit_gate.weight)
    base = load_model("pico").model.base_model.early_exit_gate.weight
    assert torch.equal(gates[0], base) and not torch.equal(gates[1], base)


@pytest.mark.parametrize("method", ["srpo+rltt", "lte+rltt", "dsrl(lte, steps=1)+rltt"])
def test_compositions_run(train, method):
    samples, steps, _ = train(method, 2)
    assert all(m["update/gradient_norm"] > 0 for m in steps)
    assert {s["origin"] for s in samples} >= ({"reset", "diagnosis"} if "srpo" in method else {"hinted"})


def test_resets_work_on_an_ordinary_model_with_steps_at_a_delimiter(qwen3, tmp_path):  # noqa: F811
    """Random weights write no blank lines, so the delimiter is a letter that they do write."""
    out = tmp_path / "run"
    settings = ["--task", "jsonl", f"task.path={GSM8K}", "task.step_delimiter=e", "sampling.max_new_tokens=24"]
    sizes = ["sampling.prompts=2", "eval.problems=2", "eval.samples=1"]
    said = call("train", "--model", qwen3, "--method", "rrpo", "--steps", "1", "--out", out, *settings, *sizes)
    assert said.code == 0, said
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [s["origin"] for s in samples].count("reset") == 8
    said = call("train", "--model", qwen3, "--method", "nsr-prerl", "--dry-run", *settings)
    assert said.code == 2 and "has no BOS; choose a token: method.bos" in said.err
    said = call("train", "--model", qwen3, "--method", "nsr-prerl", "--dry-run", "method.bos=<|endoftext|>", *settings)
    assert said.code == 0, said
