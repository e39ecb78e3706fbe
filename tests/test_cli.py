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
from mulligan.sampling.embedded import EmbeddedSampler
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
    for command in ("train", "eval", "grade", "tasks", "methods", "base", "export", "replay", "doctor"):
        assert command in said.out


@pytest.mark.parametrize(
    "command", ["train", "eval", "grade", "tasks", "methods", "base", "export", "replay", "doctor"]
)
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
        (["eval", "--max-new-tokens", "0"], ["--max-new-tokens", "'0'", "such as 1,2,4"]),
        (["eval", "--max-new-tokens", "64,many"], ["--max-new-tokens", "'64,many'"]),
        (["eval", "--max-new-tokens", "all"], ["--max-new-tokens", "'all'"]),
        (["eval", "--max-new-tokens", "64,32,64"], ["--max-new-tokens", "64 is named twice"]),
        (["eval", "--loops", ""], ["--loops", "or 'all'"]),
        (["eval", "--loops", "1,,2"], ["--loops", "'1,,2'"]),
        (["eval", "--loops", "-1"], ["--loops", "'-1'"]),
        (["eval", "--loops", "1.5"], ["--loops", "'1.5'"]),
        (["eval", "--loops", "2,02"], ["--loops", "2 is named twice"]),
        (["eval", "--loops", "٣"], ["--loops"]),
        (["eval", "--loops", "9" * 5000], ["--loops"]),
        (["eval", "--relative-to", "nowhere/at/all"], ["--relative-to", "nowhere/at/all"]),
        (["eval", "--relative-to", "pico", "--probe", "hint"], ["--relative-to", "--probe"]),
        (["eval", "--probe", "hint", "--loops", "1,2"], ["--probe hint", "--loops"]),
        (["eval", "--probe", "hint", "--max-new-tokens", "1,2"], ["--probe hint", "--max-new-tokens"]),
        (["eval", "--loops", "2", "--relative-to", "pico-qwen3"], ["--relative-to", "pico-qwen3 has no loops"]),
        (["eval", "pico-qwen3", "--loops", "all"], ["--loops", "pico-qwen3 has no loops"]),
        (["eval", "--split", "train"], ["--split", "dev, test"]),
        (["eval", "--probe", "localization"], ["--probe", "did you mean 'localisation'"]),
        (["eval", "pico", "steps=3"], ["'steps=3'", "task.key=value alone"]),
        (["export", "nowhere"], ["nowhere is no run"]),
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
        assert row["summary"] and all("type" in setting for setting in row["settings"].values())
    grpo = next(r for r in rows if r["name"] == "grpo")
    assert grpo["paper"] == "2402.03300" and grpo["streams"] == ["start_logprobs"]
    assert grpo["settings"]["aggregation"]["choices"] == ["token", "sequence", "constant"]
    shown = call("methods").out
    assert all(name in shown for name in PRESETS if not name.endswith("-published"))
    assert "-published: group_size=64 aggregation=sequence kl=0.04" in " ".join(shown.split())


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
            refused(said, method.removesuffix("-published"))
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
    monkeypatch.setattr(evalcli, "load_model", lambda name, **_: load_model(str(tiny)) if name == "pico" else None)
    told = json.loads(call("eval", "task.level=1", *EVAL, "--json").out)
    assert (told["settings"]["model"], told["settings"]["task"]["level"]) == ("pico", 1)


def ends(*names):
    return tuple(f"{name}{end}" for name in names for end in ("", "_low", "_high"))


# What a plain evaluation prints, in order; scripts read it.
NUMBERS = (
    *ends("pass@1", "avg@2", "pass@2", "maj@2", "none_pass", "process_correct", "luck", "length", "truncated"),
    *("unscorable", "problems", "samples"),
)
PLAIN = (*NUMBERS, "notes", "settings")
SETTINGS = (
    *("model", "weights", "dtype", "device", "kernels", "chat", "thinking", "system", "task", "split", "problems"),
    *("samples", "temperature", "max_new_tokens", "stop", "seed", "loops", "exit_threshold", "max_rows", "probe"),
    "versions",
)
PLACE = ("task", "loops", "exit_threshold", "max_new_tokens")
DIFFERENCE = ends("pass@1_difference")


