"""Any optimizer of torch by name: it is torch's own, what it does not take is refused, and it resumes bit for bit."""

from __future__ import annotations

import tomllib

import pytest
import torch

from mulligan.checkpoint import load_checkpoint, pack_optimizer, unpack_optimizer
from mulligan.config import OptimizerSection, load_run
from mulligan.errors import UserError
from mulligan.learner.optimizer import build_optimizer, optimizer_settings
from tests.e2e.helpers import SMALL, call, make_model

# Every class of torch.optim that a batch's gradient can drive; Muon has 2-D weights alone.
USABLE = ["ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "Muon", "NAdam", "RAdam", "RMSprop",
          "Rprop", "SGD"]  # fmt: skip


def weights(*, two_d: bool = False) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (4, 2)] if two_d else [(3, 4), (4,)]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def steps(optimizer: torch.optim.Optimizer, parameters, start: int, end: int) -> None:
    for step in range(start, end):
        generator = torch.Generator().manual_seed(step)
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


# --- it is torch's own ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", USABLE)
def test_it_does_what_torch_does(name):
    """Against the class of torch called by hand: its own defaults, our weight decay of 0, our betas of AdamW."""
    mine, theirs = weights(two_d=name == "Muon"), weights(two_d=name == "Muon")
    ours = build_optimizer(OptimizerSection(name=name, learning_rate=0.01), mine)
    by_hand = {"AdamW": {"betas": (0.9, 0.95), "weight_decay": 0.0}, "Muon": {"weight_decay": 0.0}}.get(name, {})
    other = getattr(torch.optim, name)(theirs, lr=0.01, **by_hand)
    assert type(ours) is type(other)
    steps(ours, mine, 0, 3)
    steps(other, theirs, 0, 3)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert not torch.equal(mine[0], weights(two_d=name == "Muon")[0])


def test_settings_and_options_are_passed_on():
    section = OptimizerSection(name="SGD", learning_rate=0.5, weight_decay=0.1, options={"momentum": 0.9})
    ours, mine = None, weights()
    ours = build_optimizer(section, mine)
    # By hand, one weight w with gradient g: b1 = g1 + 0.1 w0, w1 = w0 - 0.5 b1; b2 = 0.9 b1 + g2 + 0.1 w1, ...
    w = [p.detach().clone() for p in mine]
    b = [torch.zeros_like(p) for p in w]
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        g = [torch.randn(p.shape, generator=generator) for p in w]
        b = [0.9 * x + y + 0.1 * z for x, y, z in zip(b, g, w, strict=True)]
        w = [z - 0.5 * x for x, z in zip(b, w, strict=True)]
    steps(ours, mine, 0, 2)
    for a, wanted in zip(mine, w, strict=True):
        torch.testing.assert_close(a.detach(), wanted, rtol=1e-6, atol=1e-6)
    betas = OptimizerSection(name="Adam", betas=(0.5, 0.6), eps=1e-3)
    assert optimizer_settings(betas) == {"weight_decay": 0.0, "betas": (0.5, 0.6), "eps": 1e-3}
    lists = OptimizerSection(name="Adafactor", options={"eps": [1e-20, 1e-2]})
    assert build_optimizer(lists, weights()).defaults["eps"] == (1e-20, 1e-2)


