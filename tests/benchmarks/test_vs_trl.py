"""The comparison with TRL: what a step costs at least, that unequal work is told, which setting and rate are taken."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mulligan.models.loading import load_model, save_model

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(FOLDER))
    try:
        import peer_trl
        import time_to_accuracy
        import vs_trl
    finally:
        sys.path.remove(str(FOLDER))
    return SimpleNamespace(peer=peer_trl, race=time_to_accuracy, steps=vs_trl)


class Body(torch.nn.Module):
    """Embedding and head of 10 x 2, and a body of 4 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = torch.nn.Embedding(10, 2), torch.nn.Linear(2, 2, bias=False)
        self.head = torch.nn.Linear(2, 10, bias=False)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head


def test_least_operations_by_hand(bench):
    work = bench.steps.Work(name="tiny", goal=1, width=2, layers=1, prompts=2, samples=3, prompt=4, new=5)
    found = bench.steps.least_operations(work, Body(), [1, 3])
    # 8 prompt tokens through the body, 6 responses of 2 tokens through body and head: 4 * 8 + 24 * 12 = 320.
    # Seen: prompts 2 * 4^2 / 2 = 16; responses 6 * mean(4 * 1 + 1/2, 4 * 3 + 9/2) = 63. Times 1 layer, 2 channels: 158.
    assert found == bench.steps.Least(sampling=2 * 320 + 4 * 158, learning=6 * 320 + 12 * 158)


def test_lengths_beyond_chance_are_told(bench):
    theirs = [10, 20] * 50  # deviation 5; of the difference to 100 of ours 5 * sqrt(2 / 100) = 0.71; 4 times: 2.83
    bench.steps.check_lengths(theirs, total=1780, count=100)
    with pytest.raises(SystemExit, match=r"-3\.00 tokens longer than ours; chance allows 2\.83"):
        bench.steps.check_lengths(theirs, total=1800, count=100)
    bench.steps.check_lengths([64] * 8, total=64 * 8, count=8)
    with pytest.raises(SystemExit, match=r"chance allows 0\.00"):
        bench.steps.check_lengths([64] * 8, total=64 * 8 - 1, count=8)


def test_other_work_of_trl_is_told(bench):
    order = SimpleNamespace(width=2, samples=2)
    right = {"lengths": [3, 4, 5, 6], "rows": 4, "tokens": 18, "updates": 1}
    bench.peer.check_work(bench.peer.Done(**right), order, 1)
    for wrong in ({"lengths": [3, 4, 11]}, {"rows": 8}, {"tokens": 17}, {"updates": 2}):
        with pytest.raises(SystemExit, match="other work"):
            bench.peer.check_work(bench.peer.Done(**right | wrong), order, 1)


def test_another_optimizer_is_told(bench):
    weights = [torch.nn.Parameter(torch.zeros(1))]
    settings = {"lr": 1e-3, "betas": bench.peer.BETAS, "eps": 1e-8, "weight_decay": 0.0, "fused": True}
    bench.peer.check_optimizer(torch.optim.AdamW(weights, **settings), 1e-3, "ours")
    for other in ({"weight_decay": 0.01}, {"betas": (0.9, 0.95)}, {"fused": False}):
        with pytest.raises(SystemExit, match="ours has another optimizer"):
            bench.peer.check_optimizer(torch.optim.AdamW(weights, **settings | other), 1e-3, "ours")


