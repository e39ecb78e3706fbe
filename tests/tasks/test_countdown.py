import pytest
from pydantic import ValidationError

from mulligan.tasks.countdown import Countdown, CountdownSettings, solve
from mulligan.types import Problem

TASK = Countdown()
PROBLEM = Problem(
    task="countdown",
    split="train",
    index=0,
    prompt="3,7,5>22?",
    answer="7+3*5",
    data={"numbers": [3, 7, 5], "target": 22},
)


@pytest.mark.parametrize(
    ("response", "wrong"),
    [
        (r"3*5=15;7+15=22;\boxed{7+3*5}", None),
        (r"3*5=15;15+7=22;\boxed{3*5+7}", None),
        (r"5*3=15;15+7=22;\boxed{(7)+5*3}", None),
        (r"3*5=15;15+7=22;\boxed{3+5+7}", 3),  # a wrong expression
        (r"3*5=15;15+7=22;\boxed{22}", 3),
        (r"3*5=16;16+7=23;\boxed{3*5+7}", 1),  # wrong arithmetic
        (r"3*5=15;15+7=23;\boxed{3*5+7}", 2),
        (r"3*7=21;21+5=26;\boxed{3*7+5}", 1),  # exact, but the target is out of reach
        (r"3+5=8;8*7=56;\boxed{(3+5)*7}", 1),
        (r"4*5=20;20+2=22;\boxed{4*5+2}", 1),  # numbers that are not there
        (r"3*5=15;3+7=10;\boxed{3*5+7}", 2),  # a number used twice
        (r"3*3=9;9+7=16;\boxed{3*3+7}", 1),
        (r"3-5=-2;7-2=5;\boxed{7-5+3}", 1),  # negative
        (r"15/5=3;\boxed{3*5+7}", 1),
        (r"3*5=15;\boxed{3*5+7}", 2),  # a step is missing
        (r"\boxed{3*5+7}", 1),
        (r"3*5=15;15+7=22;", 2),  # truncated
        ("3*5=15;15+7", 2),
        ("3*5=15;", 1),
        ("3*", 1),
        ("", 1),
        (r"3*5=15;15+7=22;so \boxed{3*5+7}", 3),  # the last segment must be the box alone
        (r"3*5=15;15+7=22;22+0=22;\boxed{3*5+7}", 3),
        (r"\boxed{3*5+7};3*5=15;15+7=22;\boxed{3*5+7}", 1),
        (r"03*5=15;15+7=22;\boxed{3*5+7}", None),
        (r"٣*5=15;15+7=22;\boxed{3*5+7}", 1),
    ],
)
def test_oracle(response, wrong):
    assert TASK.first_wrong_step(PROBLEM, TASK.split_steps(response)) == wrong


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("7+3*5", True),
        ("5*3+7", True),
        ("(5*3)+7", True),
        (" 5*3 + 7 ", True),
        ("3*5", False),
        ("3*5+7+0", False),
        ("22", False),
        ("5+3*7", False),
        ("3*7+5-4", False),
        ("-3*-5+7", False),  # signs are no part of the game
        ("", False),
        ("3*5+7=22", False),
        ("__import__('os')", False),
    ],
)
def test_correct(answer, right):
    assert TASK.correct(PROBLEM, answer) is right


def test_intermediate_values_of_the_answer_are_free():
    problem = Problem(
        task="countdown", split="train", index=0, prompt="", answer="", data={"numbers": [2, 5, 4], "target": 1}
    )
    assert TASK.correct(problem, "2-5+4")


def test_equivalence():
    assert TASK.equivalent(PROBLEM, "7+3*5", "(5*3)+7")
    assert not TASK.equivalent(PROBLEM, "7+3*5", "7+3+5")
    assert TASK.equivalent(PROBLEM, "oops", " oops")
    assert not TASK.equivalent(PROBLEM, "oops", "7")


def test_the_limit_binds_the_steps():
    task = Countdown(CountdownSettings(limit=20))
    assert task.first_wrong_step(PROBLEM, task.split_steps(r"3*5=15;15+7=22;\boxed{3*5+7}")) == 1
    with pytest.raises(ValueError, match="out of reach"):
        solve((3, 5, 7), 22, 20)


def test_canonical_solution():
    assert TASK.solution(PROBLEM) == r"3*5=15;7+15=22;\boxed{7+3*5}"


@pytest.mark.parametrize("values", [{"level": 0}, {"level": 5}, {"largest": 50, "limit": 20}, {"colour": 1}])
def test_settings(values):
    with pytest.raises(ValidationError):
        CountdownSettings(**values)