def test_only_what_is_trained_is_given_to_it():
    parameters = weights()
    parameters[0].requires_grad_(False)
    (group,) = build_optimizer(OptimizerSection(), parameters).param_groups
    assert group["params"] == parameters[1:]


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "LBFGS"}, r"optimizer.name='LBFGS' wants the loss again and again \(a closure\); choose one of ASGD"),
        ({"name": "SparseAdam"}, "optimizer.name='SparseAdam' reads sparse gradients alone"),
        ({"name": "Optimizer"}, "optimizer.name='Optimizer' is none of torch.optim"),
        ({"name": "adamw"}, r"optimizer.name='adamw' is none of torch.optim \(did you mean 'AdamW'\?\)"),
        ({"name": "SGD", "betas": (0.9, 0.95)}, "optimizer.betas: SGD has no such argument"),
        ({"name": "SGD", "eps": 1e-8}, "optimizer.eps: SGD has no such argument"),
        ({"name": "Rprop", "weight_decay": 0.1}, "optimizer.weight_decay: Rprop has no such argument"),
        ({"name": "Adafactor", "eps": 1e-8}, "optimizer.eps: Adafactor has another kind of it: optimizer.options.eps"),
        ({"name": "Muon"}, r"optimizer.name='Muon': .*2D parameters.*\(all weights of an adapter are 2-D: lora.rank=8"),
        ({"name": "SGD", "options": {"momentun": 1}}, r"options.momentun: SGD has .*\(did you mean 'momentum'\?\)"),
        ({"name": "SGD", "options": {"momentum": -1}}, "optimizer.name='SGD': Invalid momentum value: -1"),
        ({"name": "SGD", "options": {"nesterov": True}}, "optimizer.name='SGD': Nesterov"),
        ({"options": {"betas": [0.9, 0.9]}}, "options.betas: it is a setting of its own, optimizer.betas"),
        ({"options": {"lr": 1.0}}, "options.lr: it is optimizer.learning_rate"),
        ({"options": {"maximize": True}}, "options.maximize: a run sets it itself"),
    ],
)
def test_one_line_for_what_cannot_be(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        build_optimizer(OptimizerSection(**settings), weights())
    assert "\n" not in str(caught.value)


# --- going on -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", USABLE)
def test_packed_and_unpacked_it_goes_on_bit_for_bit(name):
    two_d = name == "Muon"
    options = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.5, "centered": True}}.get(name, {})
    section = OptimizerSection(name=name, learning_rate=0.01, options=options)
    whole = weights(two_d=two_d)
    steps(build_optimizer(section, whole), whole, 0, 6)

    half = weights(two_d=two_d)
    first = build_optimizer(section, half)
    steps(first, half, 0, 3)
    names = {p: f"w{i}" for i, p in enumerate(half)}
    tensors, state = pack_optimizer(first, names)
    second = build_optimizer(section, half)
    unpack_optimizer(second, names, tensors, state)
    steps(second, half, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(half, whole, strict=True))
    # The test would notice: without its state the optimizer goes elsewhere.
    fresh = weights(two_d=two_d)
    steps(build_optimizer(section, fresh), fresh, 0, 3)
    steps(build_optimizer(section, fresh), fresh, 3, 6)
    assert not all(torch.equal(a, b) for a, b in zip(fresh, whole, strict=True))


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer.name=SGD", "optimizer.options.momentum=0.9", "optimizer.learning_rate=0.1"),
        ("optimizer.name=Adafactor", "optimizer.learning_rate=0.01"),
        ("optimizer.name=NAdam", "optimizer.learning_rate=0.01"),
        ("optimizer.name=Muon", "lora.rank=2", "optimizer.learning_rate=0.01"),
    ],
    ids=lambda settings: settings[0].rpartition("=")[2],
)
def test_a_run_resumes_bit_for_bit(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base", "qwen3")

    def train(out: str, *more: str) -> dict[str, torch.Tensor]:
        fixed = ("--model", "base", "--out", out, "task.level=1", "method.entropy_bonus=0.1", *SMALL)
        said = call("train", *fixed, *settings, *more)
        assert said.code == 0, said
        found = load_checkpoint(tmp_path / out / "checkpoints")
        assert found is not None
        return found.tensors["model"]

    whole = train("whole", "--steps", "4")
    half = train("half", "--steps", "2")
    again = train("half", "--steps", "4", "--resume")
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert not all(torch.equal(half[name], tensor) for name, tensor in whole.items())
    # What the run says of itself can be run again as it stands.
    told = tomllib.loads((tmp_path / "whole" / "run.toml").read_text())["optimizer"]
    section = load_run(tmp_path / "whole" / "run.toml").optimizer
    assert optimizer_settings(section).keys() == told.keys() & {"betas", "eps", "weight_decay"}
