"""The sampler's benchmark: what it counts, what it refuses, and its talk with a worker of another Python."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"

# A worker that computes nothing: it writes down what it was asked and answers as ordered.
FAKE = """
import json, os, sys
for line in sys.stdin:
    order = json.loads(line)
    with open({log!r}, "a") as log:
        print(json.dumps(order | {{"omp": os.environ["OMP_NUM_THREADS"]}}), file=log)
    if order["do"] == "load":
        answer = {{"engine": len(order["dtype"]), "name": "a fake"}}
    elif order["new"] > 99:
        answer = {{"error": "ValueError: too\\nlong"}}
    elif order["new"] > 9:
        sys.exit("no memory")
    else:
        answer = {{"seconds": 0.5, "lengths": [order["new"]] * order["samples"] * len(order["prompts"])}}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    try:
        import decode_limits
        import peer_vllm
        import sampler
        import workload
    finally:
        sys.path.remove(str(FOLDER))
    return SimpleNamespace(sampler=sampler, limits=decode_limits, vllm=peer_vllm, work=workload)


@pytest.fixture
def fake(bench, tmp_path):
    log, script = tmp_path / "log", tmp_path / "worker.py"
    script.write_text(FAKE.format(log=str(log)))
    worker = bench.vllm.Worker([sys.executable, str(script)], threads=1)
    yield SimpleNamespace(worker=worker, asked=lambda: [json.loads(line) for line in log.read_text().splitlines()])
    worker.close()


def tiny(bench, **changes):
    """2 prompts of 4 tokens, 2 samples each, exactly 3 new ones."""
    return bench.work.Work(name="tiny", goal=1.0, width=32, layers=1, prompts=2, samples=2, prompt=4, new=3, **changes)


def test_least_bytes_and_operations_by_hand(bench, tmp_path):
    bench.work.make_model(tiny(bench), tmp_path)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    # 503 tokens; a layer: 4 x 32 x 32 of attention, 3 x 32 x 96 of the MLP, norms 2 x 32 + 2 x 32 (of the heads), + 32
    body, head = 4 * 32 * 32 + 3 * 32 * 96 + 4 * 32 + 32, 503 * 32
    # Responses of 3 and 1 tokens, and of 2 and 2. Fed: 2 + 0 + 1 + 1 = 4 in a prefill and two steps.
    found = bench.limits.least(model, 4, [[3, 1], [2, 2]], places=4)
    assert found.steps == 3
    # Keys and values of a token: 2 x 32 numbers. Own: 1 + 2 of the first row, 1 of each of the last two. Prompts: two
    # steps of the first group and one of the second, 4 tokens each, however many rows there are.
    assert found.bytes == 4 * (3 * (body + head) + 64 * (1 + 2 + 1 + 1 + 3 * 4))
    assert found.working_set == round(found.bytes / 3)
    # Looked at: 1 + 2 + 3 + 4 in each prompt; 5 and 6 of the first row, 5 of each of the last two.
    assert found.operations == 2 * (body * (8 + 4) + head * 8) + 4 * 32 * (2 * 10 + 5 + 6 + 5 + 5)
    # With one place the four fed tokens are four steps.
    assert bench.limits.least(model, 4, [[3, 1], [2, 2]], places=1).steps == 5
    model.tie_weights()
    model.lm_head.weight = model.model.embed_tokens.weight
    assert bench.limits.least(model, 4, [[3, 1], [2, 2]], places=4).bytes == found.bytes


def test_bandwidth_is_of_this_world(bench):
    assert 1e7 < bench.limits.bandwidth(2**20, torch.device("cpu"), 0.01) < 1e13


