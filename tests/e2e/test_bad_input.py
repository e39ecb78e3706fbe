"""What bad input gets: one clear line, exit code 2, and nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mulligan import checkpoint
from mulligan.checkpoint import load_checkpoint, read_checkpoint
from mulligan.learner import update
from mulligan.tasks.chain import Chain
from mulligan.types import Grade, Verdict
from tests.e2e.helpers import SMALL, call, ended_alike, make_model, refused, steps_saved
from tests.e2e.kill_at import coin

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every command runs in a folder of its own, with rewards that do not need a model that can calculate."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Chain, "verify", coin)


def train(model: Path, *more: str, steps: int = 4, out: str | Path = "run"):
    return call("train", "--model", model, "--steps", str(steps), "--out", out, *SMALL, *more)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of 4 steps with checkpoints at 2 and 4; not to be touched."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Chain, "verify", coin)
        assert train(tiny).code == 0
    assert steps_saved(folder / "run") == [2, 4]
    return folder / "run"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it, to damage."""
    return shutil.copytree(finished, tmp_path / "run")


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- models ---------------------------------------------------------------------------------------------


def test_no_model_directory(tmp_path):
    refused(train(tmp_path / "nowhere"), tmp_path / "nowhere", "no such directory")
    refused(call("eval", tmp_path / "nowhere"), tmp_path / "nowhere", "no such directory")
    assert not (tmp_path / "run").exists()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def bad_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def mistyped_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": "wide"}))


