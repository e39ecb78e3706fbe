"""``make test-kill``: SIGTERM at random bytecode instructions of the loop, where no clock would ever hit."""

from __future__ import annotations

import os
import random
import signal
import sys
from types import CodeType, FrameType
from typing import Any

import pytest

import mulligan.train as training
from mulligan import rundir
from mulligan.learner.update import Learner
from mulligan.log import RunLog
from mulligan.memory import Memory
from mulligan.stopping import Stopper
from mulligan.tasks.chain import Chain
from tests.e2e.helpers import SMALL, call, ended_alike
from tests.e2e.kill_at import coin

MOMENTS = int(os.environ.get("MOMENTS", "40"))
FUNCTIONS = (
    training.train,
    training.one_step,
    training._evaluate,
    training._count,
    rundir.save_state,
    Learner.update,
    Learner._step,
    RunLog.metrics,
    Memory.commit,
    Memory.rollback,
    Stopper.shield,
    Stopper.unshield,
    Stopper.check,
)
TRAIN = ("train", "--steps", "4", *SMALL, "task.level=1", "eval.every=3")
SEVERAL = ("optimizer.updates_per_batch=2", "optimizer.epochs=2")


def codes() -> set[CodeType]:
    """The code of the functions and of those inside them."""
    outer = {f.__code__ for f in FUNCTIONS}
    return outer | {c for o in outer for c in o.co_consts if isinstance(c, CodeType)}


class Tracer:
    """Counts the instructions that are executed in the functions, and sends SIGTERM at one of them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.count, self.codes = at, 0, codes()
        self.places: dict[str, list[int]] = {}  # which counts were at an instruction

    def start(self, frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code not in self.codes:
            return None
        frame.f_trace_opcodes = True
        return self.step

    def step(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "opcode":
            self.count += 1
            place = f"{frame.f_code.co_qualname}:{frame.f_lineno}+{frame.f_lasti}"
            self.places.setdefault(place, []).append(self.count)
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGTERM)
        return self.step


def traced(at: int | None, *argv: Any) -> tuple[Any, Tracer]:
    """A command under the tracer. Before and after the run listens, SIGTERM exits at once."""
    tracer = Tracer(at)
    former = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.settrace(tracer.start)
    try:
        return call(*argv), tracer
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGTERM, former)


@pytest.mark.kill
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("more", [(), SEVERAL], ids=["one", "several"])
def test_terminate_at_any_instruction(more, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Chain, "verify", coin)
    seed = random.SystemRandom().randrange(2**32)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reference").mkdir()
    monkeypatch.chdir(tmp_path / "reference")
    argv = (*TRAIN, *more, "--model", tiny, "--out", "run")
    said, tracer = traced(None, *argv)
    assert said.code == 0
    rng = random.Random(seed)
    print(f"moments from seed {seed}, of {tracer.count} at {len(tracer.places)} instructions")
    chosen = rng.sample(sorted(tracer.places), min(MOMENTS, len(tracer.places)))
    for number, place in enumerate(chosen):
        at = rng.choice(tracer.places[place])
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        said, _ = traced(at, *argv)
        assert said.code == 143, (place, said)
        said = call(*argv, "--resume")
        assert said.code == 0, (place, said)
        try:
            ended_alike(tmp_path / "reference" / "run", folder / "run")
        except AssertionError as error:
            raise AssertionError(f"after SIGTERM at {place}, instruction {at}") from error
