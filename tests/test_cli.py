"""The command line: what each command prints, and that a wrong word is one line and exit code 2."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mulligan import cli, doctor, evalcli
from mulligan.errors import UserError
from mulligan.methods import PRESETS
from mulligan.models.loading import load_model
from mulligan.tasks import TASKS
from mulligan.tasks.chain import Chain
from tests.e2e.helpers import SMALL, call, make_model, refused
from tests.e2e.kill_at import coin


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.set_num_threads(1)
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chain, "verify", coin)
        said = call("train", "--model", tiny, "--steps", "2", "--out", folder, "task.level=2", *SMALL)
    assert said.code == 0, said
    return folder


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


EVAL = ("--problems", "3", "--samples", "2", "--max-new-tokens", "12")

# --- words ----------------------------------------------------------------------------------------------


def test_without_arguments_the_help_is_shown():
    said = call()
    assert "Usage: mulligan" in said.out and said.err == ""
    for command in ("train", "eval", "tasks", "methods", "base", "export", "doctor"):
        assert command in said.out


@pytest.mark.parametrize("command", ["train", "eval", "tasks", "methods", "base", "export", "doctor"])
def test_every_command_has_help(command):
    said = call(command, "--help")
    assert said.code == 0 and f"Usage: mulligan {command}" in said.out


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["trian"], ["trian", "train"]),
        (["train", "--stepz", "3"], ["--stepz", "--steps"]),
        (["train", "--steps", "many"], ["--steps", "integer"]),
        (["train", "nowhere.toml"], ["nowhere.toml", "cannot read"]),
        (["train", "steps=1", "nowhere.toml"], ["'nowhere.toml' is neither"]),
        (["eval", "--samples", "0"], ["--samples"]),
        (["eval", "--split", "train"], ["--split", "dev, test"]),
        (["eval", "--probe", "localization"], ["--probe", "did you mean 'localisation'"]),
        (["eval", "pico", "steps=3"], ["'steps=3'", "task.key=value alone"]),
        (["export", "nowhere"], ["--to"]),
        (["export", "nowhere", "--to", "new"], ["nowhere is no run"]),
        (["base", "picco"], ["picco", "pico"]),
        (["tasks", "chain"], ["chain"]),
        (["train", "--dry-run", "model.device=gpu"], ["device 'gpu'"]),
        (["train", "--dry-run", "model.device=meta"], ["device 'meta'"]),
        (["train", "--dry-run", "method.name=grop"], ["method.name", "grpo"]),
        (["train", "--dry-run", "method.group_sice=3"], ["method.group_sice", "did you mean 'group_size'"]),
        (["train", "--dry-run", "task.levl=3"], ["task.levl", "did you mean 'level'"]),
        (["train", "--dry-run", "task.level=99"], ["task.level", "99"]),
        (["train", "--dry-run", "sampling.promts=3"], ["sampling.promts", "did you mean 'prompts'"]),
        (["train", "--dry-run", "task.name=jsonl"], ["task.path"]),
    ],
)
def test_a_wrong_word(argv, parts):
    refused(call(*argv), *parts)


def test_an_error_of_the_project_is_not_hidden(monkeypatch):
    def broken():
        raise KeyError("a bug")

    monkeypatch.setattr(cli, "app", lambda **_: broken())
    with pytest.raises(KeyError):
        call("tasks")


# --- lists ----------------------------------------------------------------------------------------------


def test_tasks():
    rows = json.loads(call("tasks", "--json").out)
    assert [r["name"] for r in rows] == list(TASKS)
    chain = next(r for r in rows if r["name"] == "chain")
    assert chain["oracle"] is True
    assert chain["settings"]["level"] == {"default": 3, "type": "integer"}
    assert chain["settings"]["min_steps"] == {"default": None, "type": "integer or null"}
    assert chain["settings"]["answer"] == {"default": "all", "type": "string", "choices": ["all", "one"]}
    assert all(name in call("tasks").out for name in TASKS)


def test_methods():
    rows = json.loads(call("methods", "--json").out)
    assert [r["name"] for r in rows] == list(PRESETS)
    for row in rows:
        assert row["summary"] and row["settings"]["group_size"]["type"] == "integer"
    grpo = next(r for r in rows if r["name"] == "grpo")
    assert grpo["paper"] == "2402.03300" and grpo["streams"] == ["start_logprobs"]
    assert grpo["settings"]["aggregation"]["choices"] == ["token", "sequence", "constant"]
    shown = call("methods").out
    assert all(name in shown for name in PRESETS)


# --- dry runs -------------------------------------------------------------------------------------------


def test_a_dry_run_trains_nothing_and_writes_nothing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("mulligan.train.train", lambda *_, **__: pytest.fail("it trains"))
    said = call("train", "--model", tiny, "--dry-run", "--steps", "7", "--method", "dapo", "sampling.prompts=3")
    assert said.code == 0 and said.err == ""
    assert list(tmp_path.iterdir()) == []
    told = tomllib.loads(said.out)
    assert (told["steps"], told["method"]["name"], told["sampling"]["prompts"]) == (7, "dapo", 3)
    assert told["model"]["name"] == str(tiny) and told["out"] == "runs/chain-dapo-seed0"
    assert "# contract holds: dapo: " in said.out


def test_what_a_dry_run_prints_is_a_run_file(tiny, tmp_path):
    first = call("train", "--model", tiny, "--dry-run", "task.level=2", "--seed", "4", "--task", "chain")
    (tmp_path / "run.toml").write_text(first.out)
    assert call("train", "run.toml", "--dry-run") == first
    told = tomllib.loads(call("train", "run.toml", "--dry-run", "seed=5", "task.level=1", "--seed", "6").out)
    assert (told["seed"], told["task"]["level"]) == (6, 1)


@pytest.mark.parametrize("method", PRESETS)
def test_every_method_holds_its_contract(method, tiny, qwen3):
    for model in (tiny, qwen3):
        said = call("train", "--model", model, "--method", method, "--dry-run")
        assert said.code in (0, 2), said
        if said.code:  # a method may need loops, and then says so
            refused(said, method)
            assert model == qwen3


# --- eval -----------------------------------------------------------------------------------------------


def test_eval(tiny):
    said = call("eval", tiny, *EVAL, "--json", "task.level=1")
    assert said.code == 0 and said.err == ""
    told = json.loads(said.out)
    keys = {"pass@1", "pass@1_low", "pass@1_high", "pass@2", "none_pass", "process_correct", "luck", "length"}
    assert keys <= told.keys()
    assert 0 <= told["pass@1_low"] <= told["pass@1"] <= told["pass@1_high"] <= 1
    assert (told["problems"], told["samples"]) == (3, 2)
    assert told["settings"]["task"]["level"] == 1 and told["settings"]["split"] == "test"
    assert call("eval", tiny, *EVAL, "--json", "task.level=1") == said
    assert "pass@1" in call("eval", tiny, *EVAL).out


def test_eval_greedy_and_loops(tiny, qwen3):
    told = json.loads(call("eval", tiny, *EVAL, "--json", "--temperature", "0", "--loops", "1").out)
    assert told["settings"]["loops"] == 1 and told["settings"]["temperature"] == 0
    refused(call("eval", qwen3, *EVAL, "--loops", "1"), "--loops", "has no loops")


def test_eval_of_a_run_takes_its_task(run):
    told = json.loads(call("eval", run, *EVAL, "--json").out)
    assert told["settings"]["task"]["level"] == 2
    told = json.loads(call("eval", run, *EVAL, "--json", "task.level=1").out)
    assert told["settings"]["task"]["level"] == 1
    told = json.loads(call("eval", run, *EVAL, "--json", "--task", "boolean").out)
    assert told["settings"]["task"]["name"] == "boolean"


def test_eval_names_its_task_once(tiny):
    told = json.loads(call("eval", tiny, *EVAL, "--json", "task.name=boolean").out)
    assert told["settings"]["task"]["name"] == "boolean"
    refused(call("eval", tiny, *EVAL, "task.name=boolean", "--task", "chain"), "two tasks")
    refused(call("eval", tiny, "--task", "chian"), "task.name", "did you mean 'chain'")


def test_eval_without_a_model_is_of_pico(monkeypatch, tiny):
    monkeypatch.setattr(evalcli, "load_model", lambda name: load_model(str(tiny)) if name == "pico" else None)
    told = json.loads(call("eval", "task.level=1", *EVAL, "--json").out)
    assert (told["settings"]["model"], told["settings"]["task"]["level"]) == ("pico", 1)


@pytest.mark.parametrize(
    ("probe", "keys"),
    [
        ("localisation", {"localisation", "best_constant", "margin", "failed_chains"}),
        ("hint", {"hinted", "unhinted", "gain", "none_pass_problems"}),
        ("alone", {"with_question", "alone", "uniform", "problems"}),
    ],
)
def test_probes(probe, keys, tiny, qwen3, tmp_path):
    for model in (tiny, qwen3):
        said = call("eval", model, *EVAL, "--json", "--probe", probe, "task.level=1")
        assert said.code == 0, said
        assert keys <= json.loads(said.out).keys()
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}+1", "answer": str(i + 1)}) + "\n" for i in range(40)))
    said = call("eval", tiny, *EVAL, "--json", "--probe", probe, "--task", "jsonl", "task.path=rows.jsonl")
    if probe == "alone":  # needs no oracle; there are fewer problems than are asked for
        assert json.loads(said.out)["problems"] <= 40
    else:
        refused(said, f"--probe {probe}", "'jsonl' does not")


# --- export, doctor -------------------------------------------------------------------------------------


def test_export(run, tmp_path):
    said = call("export", run, "--to", "new")
    assert said.code == 0 and "AutoModelForCausalLM" in said.out
    exported = load_model("new").model.state_dict()
    newest = run / "checkpoints" / "step-00000002" / "model.safetensors"
    for name, tensor in load_file(newest).items():
        assert torch.equal(exported[name], tensor)
    assert type(AutoModelForCausalLM.from_pretrained("new")).__name__ == "LoopedForCausalLM"
    refused(call("export", run, "--to", "new"), "new is not empty")


def test_doctor(tiny, monkeypatch):
    monkeypatch.setattr(doctor, "load_model", lambda name: load_model(str(tiny)))
    said = call("doctor", "--json")
    facts = json.loads(said.out)
    assert said.code == 0 and facts["ok"] is True and facts["pico_tokens_per_second"] > 0
    assert facts["packages"]["torch"] and facts["cores"] >= 1 and "free_disk_gib" in facts
    assert "ok" in call("doctor").out

    def absent(name):
        raise UserError("no weights here")

    monkeypatch.setattr(doctor, "load_model", absent)
    said = call("doctor", "--json")
    assert said.code == 1 and json.loads(said.out)["problem"] == "no weights here"


# --- terminals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [20, 40])
def test_a_narrow_terminal(width, terminal, tiny, monkeypatch):
    monkeypatch.setattr(cli, "out", Console(width=width, force_terminal=terminal))
    assert call("tasks").code == call("methods").code == call("eval", tiny, *EVAL).code == 0
    said = call("train", "--model", tiny, "--steps", "2", "--out", "run", *SMALL)
    assert said.code == 0, said
    assert "accuracy" in said.out or width == 20


def test_names_are_not_markup(tiny, tmp_path):
    """rich reads [bold] and [/nothing] as its own; a directory may be called so."""
    said = call("train", "--model", tiny, "--steps", "1", "--out", "[bold]a[", *SMALL, "eval.every=0")
    assert said.code == 0 and "results in [bold]a[\n" in said.out
    assert call("train", "--model", tiny, "--steps", "1", "--out", "x[/y]", *SMALL).code == 0
    assert "x[/y]" in call("train", "--model", tiny, "--steps", "2", "--out", "x[/y]", *SMALL, "--resume").out
    assert "new[/y]" in call("export", "x[/y]", "--to", "new[/y]").out
    refused(call("export", "[/z]", "--to", "q"), "[/z] is no run")


def test_another_process():
    """As it is really started, in a narrow terminal: no traceback, no warning, one line for an error."""
    environment = os.environ | {"COLUMNS": "40", "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-W", "error", "-m", "mulligan"]
    listed = subprocess.run([*argv, "methods"], capture_output=True, text=True, env=environment)
    assert (listed.returncode, listed.stderr) == (0, "") and "grpo" in listed.stdout
    assert max(map(len, listed.stdout.splitlines())) <= 40
    wrong = subprocess.run([*argv, "train", "stepz=3"], capture_output=True, text=True, env=environment)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "mulligan: 'stepz' is no setting (did you mean 'steps'?)\n"