def no_eos(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token"}))


def bad_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def nan_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (bad_config, "config.json: not JSON"),
        (mistyped_config, "cannot be loaded as a causal LM"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
        (cut_weights, "model.safetensors: corrupt or truncated"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (bad_tokenizer, "its tokenizer cannot be loaded"),
        (no_eos, "the tokenizer has no EOS"),
    ],
)
def test_a_damaged_model_directory(damage, message, tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    damage(folder)
    before = contents(folder)
    for said in (train(folder), call("eval", folder), train(folder, "--dry-run")):
        refused(said, folder, message)
    assert not (tmp_path / "run").exists()
    assert contents(folder) == before


def test_a_weight_that_is_not_a_number(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "model")
    nan_weight(folder)
    refused(train(folder), "logits for chain/dev/", "not finite")
    assert steps_saved(tmp_path / "run") == []


# --- data -----------------------------------------------------------------------------------------------

GOOD = '{"question": "1+1", "answer": "2"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "rows.jsonl: empty"),
        (GOOD * 2 + "{\n" + GOOD, "rows.jsonl:3: bad JSON"),
        (GOOD + "[1]\n", "rows.jsonl:2: must be an object"),
        (GOOD + '{"answer": "2"}\n', "rows.jsonl:2: column 'question' is missing"),
        (GOOD * 3 + '{"question": 5, "answer": "2"}\n', "rows.jsonl:4: column 'question' must be text"),
        (GOOD * 3 + '{"question": " ", "answer": "2"}\n', "rows.jsonl:4: column 'question' is empty"),
        ('{"question": "1", "answer": null}\n', "none of its 1 rows has an answer"),
        ('{"frage": "1", "answer": "1"}\n', "rows.jsonl:1: column"),
        ("\xff", "rows.jsonl: not UTF-8"),
    ],
)
def test_a_malformed_data_file(text, message, tiny, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(text.encode("latin-1"))
    refused(train(tiny, "--task", "jsonl", "task.path=rows.jsonl"), message)
    assert file.read_bytes() == text.encode("latin-1")
    assert not (tmp_path / "run").exists()


def test_no_data(tiny, tmp_path):
    refused(train(tiny, "--task", "jsonl", "task.path=nowhere.jsonl"), "nowhere.jsonl", "no such file")
    (tmp_path / "data").mkdir()
    refused(train(tiny, "--task", "jsonl", "task.path=data"), "none of train.jsonl")
    (tmp_path / "data" / "train.jsonl").write_text(GOOD)
    refused(train(tiny, "--task", "jsonl", "task.path=data", "eval.split=test"), "no problems in its test split")
    refused(call("eval", tiny, "task.path=data", "--task", "jsonl"), "no problems in its test split")
    refused(call("eval", tiny, "task.path=data", "--task", "jsonl", "--probe", "alone"), "no problems")
    refused(train(tiny, "--task", "jsonl"), "task.path")


def test_a_prompt_longer_than_the_context(tiny, tmp_path):
    """One among many is found before anything is trained."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"question": f"{i}+{i}", "answer": str(2 * i)} for i in range(60)]
    rows[47]["question"] = "long " * 40
    (data / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (data / "test.jsonl").write_text('{"question": "one", "answer": "1"}\n')
    small = ("--task", "jsonl", "task.path=data", "eval.split=test")
    longer = make_model(tmp_path / "longer", context=200)
    refused(train(longer, *small), "jsonl/train/", "'long long", "tokens", "context holds 200")
    refused(train(tiny, "task.min_steps=30", "task.max_steps=30"), "chain/", "tokens", "context holds 96")
    assert not (tmp_path / "run").exists()
    # where it is said too late for that, it is said by the sampler
    refused(call("eval", tiny, "task.min_steps=30", "task.max_steps=30", "--problems", "2"), "leave no room")


# --- directories ----------------------------------------------------------------------------------------


def test_a_directory_of_another_run(copied, tiny, tmp_path):
    before = contents(copied)
    refused(train(tiny), "run holds another run", "--resume", "--out")
    refused(train(tiny, "--resume", "sampling.prompts=8"), "sampling.prompts: 4 -> 8")
    assert contents(copied) == before
    shutil.rmtree(copied / "checkpoints")
    before = contents(copied)
    refused(train(tiny), "run holds another run")
    refused(train(tiny, "--resume", "sampling.prompts=8"), "run.toml", "sampling.prompts: 4 -> 8")
    assert contents(copied) == before


def test_a_file_in_the_way(tiny, tmp_path):
    (tmp_path / "run").write_text("mine")
    refused(train(tiny), "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_an_export_overwrites_nothing(copied, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(call("export", copied, "--to", tmp_path / "file"), "file is a file")
    refused(call("export", copied, "--to", copied), "is not empty")
    refused(call("export", tmp_path, "--to", tmp_path / "new"), "is no run")
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_without_a_readable_model_folder(copied, tmp_path):
    (copied / "model" / "config.json").write_text("{")
    refused(call("eval", copied), copied / "model", "cannot be loaded")
    shutil.rmtree(copied / "model")
    refused(call("export", copied, "--to", tmp_path / "new"), copied / "model", "cannot be loaded")


# --- checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "remove"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint(name, damage, copied, tiny, finished, tmp_path):
    """It is named, with the way on; it is never passed over; and what is intact stays so."""
    folder = copied / "checkpoints" / "step-00000004"
    file = folder / name
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    else:
        file.unlink()
    before = contents(copied)
    where = Path("run/checkpoints")
    refused(train(tiny, "--resume"), where / "step-00000004" / name, f"to go on from {where / 'step-00000002'}")
    refused(call("eval", "run"), where / "step-00000004" / name)
    refused(call("export", "run", "--to", "new"), where / "step-00000004" / name)
    assert contents(copied) == before and not (tmp_path / "new").exists()
    shutil.rmtree(folder)  # as it was told
    said = train(tiny, "--resume")
    assert said.code == 0 and "going on from step 2" in said.out
    ended_alike(finished, copied)


def test_no_intact_checkpoint(copied, tiny):
    for folder in (copied / "checkpoints").iterdir():
        (folder / "model.safetensors").unlink()
    before = contents(copied)
    refused(train(tiny, "--resume"), "step-00000004", "no earlier checkpoint", "is intact")
    assert contents(copied) == before


def test_a_log_that_was_cut(copied, tiny):
    file = copied / "samples.jsonl"
    file.write_bytes(file.read_bytes()[:-10])
    before = contents(copied)
    refused(train(tiny, "--resume", steps=6), "samples.jsonl", "bytes")
    assert contents(copied) == before


# --- a full disk ----------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A disk of its own, and a function that sets its size in KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(folder)], check=True, capture_output=True)

    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("a small disk cannot be mounted here: not root")
    yield folder, resize
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(disk, tiny, finished):
    """Wherever it fills up: in the log, in the model's folder, in a checkpoint. With room again the run goes on."""
    folder, resize = disk
    places, size = [], 8
    said = train(tiny, out=folder / "run")
    while said.code:
        places.append(refused(said, folder / "run", "No space left on device"))
        saved = load_checkpoint(folder / "run" / "checkpoints")
        assert saved is None or saved.step in (2, 4)
        size += 40
        resize(size)
        said = train(tiny, "--resume", out=folder / "run")
    told = " ".join(places)
    for part in ("/model: cannot write", "samples.jsonl: cannot write", "cannot save"):
        assert part in told, told
    state = load_checkpoint(folder / "run" / "checkpoints").state
    expected = load_checkpoint(finished / "checkpoints").state
    assert state.pop("run") | {"out": "run"} == expected.pop("run")
    run = shutil.copytree(folder / "run", folder.parent / "run")
    for key in ("memory", "updates", "optimizer", "step"):
        assert state[key] == expected[key]
    for name in FILES[:3]:
        newest = "checkpoints/step-00000004"
        assert (run / newest / name).read_bytes() == (finished / newest / name).read_bytes()


def test_a_disk_that_fills_up_while_a_checkpoint_is_written(tiny, finished, tmp_path, monkeypatch):
    write, calls = checkpoint.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 5:  # the optimizer of step 4
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    refused(train(tiny), "step-00000004: cannot save: No space left on device", "earlier checkpoints are untouched")
    assert steps_saved(tmp_path / "run") == [2]
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    said = train(tiny, "--resume")
    assert said.code == 0 and "going on from step 2" in said.out
    ended_alike(finished, tmp_path / "run")


# --- what is not a number -------------------------------------------------------------------------------


def poison_reward(patch: pytest.MonkeyPatch, armed: list[bool]) -> None:
    def verify(self, problem, response):
        if armed[0]:
            return Grade(verdict=Verdict.FAIL, reward=float("nan"))
        return coin(self, problem, response)

    patch.setattr(Chain, "verify", verify)


def poison_loss(patch: pytest.MonkeyPatch, armed: list[bool]) -> None:
    real = update.checked
    patch.setattr(update, "checked", lambda *given: real(*given) * (float("inf") if armed[0] else 1))


def poison_gradient(patch: pytest.MonkeyPatch, armed: list[bool]) -> None:
    real = torch.nn.utils.clip_grad_norm_

    def clip(parameters, *more):
        parameters = list(parameters)
        if armed[0]:
            next(p for p in parameters if p.grad is not None).grad.view(-1)[0] = float("nan")
        return real(parameters, *more)

    patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)


