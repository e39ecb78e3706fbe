"""The fits of the growth benchmark, its works, and a run of the script; the scorers of the memory benchmark."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def beside_each_other():
    """Benchmarks import each other as scripts do."""
    sys.path.insert(0, str(FOLDER))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sys.path.remove(str(FOLDER))


def test_exponents_are_those_of_powers():
    from growth import LAST, Curve, exponent

    sizes = [2, 4, 8, 16, 32]
    assert exponent(sizes, [3.0 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert exponent(sizes, [7.0] * 5) == pytest.approx(0.0)
    # 2, 4, 8, then 32, 128: in steps of one doubling the logs to base 2 are 1 2 3 5 7 against 1 2 3 4 5. By hand over
    # all: deviations -2 -1 0 1 2 and -2.6 -1.6 -0.6 1.4 3.4, so (5.2 + 1.6 + 1.4 + 6.8) / 10 = 1.5. Of the last three
    # (5 - 3, 7 - 5): 2.
    curve = Curve("group", "training", "seconds", sizes, [[9.0, 2.0, 1.0], [4.0], [8.0], [32.0], [128.0, 1e6, 1.0]])
    assert curve.medians == [2.0, 4.0, 8.0, 32.0, 128.0]
    assert LAST == 3
    assert curve.exponent() == pytest.approx(1.5) and curve.exponent(LAST) == pytest.approx(2.0)
    row = curve.row()
    assert (row["ratio"], row["goal"]) == (pytest.approx(2.0), 1.0)
    assert row["seconds"] == curve.medians and row["most"][-1] == 1e6 and row["least"][0] == 1.0
    assert Curve("length", "training", "seconds", []).goal == 2.0


def test_each_axis_changes_one_thing():
    from growth import AXES, BASE, session_of, step

    for axis, points in AXES.items():
        sizes = [n for n, _ in points]
        assert sizes == sorted(set(sizes))
        for n, work in points:
            assert n == {"length": work.new, "group": work.samples, "vocabulary": work.vocabulary}[axis]
        assert len({(w.prompts, w.prompt, w.width, w.layers) for _, w in points}) == 1
    # What is asked for is what is done: every response at its full length, every row trained.
    work = AXES["group"][0][1]
    with session_of(work) as (session, log):
        model = session.learner.model
        assert model.get_output_embeddings().weight.shape == (work.vocabulary, work.width)
        seen = step(session, log)
        assert set(seen) == {"sampling", "training"} and min(seen.values()) > 0
        step(session, log, memory=True)
        totals = session.memory["totals"]
    assert totals == {"total/tokens": 2 * 2 * BASE.prompts * BASE.new, "total/samples": 2 * 2 * BASE.prompts}


def test_the_script_prints_curves_and_saves_the_figure(tmp_path, capsys, monkeypatch):
    import growth

    monkeypatch.setattr(sys, "argv", ["growth.py", "--points", "2", "--repeats", "1", "--out", str(tmp_path), "--json"])
    monkeypatch.setattr(growth, "AXES", {"vocabulary": growth.AXES["vocabulary"]})
    monkeypatch.setattr(growth.logging, "disable", lambda _: None)  # of the whole process
    growth.main()
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["work"].split(" against")[0] for row in rows] == [
        "sampling, seconds",
        "training, seconds",
        "sampling, megabytes",
        "training, megabytes",
    ]
    assert all(row["sizes"] == [128, 512] and row["goal"] == 1.0 for row in rows)
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_the_scorers_do_the_same_work_and_memory_is_read():
    from scorer_memory import LOOPS, Bench

    bench = Bench(tokens=24, vocabulary=500, dtype="float32")
    ours, naive = bench.gradients("ours"), bench.gradients("naive")
    assert len(ours) == LOOPS * 25 * 256 + 500 * 256
    assert float(ours.norm()) > 0 and float((ours - naive).norm()) < 1e-5 * float(ours.norm())


def test_ours_holds_less_than_all_logits():
    from scorer_memory import Bench, peaks

    # Of 600 tokens x 4 loops x 20,000 words the logits are 192 MB, and so is what log_softmax keeps of them.
    everything = Bench(600, 20_000, "float32").peak("naive")
    assert everything > 190
    found = peaks(["ours"], 600, 20_000, "float32", 600)
    assert 0 < found["ours"] < 0.5 * everything
