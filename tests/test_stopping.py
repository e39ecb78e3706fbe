"""Signals: raised at once, or at the end of a shielded stretch, and once only."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import torch

import mulligan.train as training
from mulligan.stopping import Stopped, Stopper


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def stopper():
    stopper = Stopper()
    with stopper.listening():
        yield stopper


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_at_once(number, code, stopper):
    with pytest.raises(Stopped, match=signal.Signals(number).name) as caught:
        send(number)
    assert caught.value.exit_code == code
    assert not isinstance(caught.value, Exception)


def test_a_shield_holds_it_back_to_its_end(stopper):
    done = []
    with pytest.raises(Stopped):
        stopper.shield()
        send()
        done.append("work")
        stopper.unshield()
        done.append("more")
    assert done == ["work"]


def test_shields_nest(stopper):
    done = []
    stopper.shield()
    stopper.shield()
    send()
    stopper.unshield()
    done.append("still shielded")
    with pytest.raises(Stopped):
        stopper.unshield()
    assert done == ["still shielded"]


def test_without_a_signal_nothing_is_raised(stopper):
    for _ in range(3):
        stopper.shield()
        stopper.unshield()
    stopper.check()
    with pytest.raises(Stopped):
        send()


def test_a_second_signal_does_not_disturb_what_the_first_began(stopper):
    with pytest.raises(Stopped, match="SIGTERM"):
        send()
    send()  # while the last step is saved
    send(signal.SIGINT)
    stopper.shield()
    send()
    stopper.unshield()


def test_the_last_of_several_pending_signals_is_raised_once(stopper):
    stopper.shield()
    send(signal.SIGINT)
    send(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"):
        stopper.unshield()
    stopper.shield()
    stopper.unshield()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_a_destructor_swallowed_is_raised_by_the_next_check(stopper):
    class Last:
        def __del__(self) -> None:
            send()
            sum(range(10))

    last = [Last()]
    last.clear()  # Python reports what is raised in there, and goes on
    with pytest.raises(Stopped, match="SIGTERM"):
        stopper.check()


def test_former_handlers_come_back():
    former = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    with pytest.raises(KeyError), Stopper().listening():
        assert signal.getsignal(signal.SIGTERM) is not former[signal.SIGTERM]
        raise KeyError
    assert {n: signal.getsignal(n) for n in former} == former


# --- one_step with a signal at each of its shields --------------------------------------------------------


class FakeLearner:
    """Four optimizer steps that add to a weight; ``guard`` is called before each, as the real one does."""

    def __init__(self, updates: int) -> None:
        self.weight, self.updates, self.guard = torch.zeros(()), updates, lambda: None
        self.score_samples = self.fill_streams = None

    def update(self, rows, method, step):
        for _ in range(self.updates):
            self.guard()
            self.weight += 1
        return {"update/loss": 0.0}

    def snapshot(self):
        before = self.weight.clone()
        return lambda: self.weight.copy_(before)


class Late(Stopper):
    """A signal comes in the very moment in which the n-th shield goes up, too early for it to hold."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def shield(self) -> None:
        self.at -= 1
        if self.at == 0:
            self._handle(signal.SIGTERM, None)
        super().shield()


@pytest.mark.parametrize("several", [False, True])
def test_a_signal_right_before_the_shield_leaves_no_half_step(several, monkeypatch):
    """Once the step is aborted, weights, counter and log are those of the step before."""
    monkeypatch.setattr(training, "rollout", lambda *_, **__: SimpleNamespace(samples=[]))
    monkeypatch.setattr(training, "assign", lambda *_: [])
    learner = FakeLearner(4 if several else 1)
    logged, committed = [], []
    session = SimpleNamespace(
        run=SimpleNamespace(
            sampling=SimpleNamespace(prompts=1, draws=1, max_new_tokens=1),
            optimizer=SimpleNamespace(epochs=2 if several else 1, updates_per_batch=2 if several else 1),
            seed=0,
            diagnose=SimpleNamespace(alignment=0),
        ),
        schedule=SimpleNamespace(at=lambda _: SimpleNamespace(passes=(), keep=None, remember=None)),
        learner=learner,
        step=0,
        texts=None,
        sampler=None,
        task=SimpleNamespace(grade=None, problem=None),
        memory=SimpleNamespace(commit=lambda: committed.append(1)),
    )
    log = SimpleNamespace(metrics=logged.append, samples=logged.append)
    reporter = SimpleNamespace(phase=lambda *_: None, stepped=lambda *_: None)
    with pytest.raises(Stopped):
        training.one_step(session, log, reporter, Late(at=1))
    assert (float(learner.weight), session.step, logged, committed) == (0.0, 0, [], [])