def test_a_single_pair_has_no_grid(tiny, monkeypatch):
    monkeypatch.setattr(Chain, "verify", coin)  # so that there are answers, and chains of both kinds
    told = json.loads(call("eval", tiny, *EVAL, "--json", "--loops", "2").out)
    assert (tuple(told), tuple(told["settings"])) == (PLAIN, SETTINGS)
    assert (told["settings"]["loops"], told["settings"]["max_new_tokens"]) == (2, 12)
    plain = json.loads(call("eval", tiny, *EVAL, "--json").out)
    assert plain["settings"]["loops"] is None
    assert plain | {"settings": told["settings"]} == told  # 2 loops are its own number


def loads_of(monkeypatch):
    """The names that are loaded from here on."""
    names = []

    def load(name, **more):
        names.append(name)
        return load_model(name, **more)

    monkeypatch.setattr(evalcli, "load_model", load)
    return names


def test_a_grid_is_its_single_evaluations(tiny, monkeypatch):
    monkeypatch.setattr(Chain, "verify", coin)
    names, ran = loads_of(monkeypatch), []

    class Noted(EmbeddedSampler):
        def __init__(self, *models, num_loops, max_new_tokens, **more):
            ran.append((num_loops, max_new_tokens))
            super().__init__(*models, num_loops=num_loops, max_new_tokens=max_new_tokens, **more)

    monkeypatch.setattr(evalcli, "EmbeddedSampler", Noted)
    said = call("eval", tiny, *EVAL[:4], "--max-new-tokens", "4,12", "--loops", "all", "--json", "task.level=1")
    assert said.code == 0 and said.err == "" and names == [str(tiny)]
    told = json.loads(said.out)
    assert tuple(told) == ("grid", "notes", "settings")
    assert (told["settings"]["loops"], told["settings"]["max_new_tokens"]) == ([1, 2], [4, 12])
    assert [(e["loops"], e["max_new_tokens"]) for e in told["grid"]] == ran
    assert ran == [(1, 4), (1, 12), (2, 4), (2, 12)]
    for entry in told["grid"]:
        assert tuple(entry)[:4] == PLACE and entry["task"] == "chain"
        pair = ("--loops", entry["loops"], "--max-new-tokens", entry["max_new_tokens"])
        single = json.loads(call("eval", tiny, *EVAL[:4], *pair, "--json", "task.level=1").out)
        assert {k: v for k, v in entry.items() if k not in PLACE} == {k: single[k] for k in tuple(single)[:-2]}
    assert len({entry["length"] for entry in told["grid"]}) > 1


def test_all_loops_of_a_model_with_one_are_a_single_pair(tiny, monkeypatch):
    monkeypatch.setattr(evalcli, "number_of_loops", lambda model: 1)
    told = json.loads(call("eval", tiny, *EVAL, "--loops", "all", "--json").out)
    assert "grid" not in told and told["settings"]["loops"] == 1


def test_a_grid_of_a_task_without_an_oracle(qwen3, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}+1", "answer": str(i + 1)}) + "\n" for i in range(40)))
    argv = ("eval", qwen3, *EVAL[:4], "--max-new-tokens", "2,3", "--task", "jsonl", "task.path=rows.jsonl")
    grid = json.loads(call(*argv, "--json").out)["grid"]
    assert [(e["loops"], "process_correct" in e) for e in grid] == [(None, False)] * 2
    lines = call(*argv).out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["limit", "2", "3"] and "steps" not in lines[0]


