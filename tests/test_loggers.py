"""The loggers with their real packages, without a network: what they wrote is read back from their own files."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mulligan.config import LogSection
from mulligan.errors import UserError
from mulligan.log import RunLog, read_metrics
from mulligan.loggers import TensorBoard, Trackio, WeightsAndBiases, build_loggers, numbers
from tests.e2e.helpers import SMALL, call, make_model, refused

RUN = {"seed": 3, "tokens": None, "task": {"name": "chain", "level": 2}}


@pytest.fixture(autouse=True)
def _nobody(tmp_path, monkeypatch):
    """No account and no settings of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith(("WANDB", "TRACKIO"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    yield
    if "wandb" in sys.modules and sys.modules["wandb"] is not None:
        sys.modules["wandb"].teardown()  # it would go on with this test's WANDB_MODE


# --- reading back ---------------------------------------------------------------------------------------


def board(directory: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def wandb_records(file: Path) -> list[Any]:
    """The records of a .wandb file. Its layout is LevelDB's log: behind a header of 7 bytes, blocks of 32 KiB hold
    pieces with a header of 7 bytes (checksum 4, length 2, type 1: whole, first, middle, last)."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts, out = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # no room for a header
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            out.append(record)
            parts = b""
    return out


def settled(run: Path) -> list[Path]:
    """The run's .wandb files, oldest first, once W&B's own process has written everything."""
    import wandb

    wandb.teardown()
    return sorted((run / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.parent.stat().st_mtime_ns)


def history(file: Path) -> list[dict[str, Any]]:
    rows = [r.history.item for r in wandb_records(file) if r.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def store(directory: Path, project: str = "mulligan") -> list[tuple[str, int, dict[str, float]]]:
    with sqlite3.connect(directory / f"{project}.db") as data:
        rows = data.execute("select run_name, step, metrics from metrics order by id").fetchall()
    return [(name, step, json.loads(text)) for name, step, text in rows]


# --- one by one -----------------------------------------------------------------------------------------


def test_numbers_are_what_can_be_plotted():
    assert numbers({"step": 3, "a": 1, "b": 0.5, "c": True, "d": "x", "e": None, "f": [1]}) == {"a": 1, "b": 0.5}


def test_tensorboard_forgets_the_steps_that_come_again(tmp_path):
    run = tmp_path / "run"
    with RunLog(run, loggers={"tensorboard": TensorBoard("p", "n")}, run=RUN) as log:
        log.metrics({"step": 0, "reward": 0.5, "method": "grpo"})
        log.metrics({"step": 1, "reward": 0.25})
        offsets = log.flush()
        log.metrics({"step": 2, "reward": 7.0})
    assert board(run) == {"reward": [(0, 0.5), (1, 0.25), (2, 7.0)]}
    with RunLog(run, offsets=offsets, loggers={"tensorboard": TensorBoard("p", "n")}, run=RUN) as log:
        log.metrics({"step": 2, "reward": 0.125})
    assert board(run) == {"reward": [(0, 0.5), (1, 0.25), (2, 0.125)]}


def test_wandb_offline_goes_on_with_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    with RunLog(run, loggers={"wandb": WeightsAndBiases("mulligan", "mine")}, run=RUN) as log:
        log.metrics({"step": 0, "eval/pass@1": 0.5})
        log.metrics({"step": 1, "reward": 0.25})
        log.metrics({"step": 1, "eval/pass@1": 0.75})
        offsets = log.flush()
        log.metrics({"step": 2, "reward": 0.5})
    with RunLog(run, offsets=offsets, loggers={"wandb": WeightsAndBiases("mulligan", "mine")}, run=RUN) as log:
        log.metrics({"step": 2, "reward": 0.5})
    first, second = settled(run)
    own = (run / "wandb" / "mulligan.id").read_text().strip()
    assert first.name == second.name == f"run-{own}.wandb"

    def told(file: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k not in ("_timestamp", "_runtime")} for row in history(file)]

    assert told(first) == [
        {"step": 0, "eval/pass@1": 0.5, "_step": 0},
        {"step": 1, "reward": 0.25, "_step": 2},
        {"step": 1, "eval/pass@1": 0.75, "_step": 3},
        {"step": 2, "reward": 0.5, "_step": 4},
    ]
    # Offline W&B does not know what it has, so a resumed run says all of it, under the same indices.
    assert told(second) == told(first)
    begun = next(r.run for r in wandb_records(second) if r.WhichOneof("record_type") == "run")
    assert (begun.project, begun.display_name, begun.run_id) == ("mulligan", "mine", own)
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["seed"] == 3 and config["task"] == {"name": "chain", "level": 2}
    axes = [r.metric for r in wandb_records(first) if r.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in axes]


def test_wandb_is_sent_what_it_lacks_and_nothing_twice(monkeypatch):
    """Online, a resumed run's counter stands behind its last index; here such a run is stood in for."""

    class Resumed:
        step = 4  # it has steps 0 and 1, each with an evaluation

        def __init__(self) -> None:
            self.sent: list[tuple[int, float]] = []

        def define_metric(self, name, step_metric):
            pass

        def log(self, row, step, commit):
            self.sent.append((step, row["x"]))

    monkeypatch.setenv("WANDB_MODE", "offline")
    logger, resumed = WeightsAndBiases("mulligan", "mine"), Resumed()
    monkeypatch.setattr(logger, "_wandb", SimpleNamespace(init=lambda **_: resumed, Settings=dict))
    monkeypatch.setattr(logger, "_id", lambda path: "abc")
    kept = [{"step": step, "x": x} for step, x in ((0, 0.1), (0, 0.2), (1, 0.3), (1, 0.4), (2, 0.5))]
    logger.start({}, Path(), kept)  # step 2 was lost
    assert resumed.sent == [(4, 0.5)]
    for step, x in ((2, 0.6), (3, 0.7), (3, 0.8)):  # the evaluation of step 2, then a step with its own
        logger.metrics({"step": step, "x": x})
    assert resumed.sent == [(4, 0.5), (5, 0.6), (6, 0.7), (7, 0.8)]


@pytest.mark.parametrize("mode", [None, "online"])
def test_wandb_without_an_account_is_refused_and_never_asks(monkeypatch, mode):
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    refused(call("train", "--dry-run", 'log.to=["wandb"]'), "no account", "wandb login", "WANDB_MODE=offline")


@pytest.mark.parametrize(
    ("package", "name", "said"),
    [
        ("torch.utils.tensorboard", "tensorboard", "TensorBoard logging needs another package"),
        ("wandb", "wandb", "W&B logging needs another package"),
    ],
)
def test_an_absent_package_is_told_before_anything_is_made(monkeypatch, tmp_path, package, name, said):
    monkeypatch.setitem(sys.modules, package, None)
    for dry in (["--dry-run"], []):
        refused(call("train", "--out", "run", f'log.to=["{name}"]', *dry), said, f"pip install 'mulligan[{name}]'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("to", "said"),
    [
        (["wandbb"], "log.to: 'wandbb' is no logger (did you mean 'wandb'?)"),
        (["tensorboard", "tensorboard"], "'tensorboard' is named twice"),
        (["./absent.py:f"], "absent.py: no such file"),
        (["./mine.py:nothing"], "has no 'nothing'"),
        (["./mine.py:half"], "makes a Half without 'metrics'"),
        (["./mine.py:broken"], "fails: ZeroDivisionError"),
    ],
)
def test_what_log_to_may_not_be(tmp_path, to, said):
    (tmp_path / "mine.py").write_text(
        "class Half:\n    def start(self, run, directory, kept): ...\n\n\ndef half():\n    return Half()\n\n\n"
        "def broken():\n    return 1 / 0\n"
    )
    with pytest.raises(UserError) as caught:
        build_loggers(LogSection(to=to), tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_project_is_a_plain_name():
    refused(call("train", "--dry-run", "log.project=a/b"), "log.project", "a/b")


def test_a_logger_that_comes_later_is_told_everything(tmp_path):
    with RunLog(tmp_path) as log:
        for step in range(3):
            log.metrics({"step": step, "reward": step / 4})
        offsets = log.flush()
    with RunLog(tmp_path, offsets=offsets, loggers={"tensorboard": TensorBoard("p", "n")}, run=RUN) as log:
        log.metrics({"step": 3, "reward": 0.75})
    assert board(tmp_path) == {"reward": [(step, step / 4) for step in range(4)]}


# --- whole runs -----------------------------------------------------------------------------------------

ALL = 'log.to=["tensorboard", "wandb", "trackio", "./mine.py:factory"]'
MINE = """
import json


class Mine:
    def start(self, run, directory, kept):
        self.file = (directory / "mine.jsonl").open("a")
        self._write(["start", run["seed"], kept and len(kept)])

    def metrics(self, record):
        self._write(record["step"])

    def flush(self):
        self._write("flush")

    def close(self, failed):
        self._write(["close", failed])
        self.file.close()

    def _write(self, what):
        self.file.write(json.dumps(what) + "\\n")


def factory():
    return Mine()


def failing():
    mine = Mine()
    mine.metrics = lambda record: 1 / 0
    return mine
"""


def test_a_run_is_told_to_all_of_them_and_resumed_with_them(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "mine.py").write_text(MINE)
    model = make_model(tmp_path / "tiny")
    run = tmp_path / "run"
    done = call("train", "--model", model, "--steps", "2", "--out", "run", *SMALL, ALL)
    assert done.code == 0 and "rackio" not in done.out
    # Resumed with one more step. A killed run's last steps come again in the same way.
    assert call("train", "run/run.toml", "--resume", "--steps", "3").code == 0
    records = read_metrics(run / "metrics.jsonl")
    steps = [record["step"] for record in records]
    assert steps == [0, 1, 2, 2, 3, 3]
    rewards = [(r["step"], r["rollout/reward"]) for r in records if "rollout/reward" in r]
    accuracy = [(r["step"], r["eval/pass@1"]) for r in records if "eval/pass@1" in r]

    shown = board(run)
    assert shown["rollout/reward"] == rewards and shown["eval/pass@1"] == accuracy  # multiples of 1/16 are exact

    first, second = settled(run)
    assert [row["time/rollout"] for row in history(first)[1:3]] == [r["time/rollout"] for r in records[1:3]]
    rows = history(second)
    assert [row["step"] for row in rows] == steps and [row["_step"] for row in rows] == [0, 2, 4, 5, 6, 7]
    assert [(row["step"], row["rollout/reward"]) for row in rows if "rollout/reward" in row] == rewards
    assert rows[1]["time/rollout"] == records[1]["time/rollout"]

    kept = store(run / "trackio")
    assert [(name, step) for name, step, _ in kept] == [("run", step) for step in steps]
    assert [(step, row["rollout/reward"]) for _, step, row in kept if "rollout/reward" in row] == rewards

    mine = [json.loads(line) for line in (run / "mine.jsonl").read_text().splitlines()]
    assert mine == [
        ["start", 0, None],
        0,
        1,
        2,
        2,
        "flush",
        ["close", False],
        ["start", 0, 4],
        3,
        3,
        "flush",
        ["close", False],
    ]

    later = Trackio("another", "late")
    later.start(RUN, run, records)
    later.close(False)
    assert [step for _, step, _ in store(run / "trackio", "another")] == steps

    # trackio settles on one directory in a process; another run's numbers must not end up there.
    with pytest.raises(UserError, match="keeps to one directory in a process"):
        Trackio("mulligan", "y").start({}, tmp_path / "other", None)
    assert len(store(run / "trackio")) == len(steps)


def test_a_broken_logger_stops_a_run_that_goes_on_without_it(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    model = make_model(tmp_path / "tiny")
    argv = ("train", "--model", model, "--steps", "4", "--out", "run", *SMALL)
    refused(call(*argv, 'log.to=["./mine.py:failing"]'), "mine.py:failing fails (ZeroDivisionError", "is saved")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert call(*argv, "log.to=[]", "--resume").code == 0
    assert call(*argv[:4], "4", "--out", "whole", *SMALL).code == 0
    left, right = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("run", "whole"))
    for one, other in zip(left, right, strict=True):
        assert {k: v for k, v in one.items() if "time/" not in k} == {
            k: v for k, v in other.items() if "time/" not in k
        }
