"""Data as a user meets it: what `mulligan train` says and records of it."""

import json

from mulligan.config import read_toml
from tests.e2e.helpers import call, metrics
from tests.tasks.test_jsonl import write

FEW = ["sampling.prompts=3", "sampling.max_new_tokens=8", "eval.problems=4", "eval.samples=1", "--steps", "1"]


def sums(n, start=0):
    return [{"question": f"{i}+1=?", "answer": str(i + 1)} for i in range(start, start + n)]


def test_overlap_is_told_and_recorded(tmp_path):
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", [*sums(20), {"question": "5+5=?", "answer": None}])
    write(tmp_path / "set" / "dev.jsonl", sums(6, start=15))
    write(tmp_path / "set" / "test.jsonl", sums(3, start=80))
    line = f"{tmp_path / 'set'}: 5 of 20 training problems stand in dev or test and are left out"
    given = ["--task", "jsonl", f"task.path={tmp_path / 'set'}", "task.instruction=''", *FEW]
    said = call("train", *given, "--dry-run").out
    assert f"# {line}\n" in said
    assert f"# {tmp_path / 'set'}: 1 rows have no answer and are left out\n" in said
    said = call("train", *given, "--out", str(tmp_path / "run")).out
    assert f"{line}\n" in said
    first = metrics(tmp_path / "run")[0]
    assert (first["data/left_out/overlap"], first["data/left_out/unanswered"]) == (5, 1)


def test_a_mixture_with_a_reward_of_the_user_s_own(tmp_path):
    write(tmp_path / "all.jsonl", sums(40))
    code = "def size(completion_ids, **kwargs):\n    return [len(ids) / 100 for ids in completion_ids]\n"
    (tmp_path / "rw.py").write_text(code)
    rewards = f"rewards=['{tmp_path / 'rw.py'}:size']"
    part = f"{{name='jsonl', weight=2, path='{tmp_path / 'all.jsonl'}', instruction='', {rewards}}}"
    out = tmp_path / "run"
    call("train", "--task", "mixture", f"task.parts=[{part}, {{name='chain', level=2}}]", *FEW, "--out", str(out))
    records = metrics(out)
    last = next(r for r in records if "rollout/reward" in r)
    assert last["rollout/jsonl/reward"] > 0
    assert "rollout/chain/pass" in last
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    problems = {s["problem"].rsplit("/", 2)[0] for s in samples}
    assert problems == {"mixture/jsonl", "mixture/chain"}  # two and one in every block of three
    for sample in samples:
        if sample["problem"].startswith("mixture/jsonl"):
            right = float(sample["verdict"] == "pass")
            assert abs(sample["reward"] - right - len(sample["tokens"]) / 100) < 1e-9
    assert [part["name"] for part in read_toml(out / "run.toml")["task"]["parts"]] == ["jsonl", "chain"]
    call("train", "--resume", "--out", str(out), "--steps", "2")  # from the run's own record
    assert max(r["step"] for r in metrics(out)) == 2
    call("replay", str(out), "--step", "1", "--method", "nsr")
