"""What the shipped bases can do. The full bounds are slow; a coarse look at both is in every run."""

from __future__ import annotations

import pytest
from rich.console import Console

from mulligan.evalcli import run_evaluation
from mulligan.models.loading import load_model


def measure(model: str, *, problems: int, probe: str | None = None) -> dict:
    return run_evaluation(
        model, tasks=["chain"], flags={"problems": problems}, probe=probe, console=Console(stderr=True)
    )


@pytest.mark.parametrize("name", ["pico", "pico-qwen3"])
def test_it_is_partly_competent(name):
    found = measure(name, problems=64)
    assert 0.2 < found["pass@1"] < 0.5
    assert 0.05 < found["none_pass"] < 0.45
    assert abs(found["process_correct"] - found["pass@1"]) < 0.05
    assert found["truncated"] < 0.02


def test_the_two_have_equal_parameters():
    sizes = [sum(p.numel() for p in load_model(name).model.parameters()) for name in ("pico", "pico-qwen3")]
    assert abs(sizes[0] - sizes[1]) < 0.01 * sizes[0]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["pico", "pico-qwen3"])
def test_it_is_a_useful_patient(name):
    found = measure(name, problems=512)
    assert 0.25 < found["pass@1"] < 0.55
    assert 0.10 < found["none_pass"] < 0.40
    assert abs(found["process_correct"] - found["pass@1"]) < 0.05
    assert found["luck"] <= 0.02
    judged = measure(name, problems=250, probe="localisation")
    assert judged["failed_chains"] >= 1000
    assert judged["margin"] > 0.25
    hinted = measure(name, problems=2000, probe="hint")
    assert hinted["none_pass_problems"] >= 300
    assert hinted["gain_low"] > 0
