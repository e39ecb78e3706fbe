"""The clocks of the step's profile: every moment counts once, and nothing stays changed."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def profile():
    sys.path.insert(0, str(FOLDER))
    try:
        import profile_step
    finally:
        sys.path.remove(str(FOLDER))
    return profile_step


def test_an_outer_clock_stands_still_while_an_inner_one_runs(profile, monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0])  # outer begins, inner begins, inner ends, outer ends
    monkeypatch.setattr(profile.time, "perf_counter", lambda: next(now))
    clock = profile.Clock()
    with clock.phase("outer"), clock.phase("inner"):
        pass
    assert clock.seconds == {"outer": 1.0 + 4.0, "inner": 2.0}


def test_functions_are_put_back_after_an_error_too(profile):
    class Base:
        def work(self) -> str:
            return "done"

    class Heir(Base):
        pass

    owner, clock = SimpleNamespace(work=time.sleep), profile.Clock()
    spans = [(owner, "work", "a"), (Heir, "work", "b"), (owner, "absent", "c")]
    with pytest.raises(RuntimeError), profile.clocked(clock, spans):
        owner.work(0.001)
        assert Heir().work() == "done"
        raise RuntimeError
    assert owner.work is time.sleep
    assert "work" not in vars(Heir)
    assert clock.seconds["a"] >= 0.001 and set(clock.seconds) == {"a", "b"}


def test_command(profile, monkeypatch, capsys):
    """Every phase has its row, each named function was found, and the shares add up."""
    monkeypatch.setattr(logging, "disable", lambda level: None)  # it would last
    monkeypatch.setattr(sys, "argv", ["profile_step.py", "--works", "demo", "--steps", "1", "--json"])
    monkeypatch.setattr(profile, "WARM_UP", 0)
    profile.main()
    rows = {row["work"].rpartition(": ")[2]: row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    phases = [*profile.INSIDE, *profile.OUTSIDE]
    assert all(rows[phase]["seconds"] > 0 for phase in phases)
    assert sum(rows[phase]["ratio"] for phase in phases) == pytest.approx(1.0)
    outside = rows["outside sampling and training"]
    assert outside["ratio"] == pytest.approx(sum(rows[phase]["ratio"] for phase in profile.OUTSIDE))
    assert outside["goal"] == 0.05