@pytest.mark.parametrize("several", [(), ("optimizer.updates_per_batch=2",)], ids=["one", "several"])
@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (poison_reward, "the reward of chain/train/"),
        (poison_loss, "grpo's loss is not finite"),
        (poison_gradient, "grpo's gradient is not finite"),
    ],
)
def test_not_a_number(poison, message, several, tiny, tmp_path, monkeypatch):
    """In step 4; the checkpoint of step 2 is whole, and the run goes on from there as if nothing had been."""
    import mulligan.train as training

    assert train(tiny, *several, out="reference").code == 0
    armed, real = [False], training.one_step

    def one_step(session, *rest):
        armed[0] = session.step == 3
        return real(session, *rest)

    with monkeypatch.context() as patch:
        poison(patch, armed)
        patch.setattr(training, "one_step", one_step)
        refused(train(tiny, *several), message, "nan" if poison is not poison_loss else "loss")
    assert steps_saved(tmp_path / "run") == [2]
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002").step == 2
    said = train(tiny, *several, "--resume")
    assert said.code == 0 and "going on from step 2" in said.out
    one, other = tmp_path / "reference", tmp_path / "run"
    newest = "checkpoints/step-00000004"
    for name in FILES[:3]:
        assert (one / newest / name).read_bytes() == (other / newest / name).read_bytes()
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
