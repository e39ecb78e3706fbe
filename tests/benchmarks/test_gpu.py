"""The table of one CUDA card: what it counts, that it runs (at a tiny size), and what is said without a card."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers.utils import logging as its_logging

from mulligan.learner.packing import Item
from mulligan.learner.trees import plant

FOLDER = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        import device
        import gpu
        import scorer_memory  # imported by gpu when it comes to it

        assert scorer_memory.LOOPS
        yield SimpleNamespace(device=device, gpu=gpu)
    finally:
        sys.path.remove(str(FOLDER))
        torch.set_num_threads(threads)


@pytest.fixture
def loud():
    """The script turns logs and bars off for its process."""
    before = its_logging.is_progress_bar_enabled()
    yield
    logging.disable(logging.NOTSET)
    if before:
        its_logging.enable_progress_bar()


@pytest.mark.slow
def test_it_runs_compiled(bench, loud):
    size = replace(bench.gpu.TINY, compiled=True)
    rows = list(bench.gpu.measure(size, bench.device.best_device(), lambda _: None))
    names = [row["work"] for row in rows]
    assert "model.compile, before the first step" in names
    assert {"decode step, 16 rows, compiled", "learner, trees, compiled"} <= set(names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the names of the rows are those of a CPU")
def test_it_runs(bench, capsys, monkeypatch, loud):
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--json"])
    with pytest.raises(SystemExit) as end:
        bench.gpu.main()
    assert end.value.code == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    by_name = {row["work"].strip(): row for row in rows}
    assert all({"work", "ratio", "goal", "value", "unit"} <= set(row) for row in rows)
    step = by_name["GRPO step, 2 x 8, 24 + 6 tokens"]["value"]
    phases = [by_name[name]["value"] for name in ("rollout", "assign", "update", "the rest")]
    assert sum(phases) == pytest.approx(step)
    for name in ("learner, flat", "learner, trees", "decode step, 16 rows", "sampled in rollout", "trained in update"):
        assert by_name[name]["value"] > 0
    assert 0 < by_name["weights, keys and values"]["ratio"] < 2
    assert any(name.startswith("scorer's peak: 64 tokens x 128 words") for name in by_name)


def test_the_table_holds_what_was_done_when_the_time_is_up(bench, capsys, monkeypatch, loud):
    def cut(*_):
        yield bench.gpu.row("first", 1234.5, "s", 0.25, "step", sheet_ratio=0.125)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.gpu, "measure", cut)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny"])
    with pytest.raises(SystemExit) as end:
        bench.gpu.main()
    said = capsys.readouterr()
    assert end.value.code == 1 and "the time is up" in said.err
    assert said.out.splitlines()[-1].split() == ["first", "1,234", "s", "0.250", "step", "0.125"]


def test_without_a_card_there_is_one_line(bench, monkeypatch):
    monkeypatch.setattr(bench.gpu, "best_device", lambda: CPU)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit, match=r"^no CUDA device: nothing was measured") as end:
        bench.gpu.main()
    assert "\n" not in str(end.value.code)


def test_the_wrapper_passes_on_what_it_is_given():
    given = os.environ | {"PYTHON": "/bin/echo"}
    done = subprocess.run([FOLDER / "gpu.sh", "--json"], env=given, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(FOLDER / "gpu.py"), "--json"]


def test_operations_by_hand(bench):
    """Of a layer: q and o 32 x 32, k and v 32 x 16, three of the MLP 32 x 64: 9,216 weights; the head has 4,096.

    Two rows of 20 + 2 tokens. Flat: 44 tokens; each looks at half of its row: 2 x 22 x 22 / 2 = 484 pairs. As a tree:
    24 tokens; 20 x 20 / 2 + 2 x 2 x 2 / 2 = 204 pairs, and 4 tokens that look at all 20 above: 284. Scored are 4.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**bench.gpu.TINY.model, tie_word_embeddings=True))
    prompt, wanted = tuple(range(20)), torch.ones(2, dtype=torch.bool)
    items = [Item(prompt, (90 + i, 91), wanted, 1.0) for i in range(2)]
    trees = plant([item.context + item.response for item in items])
    assert len(trees.tokens) == 24
    head, layers, width = 6 * 4096 * 4, 2, 32
    for given, count, pairs in ((None, 44, 484), ([trees], 24, 284)):
        right = layers * (6 * 9216 * count + 12 * width * pairs) + head
        assert bench.gpu.operations_of(model, items, given) == pytest.approx(right)


def test_the_devices_own_limits(bench, monkeypatch):
    device = bench.device
    assert device.product_rate(torch.float32, CPU, size=64, seconds=0.01) > 1e6
    assert device.copy_bandwidth(CPU, size=2**20, seconds=0.01) > 1e6
    held: list[torch.Tensor] = []
    peak = device.peak_memory(lambda: held.append(torch.ones(2**24)), CPU)  # 64 MiB
    assert peak is None or 0.9 * 2**26 < peak < 1.5 * 2**26
    assert device.data_sheet(CPU) == device.Sheet("CPU", None, None)
    for name, right in (("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("Nobody's card", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert device.data_sheet(torch.device("cuda")) == device.Sheet(
            name, right, None if right is None else device.SHEETS[name.removeprefix("NVIDIA ")][1]
        )
