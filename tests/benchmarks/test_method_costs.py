"""What the table of method costs counts, and its ratios; a run of the script itself."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def costs():
    sys.path.insert(0, str(FOLDER))
    try:
        import method_costs
    finally:
        sys.path.remove(str(FOLDER))
    return method_costs


def test_equal_work_of_methods_that_sample_alike(costs):
    """GRPO, RLTT and a DSRL warm-up draw the same tokens; what is trained differs as it should."""
    with ExitStack() as stack:
        names = ["grpo", "rltt", "dsrl"]
        runners = costs.open_runners(names, "pico", stack, pytest.fail, 2, level=1)
        assert [r.name for r in runners] == ["grpo", "rltt", "dsrl, first"]
        grpo, rltt, first = (r.step(1) for r in runners)
        again = runners[0].step(1)
        weights = [torch.cat([p.flatten() for p in r.session.learner.model.parameters()]) for r in runners]
    assert grpo.tokens["sampled"] == rltt.tokens["sampled"] == first.tokens["sampled"] > 0
    assert grpo.tokens == rltt.tokens == again.tokens  # a step can be repeated
    assert grpo.tokens["scored"] == 0 and first.tokens["scored"] == 0
    assert 0 < first.tokens["forward"] < grpo.tokens["forward"]  # no prompts, wrong rows alone
    assert first.tokens["rows"] < grpo.tokens["rows"] == 16
    assert all(torch.equal(w, weights[0]) for w in weights)  # nothing has moved: the next round compares equals


def test_ratios_are_of_sums_and_goals_are_met_by_name(costs):
    def cost(tokens: float, seconds: float):
        return costs.Cost(dict.fromkeys(costs.TOKENS, tokens), dict.fromkeys(costs.SECONDS, seconds), 0.5)

    grpo, rltt = costs.Runner("grpo", None, None), costs.Runner("rltt", None, None)
    grpo.costs, rltt.costs = [cost(1, 1.0), cost(3, 1.0)], [cost(2, 1.0), cost(4, 3.0)]
    rltt.ratios = [dict.fromkeys(costs.SECONDS, x) for x in (1.0, 1.1, 9.0)]
    rltt.memory, grpo.memory = 3.0, 2.0
    row = costs.row_of(rltt, grpo)
    assert (row["ratio"], row["goal"]) == (1.1, 1.15)  # the median
    assert row["ratios"]["sampled"] == 6 / 4
    assert row["ratios"]["memory"] == 1.5
    assert row["ratios"]["sampled a row"] == 1.0


def test_peak_memory_sees_what_is_freed_again(costs):
    def work() -> None:
        torch.ones(8 << 20).sum()  # 32 MiB

    found = costs.peak_memory(work)
    assert found is None or 31 << 20 < found < 60 << 20


def test_command(costs, monkeypatch, capsys):
    """One JSON object a row; what needs loops is left out where there are none."""
    arguments = ["--base", "pico-qwen3", "--methods", "srpo,rltt", "--rounds", "1", "--prompts", "1", "--json"]
    monkeypatch.setattr(logging, "disable", lambda level: None)  # it would last
    monkeypatch.setattr(sys, "argv", ["method_costs.py", *arguments])
    costs.main()
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["work"] for row in rows] == ["grpo beside grpo: step", "srpo beside grpo: sampled a row"]
    assert rows[1]["goal"] == 1.0
    assert "loops" in said.err
