"""Answers judged by the verifier: side by side, and never wrong for want of a verdict."""

import pytest

from mulligan.tasks import build_task
from mulligan.types import Verdict
from mulligan.verify.judgement import Judgement
from tests.tasks.test_jsonl import write


class Written:
    """A pool whose verdicts are written down."""

    def __init__(self, *words):
        self.words, self.asked = list(words), []

    def grade_many(self, pairs, *, percent=False):
        self.asked.append((list(pairs), percent))
        return [self.words.pop(0) for _ in pairs]


@pytest.fixture
def build(tmp_path):
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(12, 32)]
    write(tmp_path / "all.jsonl", rows)

    def made(**settings):
        return build_task("jsonl", {"path": str(tmp_path / "all.jsonl"), **settings})

    return made


def test_all_responses_of_a_request_go_to_the_pool_at_once(build, monkeypatch):
    task = build(percent=True)
    pool = Written(
        Judgement("unscorable", "out of time (5 s)"), Judgement("correct", "equal"), Judgement("wrong", "no")
    )
    monkeypatch.setattr("mulligan.verify.pool.shared_pool", lambda: pool)
    problem = task.problem("train", 0)
    found = task.grade(problem, ["\\boxed{a}", "none", "\\boxed{b}", "<think>\\boxed{9}</think>\\boxed{c}"])
    assert pool.asked == [([(problem.answer, "a"), (problem.answer, "b"), (problem.answer, "c")], True)]
    assert [(g.verdict, g.reward, g.reason) for g in found] == [
        (Verdict.UNSCORABLE, 0.0, "out of time (5 s)"),
        (Verdict.FAIL, 0.0, "no final answer"),
        (Verdict.PASS, 1.0, "right"),
        (Verdict.FAIL, 0.0, "no"),
    ]
    assert [g.answer for g in found] == ["a", None, "b", "c"]


def test_only_the_exact_comparison_needs_no_pool(build, monkeypatch):
    monkeypatch.setattr("mulligan.verify.pool.shared_pool", lambda: pytest.fail("not here"))
    task = build(verifier="exact")
    problem = task.problem("train", 0)
    assert task.verify(problem, f"\\boxed{{{problem.answer}.0}}").reward == 1.0
    assert not task.equivalent(problem, "x+1", "1+x")


def test_equivalence_through_the_workers(tmp_path):
    """The real pool: these pairs need algebra, so a worker is started."""
    write(tmp_path / "test.jsonl", [{"question": "Expand it.", "answer": "x^2+x"}])
    task = build_task("jsonl", {"path": str(tmp_path)})
    problem = task.problem("test", 0)
    found = task.grade(problem, ["\\boxed{x(x+1)}", "\\boxed{x(x-1)}", "\\boxed{x + x^{2}}"])
    assert [str(g.verdict) for g in found] == ["pass", "fail", "pass"]
    assert task.equivalent(problem, "2x+2", "2(x+1)")
    assert not task.correct(problem, "x^2-x")
    assert not build_task("jsonl", {"path": str(tmp_path), "verifier": "exact"}).correct(problem, "x(x+1)")


def test_percentages_only_where_the_task_says_so(build):
    for percent in (True, False):
        task = build(percent=percent)
        problem = task.problem("train", 0)
        assert task.correct(problem, f"{problem.answer}\\%") == percent
