"""``make test-kill``: one run, ended at twenty random moments, comes out like one that was never stopped."""

from __future__ import annotations

import random
import time

import pytest

from tests.e2e.helpers import SMALL, ended_alike, steps_saved

KILLS, STEPS = 20, 120
TRAIN = ("train", "--steps", str(STEPS), "--out", "run", *SMALL, "task.level=1", "method.name=dapo", "eval.every=5")
SEVERAL = ("optimizer.updates_per_batch=2", "optimizer.epochs=2")


@pytest.mark.kill
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("more", [(), SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
def test_twenty_random_moments(signal, more, forked, tiny, tmp_path):
    argv = (*TRAIN, *more, "--model", tiny)
    begun = time.monotonic()
    assert forked.run(tmp_path / "uninterrupted", *argv).code == 0
    whole = time.monotonic() - begun
    begun = time.monotonic()
    assert forked.run(tmp_path / "start", *argv, "--dry-run").code == 0
    start = time.monotonic() - begun
    rng = random.Random()
    seed = rng.randrange(2**32)
    rng.seed(seed)
    print(f"moments from seed {seed}; {whole:.1f} s for {STEPS} steps, {start:.1f} s to start")
    reached = []
    for _ in range(KILLS):
        # Mostly while it trains, some while it starts; short enough that twenty do not suffice for the whole run.
        moment = rng.uniform(0.5, 1.0) * start + rng.uniform(0, 1) * (whole - start) / 20
        ended = forked.run(tmp_path / "killed", *argv, "--resume", after=moment, signal=signal)
        # Before it listens, SIGTERM is what it is for every process.
        assert ended.code in ((-9,) if signal == "SIGKILL" else (143, -15)), ended.output
        assert ended.late is not None and ended.late < 10
        reached.append((steps_saved(tmp_path / "killed" / "run") or [0])[-1])
    assert reached == sorted(reached), "a kill lost a checkpoint"
    assert len(set(reached)) > 3, f"the kills all came too early: {reached}"
    assert forked.run(tmp_path / "killed", *argv, "--resume").code == 0
    print(f"checkpoints reached: {reached}")
    ended_alike(tmp_path / "uninterrupted" / "run", tmp_path / "killed" / "run")