def test_the_search_keeps_what_is_faster_and_gives_up_early(bench, monkeypatch, tmp_path):
    # Seconds of the first and the second step. Half the batch is faster; bfloat16 is given up after its first step;
    # eager fails; static is faster yet, with what was kept before.
    script = {
        "batch 8, dynamic cache, sdpa, float32": [5.0, 2.0],
        "batch 2, dynamic cache, sdpa, float32": [2.1, 1.5],
        "batch 2, dynamic cache, sdpa, bfloat16": [3.0, 0.1],
        "batch 2, dynamic cache, eager, float32": None,
        "batch 2, static cache, sdpa, float32": [1.6, 1.4],
    }
    tried, said = {}, []

    def scripted(order, setting, steps, after, folder):
        times = script[str(setting)]
        if times is None:
            raise ValueError("no eager attention here\nsecond line")
        for seconds in times:
            tried[str(setting)] = tried.get(str(setting), 0) + 1
            if after(seconds, None):
                return

    monkeypatch.setattr(bench.peer, "train_trl", scripted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    best = bench.peer.best_setting(SimpleNamespace(width=2, samples=4), tmp_path, said.append)
    assert str(best) == "batch 2, static cache, sdpa, float32"
    assert list(tried.values()) == [2, 2, 1, 2]
    assert said[3] == "TRL, batch 2, dynamic cache, eager, float32: cannot run (no eager attention here)"


def test_without_trl_there_is_one_line(bench, monkeypatch):
    monkeypatch.setattr(bench.peer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"^this comparison needs another package: pip install 'mulligan\[trl\]'$"):
        bench.peer.need_trl()


def test_each_side_gets_its_own_best_rate(bench, monkeypatch, tmp_path):
    course, most_seen, said = bench.race.Course, {}, []
    # By rate: after how many steps and with what accuracy each is at the end.
    script = {2.0: ((6, 0.9), (8, 0.8)), 1.0: ((6, 0.85), (4, 0.82)), 4.0: ((6, 0.5), (4, 0.81))}

    def scripted(folder, examiner, setting, rates, seed, every, most):
        most_seen[rates[0]] = most
        return tuple(course(m, [1.0] * n, {n: a}) for m, (n, a) in zip(most, script[rates[0]], strict=True))

    monkeypatch.setattr(bench.race, "race", scripted)
    # TRL: 6 steps twice, so the higher accuracy. Ours: 4 steps at both others, and 0.82 is above 0.81.
    assert bench.race.tune(tmp_path, None, None, [2.0, 1.0, 4.0], said.append) == (2.0, 1.0)
    assert most_seen == {2.0: (40, 40), 1.0: (6, 8), 4.0: (6, 4)}
    assert [line for line in said if "grid's end" in line] == [
        "our best rate 1 is at the grid's end: a wider grid may have a better one"
    ]


def test_both_read_the_same_prompts_and_rewards(bench, tmp_path):
    base = bench.race.save_base(tmp_path)
    examiner = bench.race.Examiner(tmp_path)
    order = bench.race.trl_order(tmp_path, examiner, 1e-4, 0)
    problem = examiner.task.problem("train", 3)
    assert order.prompts[3] == "<bos>" + problem.prompt
    right, wrong = examiner.task.solution(problem), "\\boxed{}"
    assert order.reward(completions=[right, wrong], number=[3, 3]) == [1.0, 0.0]
    assert base.tokenizer(order.prompts[3])["input_ids"] == list(examiner.texts.prompt(problem))
    loaded = load_model(bench.race.BASE)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "forgery-proof")
    with pytest.raises(SystemExit, match="would read chain/train/0 otherwise"):
        bench.race.trl_order(tmp_path, bench.race.Examiner(tmp_path / "forgery-proof"), 1e-4, 0)


@pytest.mark.filterwarnings("ignore")  # TRL's and accelerate's own
def test_trl_does_the_ordered_work(bench, tmp_path):
    pytest.importorskip("trl")
    work = bench.steps.Work(name="tiny", goal=1, width=32, layers=1, prompts=2, samples=4, prompt=4, new=6, mean=3)
    bench.steps.make_model(work, tmp_path / "model")
    order = bench.peer.Order(
        model=tmp_path / "model",
        prompts=bench.steps.prompts_of(work, 8),
        reward=bench.steps.even,
        width=2,
        samples=4,
        new=6,
        rate=1e-3,
    )
    times = []
    for setting in (bench.peer.Setting(8), bench.peer.Setting(2)):
        done = bench.peer.train_trl(order, setting, 3, lambda s, _: bool(times.append(s)), tmp_path / "out")
        bench.peer.check_work(done, order, 3)
        with pytest.raises(SystemExit, match="other work"):
            bench.peer.check_work(done, order, 2)
    assert len(times) == 6 and min(times) > 0
    done = bench.peer.train_trl(order, bench.peer.Setting(8), 3, lambda s, _: True, tmp_path / "out")
    bench.peer.check_work(done, order, 1)
