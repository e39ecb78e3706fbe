import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mulligan import files
from mulligan.checkpoint import (
    hash_file,
    list_checkpoints,
    load_checkpoint,
    load_model_tensors,
    model_tensors,
    pack_optimizer,
    rng_state,
    save_checkpoint,
    set_rng_state,
    unpack_optimizer,
)
from mulligan.errors import UserError

TENSORS = {
    "model": {"w": torch.arange(6.0).reshape(2, 3), "half": torch.tensor([1.5], dtype=torch.bfloat16)},
    "optimizer": {"step": torch.tensor(3.0), "none": torch.empty(0, 2)},
}
STATE = {"lr": 0.1 + 0.2, "seed": 2**63 - 1, "text": "é\n", "list": [None, True, 1e-300]}


def save(root: Path, step: int, **kwargs) -> Path:
    return save_checkpoint(root, step, TENSORS, {**STATE, "step": step}, **kwargs)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# --- directories ----------------------------------------------------------------------------------------


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    path = save(tmp_path / "deep" / "root", 10)
    loaded = load_checkpoint(tmp_path / "deep" / "root")
    assert path.name == "step-00000010"
    assert loaded.step == 10 and loaded.path == path
    assert loaded.state == {**STATE, "step": 10}
    assert loaded.tensors.keys() == TENSORS.keys()
    for name, group in TENSORS.items():
        assert loaded.tensors[name].keys() == group.keys()
        assert all(same(loaded.tensors[name][k], group[k]) for k in group)


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path / "absent") is None
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    assert load_checkpoint(tmp_path) is None


def test_tensors_that_share_memory_or_are_not_contiguous(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    given = {"row": base[1], "all": base, "turned": base.T, "again": base}
    save_checkpoint(tmp_path, 0, {"model": given}, {})
    loaded = load_checkpoint(tmp_path).tensors["model"]
    assert all(same(loaded[k], given[k]) for k in given)


def test_keep_deletes_the_oldest_and_never_the_new_one(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert [s for s, _ in list_checkpoints(tmp_path)] == [2, 3]
    save(tmp_path, 1, keep=1)  # later steps are somebody's; they stay
    assert [s for s, _ in list_checkpoints(tmp_path)] == [1, 2, 3]
    with pytest.raises(UserError, match="keep >= 1"):
        save(tmp_path, 4, keep=0)


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5)
    save_checkpoint(tmp_path, 5, {"other": {"x": torch.ones(1)}}, {"new": True})
    loaded = load_checkpoint(tmp_path)
    assert loaded.state == {"new": True}
    assert list(loaded.tensors) == ["other"]
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]


def test_further_files_are_hashed_too(tmp_path):
    def more(path: Path) -> None:
        (path / "hf").mkdir()
        (path / "hf" / "config.json").write_text("{}")

    path = save(tmp_path, 1, files=more)
    entry = json.loads((path / "manifest.json").read_text())["files"]["hf/config.json"]
    assert entry == {"bytes": 2, "sha256": hash_file(path / "hf" / "config.json")}
    (path / "hf" / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"hf/config\.json is damaged"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": {"b": [1.0, float("nan")]}}, r"a\.b\[1\] is nan"),
        ({"a": float("inf")}, "a is inf"),
        ({"a": {1: 2}}, "a has the key 1"),
        ({"a": torch.ones(1)}, "a is a Tensor"),
    ],
)
def test_state_must_be_strict_json(tmp_path, state, message):
    with pytest.raises(UserError, match=message):
        save_checkpoint(tmp_path, 0, {}, state)
    assert not list(tmp_path.iterdir())


