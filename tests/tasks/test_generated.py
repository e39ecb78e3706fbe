"""What holds for every task that draws its problems and knows the truth of every step."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.errors import UserError
from mulligan.tasks.base import BUCKETS
from mulligan.tasks.boolean import Boolean, BooleanSettings
from mulligan.tasks.countdown import Countdown, CountdownSettings
from mulligan.types import Verdict

LEVELS = [(Countdown, CountdownSettings, n) for n in range(1, 5)] + [(Boolean, BooleanSettings, n) for n in range(1, 7)]
LEVEL_IDS = [f"{task.name}-{level}" for task, _, level in LEVELS]
TASKS = [Countdown(), Boolean()]


def identity(task, problem):
    if isinstance(task, Countdown):
        return (*sorted(problem.data["numbers"]), problem.data["target"])
    return problem.data["expression"]


@pytest.mark.parametrize(("task", "config", "level"), LEVELS, ids=LEVEL_IDS)
@pytest.mark.parametrize("split", BUCKETS)
def test_canonical_solutions_are_right_in_every_step(task, config, level, split):
    task = task(config(level=level))
    for index in range(200):
        problem = task.problem(split, index)
        response = task.solution(problem)
        grade = task.verify(problem, response)
        assert (grade.verdict, grade.reward, grade.process_correct) == (Verdict.PASS, 1.0, True), response
        assert grade.first_wrong_step is None
        assert task.correct(problem, problem.answer)
        steps = task.split_steps(response)
        assert grade.steps == len(steps)
        if len(steps) > 2:  # dropping the last operation leaves only a step missing: the answer's is wrong
            short = steps[:-2] + steps[-1:]
            assert task.first_wrong_step(problem, short) == len(short)
        # dropping the first operation leaves steps that do not follow
        assert task.first_wrong_step(problem, steps[1:]) in range(1, len(steps))
        # truncated: no box
        assert task.first_wrong_step(problem, steps[:-1]) == len(steps) - 1


@pytest.mark.parametrize(("task", "config", "level"), LEVELS, ids=LEVEL_IDS)
def test_splits_are_disjoint(task, config, level):
    few = {}
    for split in BUCKETS:
        problems = [task(config(level=level, seed=seed)).problem(split, i) for seed in (0, 1) for i in range(200)]
        few[split] = {identity(task(), problem) for problem in problems}
        assert few[split]
    assert sum(map(len, few.values())) == len(set.union(*few.values()))


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_default_splits_are_disjoint_over_many_problems(task):
    seen = {split: {identity(task, task.problem(split, i)) for i in range(2000)} for split in BUCKETS}
    assert sum(map(len, seen.values())) == len(set.union(*seen.values()))


@pytest.mark.parametrize(
    "task", [Countdown(CountdownSettings(level=1)), Countdown(), Boolean()], ids=["countdown-1", "countdown", "boolean"]
)
def test_every_split_has_problems_of_its_own(task):
    """A corpus or test set of a few dozen different problems would be memorised, or noise.

    The least of these is 1,010 boolean expressions of three operators: an eighth of them, some 126, is for the test.
    """
    for split in BUCKETS:
        assert len({identity(task, task.problem(split, i)) for i in range(400)}) > 80


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_problem_is_a_pure_function(task):
    again = type(task)()
    backwards = [again.problem("train", i) for i in reversed(range(20))]
    assert [task.problem("train", i) for i in range(20)] == backwards[::-1]
    other = type(task)(task.Settings(seed=1))
    assert [other.problem("train", i).prompt for i in range(20)] != [p.prompt for p in backwards[::-1]]
    assert task.problem("test", 3).uid == f"{task.name}/test/3"


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_unknown_split(task):
    with pytest.raises(UserError, match="split 'tset' is unknown"):
        task.problem("tset", 0)


def test_settings_that_leave_no_problem():
    task = Countdown(CountdownSettings(level=1, largest=2))
    with pytest.raises(UserError, match="widen them"):
        for split in BUCKETS:
            task.problem(split, 0)


garbage = st.text(max_size=80) | st.text(alphabet="0123456789+-*=:,;TF&|!()\\boxed{}", max_size=80)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@settings(deadline=None)
@given(text=garbage, kept=st.integers(0, 3))
def test_garbage_is_wrong_and_never_raises(task, text, kept):
    problem = task.problem("train", 0)
    response = "".join(task.split_steps(task.solution(problem))[:kept]) + text
    steps = task.split_steps(response)
    assert "".join(steps) == response
    assert all(steps)
    grade = task.verify(problem, response)
    assert grade.process_correct is (grade.first_wrong_step is None)
    if grade.first_wrong_step is not None:
        assert 1 <= grade.first_wrong_step <= max(1, len(steps))
    task.equivalent(problem, text, response)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_hint_and_diagnosis(task):
    problem = task.problem("train", 0)
    body = problem.prompt.removesuffix("?")
    assert task.prompt(problem) == f"{body}?"
    assert task.hint(problem, []) == f"{body}?"
    assert task.hint(problem, ["a", "b"]) == f"{body}!a,b?"
    assert task.hint(problem, list("abcdef")) == f"{body}!a,b,c,d?"
    assert task.hint(problem, ["a"], concise=True) == f"{body}!a~?"
    assert task.hint(problem, [], concise=True) == f"{body}~?"
    assert task.diagnosis(problem, ["s;", "t"]) == f"{body}?s;t@"
