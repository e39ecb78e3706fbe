"""A run may be bounded by what it samples in place of its steps."""

from __future__ import annotations

from tests.e2e.helpers import SMALL, call, metrics, refused


def test_a_run_ends_at_the_first_step_that_reaches_the_budget(tiny, tmp_path):
    full = tmp_path / "full"
    assert call("train", "--model", tiny, "--steps", "5", "--out", full, *SMALL).code == 0
    totals = [m["total/tokens"] for m in metrics(full) if "total/tokens" in m]
    assert len(totals) == 5
    for budget, steps in ((1, 1), (totals[2], 3), (totals[2] + 1, 4), (10**9, 5)):
        out = tmp_path / f"budget{budget}"
        said = call("train", "--model", tiny, "--steps", "5", "--out", out, *SMALL, f"tokens={int(budget)}")
        assert said.code == 0, said
        logged = metrics(out)
        assert [m["total/tokens"] for m in logged if "total/tokens" in m] == totals[:steps]
        assert [m["step"] for m in logged if "eval/pass@1" in m][-1] == steps  # the end is evaluated
        assert f"step {steps}: held-out accuracy" in said.out


def test_a_resumed_run_goes_on_to_a_larger_budget(tiny, tmp_path):
    full, cut = tmp_path / "full", tmp_path / "cut"
    arguments = ("train", "--model", tiny, "--steps", "4", *SMALL, "checkpoint.every=1")
    assert call(*arguments, "--out", full).code == 0
    assert call(*arguments, "--out", cut, "tokens=1").code == 0
    assert call(*arguments, "--out", cut, "--resume", "tokens=1000000").code == 0
    ours, theirs = ([m for m in metrics(run) if "update/loss" in m] for run in (cut, full))
    for key in ("total/tokens", "rollout/entropy", "update/gradient_norm"):
        assert len(ours) == 4 and [m[key] for m in ours] == [m[key] for m in theirs]
    refused(call(*arguments, "--out", tmp_path / "none", "tokens=0"), "tokens")