# --- damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_flipped_bit_anywhere_is_an_error(tmp_path, name):
    file = save(tmp_path, 1) / name
    good = file.read_bytes()
    for place in range(0, len(good), max(1, len(good) // 100)):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        file.write_bytes(bad)
        with pytest.raises(UserError, match=f"{name} is damaged"):
            load_checkpoint(tmp_path)
    file.write_bytes(good)
    assert load_checkpoint(tmp_path).step == 1


def test_a_cut_file_and_a_missing_file(tmp_path):
    path = save(tmp_path, 1)
    file = path / "state.json"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"state\.json is damaged: \d+ bytes in place of \d+; no earlier checkpoint"):
        load_checkpoint(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=r"state\.json is missing"):
        load_checkpoint(tmp_path)


def test_damage_is_never_passed_over_and_the_way_on_is_named(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    (tmp_path / "step-00000002" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as error:
        load_checkpoint(tmp_path)
    one, two, three = (tmp_path / f"step-0000000{i}" for i in (1, 2, 3))
    assert str(error.value) == (
        f"{three}/manifest.json is missing, so step-00000003 is no complete checkpoint; "
        f"to go on from {one} (intact), delete {three}, {two}"
    )


def test_a_directory_without_a_manifest_is_neither_loaded_nor_counted_nor_deleted(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(UserError, match=r"manifest\.json is missing.*no earlier checkpoint"):
        load_checkpoint(tmp_path)
    for step in (2, 3):
        save(tmp_path, step, keep=2)
    assert [s for s, _ in list_checkpoints(tmp_path)] == [1, 2, 3]


def test_another_format_and_a_renamed_directory(tmp_path, monkeypatch):
    path = save(tmp_path, 1)
    path.rename(tmp_path / "step-00000002")
    with pytest.raises(UserError, match="is of step 1; the directory was renamed"):
        load_checkpoint(tmp_path)
    monkeypatch.setattr("mulligan.checkpoint.FORMAT", 2)
    with pytest.raises(UserError, match="has format 1; this version of Mulligan reads format 2"):
        load_checkpoint(tmp_path)


# --- full disks and kills -------------------------------------------------------------------------------


@pytest.mark.parametrize("call", range(5))  # two tensor files, the state, the manifest, the directory
def test_a_full_disk_is_one_line_and_leaves_what_was(tmp_path, monkeypatch, call):
    save(tmp_path, 1)
    real, count = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count == call + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as error:
        save(tmp_path, 2)
    assert str(error.value) == (
        f"{tmp_path}/step-00000002: cannot save: No space left on device; earlier checkpoints are untouched"
    )
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    save(tmp_path, 2)
    assert load_checkpoint(tmp_path).step == 2


def test_a_full_disk_under_safetensors(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", disk], capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    try:
        save(disk, 1)
        with pytest.raises(UserError, match=r"step-00000002: cannot save: .*No space left on device.*untouched"):
            save_checkpoint(disk, 2, {"model": {"w": torch.zeros(100_000)}}, {})
        assert [p.name for p in disk.iterdir()] == ["step-00000001"]
        assert load_checkpoint(disk).step == 1
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_failed_swap_gives_the_former_save_its_name_back(tmp_path, monkeypatch):
    save(tmp_path, 1)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.startswith(".saving"):
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError, match="Input/output error"):
        save_checkpoint(tmp_path, 1, {}, {})
    assert load_checkpoint(tmp_path).state["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_the_leavings_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = os.getppid()
    for pid in (dead.pid, living):
        (tmp_path / f".saving-{pid}-step-00000007").mkdir()
        (tmp_path / f".deleting-{pid}-step-00000001").mkdir()
    save(tmp_path, 8)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {f".saving-{living}-step-00000007", f".deleting-{living}-step-00000001", "step-00000008"}


def test_a_pid_of_somebody_elses_is_alive(monkeypatch):
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert files.is_alive(1)


def kill_savers(tmp_path: Path, kills: int) -> None:
    program = Path(__file__).with_name("kill_save.py")
    run = subprocess.run([sys.executable, program, tmp_path, str(kills)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_kill_at_any_call_leaves_a_whole_newest_checkpoint(tmp_path):
    kill_savers(tmp_path, 8)


@pytest.mark.kill
def test_many_random_kills(tmp_path):
    kill_savers(tmp_path, 200)


# --- models ---------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.BatchNorm1d(3)  # buffers, one of them an integer
        self.head = nn.Linear(3, 5, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))


def test_a_model_with_tied_weights_goes_to_disk_and_back(tmp_path):
    model, other = Tied(), Tied()
    save_checkpoint(tmp_path, 0, {"model": model_tensors(model)}, {})
    tensors = load_checkpoint(tmp_path).tensors["model"]
    assert "embed.weight" in tensors and "head.weight" not in tensors
    load_model_tensors(other, tensors)
    assert other.head.weight is other.embed.weight
    assert all(same(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_model_tensors_are_copies():
    model = Tied()
    tensors = model_tensors(model)
    with torch.no_grad():
        model.embed.weight.zero_()
    assert tensors["embed.weight"].abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.bias"), "lacks 'norm.bias', which the model has"),
        (lambda t: t.update(extra=torch.ones(1)), "has 'extra', which the model lacks"),
        (lambda t: t.update({"embed.weight": torch.ones(5, 4)}), r"'embed.weight' as float32 \[5, 4\], the model as"),
        (lambda t: t.update({"norm.bias": torch.ones(3).half()}), r"'norm.bias' as float16 \[3\]"),
    ],
)
def test_tensors_that_do_not_fit_change_nothing(change, message):
    model, other = Tied(), Tied()
    tensors, before = model_tensors(model), model_tensors(other)
    change(tensors)
    with pytest.raises(UserError, match=message):
        load_model_tensors(other, tensors)
    assert all(same(v, before[k]) for k, v in model_tensors(other).items())


# --- optimizers -----------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.01, max_iter=2),  # keeps lists of tensors
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            x = torch.arange(5).roll(step)
            loss = nn.functional.cross_entropy(model(x), x)
            loss.backward()
            return loss

        optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_that_is_saved_goes_on_exactly_like_one_that_is_not(tmp_path, name):
    torch.manual_seed(0)
    model = Tied()
    optimizer = OPTIMIZERS[name](model.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    train(model, optimizer, range(3))
    scheduler.step()
    tensors, state = pack_optimizer(optimizer, model)
    save_checkpoint(tmp_path, 3, {"model": model_tensors(model), "optimizer": tensors}, {"optimizer": state})
    train(model, optimizer, range(3, 6))

    loaded = load_checkpoint(tmp_path)
    other = Tied()
    load_model_tensors(other, loaded.tensors["model"])
    resumed = OPTIMIZERS[name](other.parameters())
    unpack_optimizer(resumed, other, loaded.tensors["optimizer"], loaded.state["optimizer"])
    again, _ = pack_optimizer(resumed, other)
    assert again.keys() == tensors.keys() and all(same(again[k], tensors[k]) for k in tensors)
    assert resumed.param_groups[0]["lr"] == 0.01 * 0.7
    train(other, resumed, range(3, 6))
    assert all(same(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert all(same(v, pack_optimizer(optimizer, model)[0][k]) for k, v in pack_optimizer(resumed, other)[0].items())


def test_names_make_the_state_independent_of_the_order_of_parameters():
    model, other = Tied(), Tied()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, range(2))
    tensors, state = pack_optimizer(optimizer, model)
    turned = OPTIMIZERS["adamw"](list(other.parameters())[::-1])
    unpack_optimizer(turned, {p: n for n, p in other.named_parameters()}, tensors, state)
    assert torch.equal(turned.state[other.norm.bias]["exp_avg"], optimizer.state[model.norm.bias]["exp_avg"])
    assert turned.state[other.norm.bias]["step"] == 2


def test_hyperparameters_stay_the_new_ones_but_the_scheduled_lr_comes_back():
    model = Tied()
    old = torch.optim.AdamW(model.parameters(), lr=0.5, betas=(0.1, 0.2))
    old.param_groups[0]["lr"] = 0.25
    new = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5), betas=(0.8, 0.9), foreach=False)
    unpack_optimizer(new, model, *pack_optimizer(old, model))
    assert new.param_groups[0]["betas"] == (0.8, 0.9)
    assert isinstance(new.param_groups[0]["lr"], torch.Tensor) and new.param_groups[0]["lr"] == 0.25


def test_state_in_another_dtype_than_its_parameter_is_not_cast():
    model = nn.Linear(2, 2, bias=False).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    third = torch.full((2, 2), 1 / 3)
    optimizer.state[model.weight] = {"step": torch.tensor(1.0), "exp_avg": third}
    new = torch.optim.AdamW(model.parameters())
    unpack_optimizer(new, model, *pack_optimizer(optimizer, model))
    assert same(new.state[model.weight]["exp_avg"], third)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda m: torch.optim.SGD(m.parameters()), "state of AdamW, but the optimizer is SGD"),
        (lambda m: torch.optim.AdamW([m.embed.weight, m.norm.weight]), "has 'norm.bias', which the optimizer"),
        (lambda m: torch.optim.AdamW([{"params": [p]} for p in m.parameters()]), "1 parameter groups, the optimizer 3"),
    ],
)
def test_an_optimizer_that_does_not_fit(build, message):
    model = Tied()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, range(1))
    with pytest.raises(UserError, match=message):
        unpack_optimizer(build(model), model, *pack_optimizer(optimizer, model))


def test_optimizer_tensors_and_shapes_that_do_not_fit():
    model, wide = nn.Linear(2, 2), nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    tensors, state = pack_optimizer(optimizer, model)
    with pytest.raises(UserError, match=r"'weight' is \[3, 2\], but the checkpoint has it as \[2, 2\]"):
        unpack_optimizer(torch.optim.AdamW(wide.parameters()), wide, tensors, state)
    with pytest.raises(UserError, match="tensor 'x', which no optimizer state names"):
        unpack_optimizer(optimizer, model, {**tensors, "x": torch.ones(1)}, state)
    del tensors["bias/exp_avg"]
    with pytest.raises(UserError, match="lacks the optimizer's tensor 'bias/exp_avg'"):
        unpack_optimizer(optimizer, model, tensors, state)
    with pytest.raises(UserError, match=r"a parameter \[3, 2\] that is not in the model"):
        pack_optimizer(torch.optim.AdamW(wide.parameters()), model)
    optimizer.state[model.bias]["odd"] = {1, 2}
    with pytest.raises(UserError, match="state 'bias/odd' is a set"):
        pack_optimizer(optimizer, model)


# --- generators -----------------------------------------------------------------------------------------


def draw() -> list[float]:
    numpy = np.random.normal()  # noqa: NPY002 - the legacy generator is what is tested
    return [torch.rand(()).item(), torch.randn(3)[1].item(), random.random(), random.gauss(), float(numpy)]


def test_the_generators_go_on_where_they_were(tmp_path):
    draw()  # leaves the second half of a Gaussian pair in Python and in numpy
    tensors, state = rng_state()
    save_checkpoint(tmp_path, 0, {"rng": tensors}, state)
    expected = [draw(), draw()]
    loaded = load_checkpoint(tmp_path)
    set_rng_state(loaded.tensors["rng"], loaded.state)
    assert [draw(), draw()] == expected


def test_generators_of_devices_that_are_not_here():
    tensors, state = rng_state()
    count = torch.cuda.device_count() + 1
    tensors |= {f"cuda/{i}": torch.zeros(16, dtype=torch.uint8) for i in range(count)}
    with pytest.raises(UserError, match=f"generators of {count} CUDA devices"):
        set_rng_state(tensors, state)