@pytest.mark.parametrize("more", [(), ("--relative-to",)])
def test_a_grid_fits_80_columns(more, tiny, monkeypatch):
    monkeypatch.setattr(Chain, "verify", coin)  # so that numbers are not all 0
    monkeypatch.setattr(cli, "out", Console(width=80))
    argv = ("eval", tiny, "--problems", "8", "--samples", "2", "--max-new-tokens", "9,10", "--loops", "1,2")
    said = call(*argv, *more, *([tiny] if more else []))
    lines = said.out.splitlines()
    assert said.code == 0 and max(map(len, lines)) <= 80
    assert [line.split()[:2] for line in lines[1:5]] == [["1", "9"], ["1", "10"], ["2", "9"], ["2", "10"]]
    assert lines[0].split()[:4] == ["loops", "limit", "pass@1", "[95"]
    assert lines[5].strip() == "" and lines[6].startswith("settings")
    assert all(line.rstrip().endswith("]") is bool(more) for line in lines[1:5])
    entry = json.loads(call(*argv, "--json").out)["grid"][3]
    assert f"{entry['pass@1']:.3f} [{entry['pass@1_low']:.3f}, {entry['pass@1_high']:.3f}]" in lines[4]
    assert f" {entry['length']:.0f} " in lines[4] and f" {entry['truncated']:.3f}" in lines[4]


def test_relative_to_another_model(tiny, qwen3, monkeypatch):
    monkeypatch.setattr(Chain, "verify", coin)
    names = loads_of(monkeypatch)
    argv = ("--problems", "8", "--samples", "4", "--max-new-tokens", "12", "--json")
    own, other = (json.loads(call("eval", model, *argv).out) for model in (tiny, qwen3))
    names.clear()
    told = json.loads(call("eval", tiny, *argv, "--relative-to", qwen3).out)
    assert names == [str(tiny), str(qwen3)]
    assert told["pass@1_difference"] == pytest.approx(own["pass@1"] - other["pass@1"])
    assert told["pass@1_difference"] != 0
    assert told["pass@1_difference_low"] <= told["pass@1_difference"] <= told["pass@1_difference_high"]
    weights = other["settings"]["weights"]
    assert told["settings"] == own["settings"] | {"relative_to": str(qwen3), "relative_to_weights": weights}
    assert weights != own["settings"]["weights"]
    assert set(told) == set(own) | set(DIFFERENCE)
    same = json.loads(call("eval", tiny, *argv, "--relative-to", tiny).out)
    assert [same[key] for key in DIFFERENCE] == [0, 0, 0]


def test_a_grid_relative_to_another_model(tiny, run, monkeypatch):
    monkeypatch.setattr(Chain, "verify", coin)  # so that numbers are not all 0
    argv = ("eval", run, "--problems", "8", "--samples", "4", "--max-new-tokens", "12", "--json")
    grid = json.loads(call(*argv, "--loops", "1,2", "--relative-to", tiny).out)["grid"]
    assert all({*PLACE, "pass@1", "maj@4_low", *DIFFERENCE} <= entry.keys() for entry in grid)
    for entry in grid:
        single = json.loads(call(*argv, "--loops", entry["loops"], "--relative-to", tiny).out)
        assert [entry[key] for key in DIFFERENCE] == [single[key] for key in DIFFERENCE]


def test_thoughts_of_english_responses(tmp_path):
    """A text model's counts are in the report, and its ratios are null where the base has none."""
    model = make_model(tmp_path / "wide", context=256)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}+1", "answer": str(i + 1)}) + "\n" for i in range(40))
    )
    argv = ("eval", model, *EVAL, "--task", "jsonl", "task.path=rows.jsonl", "--relative-to", model)
    told = json.loads(call(*argv, "--json").out)
    assert told["thoughts"] >= 1 and told["reflection"] == told["transition"] == 0
    assert told["reflection_ratio"] is None and told["transition_ratio"] is None
    assert "reflection_ratio" in call(*argv).out
    grid = json.loads(call(*argv[:-2], "--loops", "1,2", *argv[-2:], "--json").out)["grid"]
    assert all(entry["transition_ratio"] is None for entry in grid)


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
    monkeypatch.setattr(doctor, "load_model", lambda name, **more: load_model(str(tiny), **more))
    said = call("doctor", "--json")
    facts = json.loads(said.out)
    assert said.code == 0 and facts["ok"] is True and facts["pico_tokens_per_second"] > 0
    said_why = str(facts["with_kernels"]).startswith("model.kernels: there is no C++ compiler")
    assert said_why or facts["with_kernels"] > 0
    assert facts["packages"]["torch"] and facts["cores"] >= 1 and "free_disk_gib" in facts
    assert {"rlimits", "audit"} <= set(facts["verifier_sandbox"])
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
