"""Answers made to fool, stall or break the verifier (``adversarial.jsonl``), through a real pool."""

from __future__ import annotations

import os
import runpy
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from mulligan.verify import pool as pools
from mulligan.verify.pool import Pool
from tests.verify.test_pool import workers_of

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "verifier_adversarial.py"))
ROWS = BENCHMARK["read_table"]()
MEMORY = 512 * 2**20
SLACK = 0.5  # seconds by which a busy machine may be late
SHORT = 0.5  # seconds; the benchmark takes the 5 that users have


def files_under(*folders: Path) -> set[Path]:
    return {path for folder in folders for path in folder.rglob("*")}


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Nothing may be written to the current folder, the home or a folder for temporary files."""
    folders = [tmp_path / name for name in ("current", "home", "temporary")]
    for folder in folders:
        folder.mkdir()
    monkeypatch.chdir(folders[0])
    monkeypatch.setenv("HOME", str(folders[1]))
    monkeypatch.setenv("TMPDIR", str(folders[2]))
    marks = Path(tempfile.gettempdir()).glob
    before = set(marks("mulligan*"))
    workers = workers_of(os.getpid())  # of the pool that all tests share
    yield
    assert files_under(*folders) == set()
    assert set(marks("mulligan*")) == before
    assert set(workers_of(os.getpid())) <= set(workers)


def still_right(pool: Pool) -> bool:
    pairs = [(r"2\sqrt{3}", r"\sqrt{12}"), ("x+1", "1+x"), ("7", "7"), ("x+1", "x+2")]
    return [told.verdict for told in pool.grade_many(pairs)] == ["correct", "correct", "correct", "wrong"]


def test_the_table_is_large_and_has_every_kind():
    counts = Counter(row["kind"] for row in ROWS)
    assert sum(counts.values()) >= 130
    assert counts.keys() == {"accepts-wrong", "rejects-right", "slow", "huge", "hostile"} and min(counts.values()) >= 40
    assert max(len(row["answer"]) for row in ROWS) >= 10**6
    for row in ROWS:
        assert set(row["expected"]) <= {"correct", "wrong", "unscorable"}
        assert (row["kind"] == "rejects-right") <= (row["expected"] == ["correct"]), row
        assert (row["kind"] == "accepts-wrong") <= (row["expected"] == ["wrong"]), row


@pytest.mark.parametrize("slow", [False, True])
def test_every_verdict_is_as_expected_and_within_the_limits(watched, slow):
    rows = [row for row in ROWS if (row["kind"] == "slow") is slow]
    deadline = SHORT if slow else 5.0
    with Pool(2, deadline=deadline, memory=MEMORY) as pool:
        found = list(BENCHMARK["measure"](pool, rows))
        assert still_right(pool)
    assert len(found) == len(rows)
    unexpected = {(row["gold"][:40], row["answer"][:40]): row["verdict"] for row in found if not row["as_expected"]}
    assert unexpected == {}
    assert max(row["seconds"] for row in found) <= deadline + SLACK
    assert max(row["peak_memory"] for row in found) <= MEMORY


def test_the_limits_hold_with_no_rules_before_math_verify(watched, monkeypatch):
    """Our rules turn most of the table away at sight. The pool must hold against what rules do not foresee."""
    monkeypatch.setitem(pools.FUNCTIONS, "unruled", "tests.verify.unruled:compare")
    slow = [row for row in ROWS if row["kind"] == "slow"]
    rows = slow[::2] + [row for row in ROWS if row["kind"] == "hostile" and row["gold"] == "x+1"]
    with Pool(2, deadline=SHORT, memory=MEMORY) as pool:
        found = pool.run("unruled", [{"gold": row["gold"], "answer": row["answer"]} for row in rows])
        assert still_right(pool)
    assert max(outcome.seconds for outcome in found) <= SHORT + SLACK
    assert max(outcome.peak_memory for outcome in found) <= MEMORY
    assert {outcome.value for outcome in found} == {True, False, None}
    assert any(outcome.reason == "out of time (0.5 s)" for outcome in found)
    assert all(outcome.reason for outcome in found if outcome.value is None)