def test_a_row_for_each_peer(bench, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.sampler, "product_rate", lambda *_: 1e9)
    monkeypatch.setattr(bench.sampler, "bandwidth", lambda *_: 1e9)
    said: list[str] = []
    rows = bench.sampler.measure(tiny(bench), 4, 1, fake.worker, said.append)
    assert not said
    assert [(row["peer"], row["precision"]) for row in rows] == [
        ("generate()", "float32"),
        ("continuous batching", "float32"),
        ("a fake", "float32"),
        ("a fake", "bfloat16"),
    ]
    for row in rows:
        assert {"work", "ratio", "goal"} <= row.keys() and row["ratio"] > 0 and json.dumps(row)
        assert row["length"] == row["peer_length"] == 3
        slow = max(row["memory_limit_seconds"], row["product_limit_seconds"])
        assert row["share_of_limit"] == pytest.approx(slow / row["seconds"])
    assert rows[2]["peer_tokens_per_second"] == 12 / 0.5
    assert rows[3]["memory_limit_seconds"] == rows[2]["memory_limit_seconds"] / 2
    bench.sampler.show(rows)
    loads = [order for order in fake.asked() if order["do"] == "load"]
    assert [(order["dtype"], order["places"], order["omp"]) for order in loads] == [
        ("float32", 4, "1"),
        ("bfloat16", 4, "1"),
    ]
    samples = [order for order in fake.asked() if order["do"] == "sample"]
    assert [order["engine"] for order in samples] == [7, 8, 7, 8]  # each once to warm up, and once measured
    assert all(order["prompts"] == [list(p) for p in bench.work.make_prompts(tiny(bench))] for order in samples)
    assert all((order["samples"], order["new"], order["temperature"]) == (2, 3, 1.0) for order in samples)


def test_the_same_weights_are_loaded_once(bench, fake, tmp_path):
    for name, mean in (("a", None), ("b", None), ("c", 2)):
        bench.work.make_model(tiny(bench, mean=mean), tmp_path / name)
    for name in "abc":
        fake.worker.load(tmp_path / name, "float32", 4)
    assert [Path(order["model"]).name for order in fake.asked()] == ["a", "c"]
    fake.worker.load(tmp_path / "a", "float32", 2)
    assert len(fake.asked()) == 3


def test_a_worker_that_fails_is_told_in_one_line(bench, fake):
    with pytest.raises(SystemExit, match=r"the vLLM worker cannot sample: ValueError: too long$"):
        fake.worker.sample(0, [[5]], 1, 100)
    with pytest.raises(SystemExit, match=r"the vLLM worker ended with exit code 1: no memory$"):
        fake.worker.sample(0, [[5]], 1, 10)
    with pytest.raises(SystemExit, match=r"--vllm: \./nobody cannot be started: No such file or directory"):
        bench.vllm.Worker(["./nobody"], threads=1)


def test_another_amount_of_work_ends_the_run(bench):
    work, turn = tiny(bench), bench.sampler.Turn
    same = [turn(1.0, [3, 3, 3, 3])]
    bench.sampler.check_work(work, "it", same, same)
    with pytest.raises(SystemExit, match="tiny: it came back with 3 of 4 responses"):
        bench.sampler.check_work(work, "it", same, [turn(1.0, [3, 3, 3])])
    with pytest.raises(SystemExit, match="tiny: it has responses that are not of 3 tokens"):
        bench.sampler.check_work(work, "it", same, [turn(1.0, [3, 3, 3, 2])])
    spread = replace(work, mean=2)
    bench.sampler.check_work(spread, "it", [turn(1.0, [1, 3, 1, 3])], [turn(1.0, [3, 3, 1, 3])])
    # Means 2 and 10 with standard errors 1 / 2 and 1 / 2: 8 is beyond 5 x 0.71.
    with pytest.raises(SystemExit, match=r"it has responses of 10\.0 tokens, ours of 2\.0"):
        bench.sampler.check_work(spread, "it", [turn(1.0, [1, 3, 1, 3])], [turn(1.0, [9, 11, 9, 11])])


def test_own_lengths_end_at_the_first_eos(bench):
    eos, pad = bench.work.EOS, bench.work.PAD
    tokens = torch.tensor([[7, eos, pad], [7, 8, 9], [eos, pad, pad], [7, 8, eos]])
    assert bench.sampler.own_lengths(tokens) == [2, 3, 1, 3]
