from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mulligan.tasks.countdown import Countdown, CountdownSettings, combined, moves, reaches, solve, write_steps
from mulligan.tasks.expressions import show_arithmetic
from mulligan.types import Problem, Verdict

TASK = Countdown()


def problem_of(numbers, target):
    data = {"numbers": list(numbers), "target": target}
    return Problem(task="countdown", split="train", index=0, prompt="", answer="", data=data)


PROBLEM = problem_of([3, 7, 5], 22)


@pytest.mark.parametrize(
    ("response", "wrong"),
    [
        (r"3*5=15:7,15;7+15=22:22;\boxed{7+3*5}", None),
        (r"3*5=15:7,15;15+7=22:22;\boxed{3*5+7}", None),
        (r"5*3=15:7,15;15+7=22:22;\boxed{(7)+5*3}", None),
        (r"3*5=15:15,7;15+7=22:22;\boxed{3*5+7}", None),  # what is left, in another order
        (r"3*5=15:7,15;15+7=22:22;\boxed{3+5+7}", 3),  # a wrong expression
        (r"3*5=15:7,15;15+7=22:22;\boxed{22}", 3),
        (r"3*5=16:7,16;16+7=23:23;\boxed{3*5+7}", 1),  # wrong arithmetic
        (r"3*5=16:7,15;15+7=22:22;\boxed{3*5+7}", 1),
        (r"3*5=15:7,15;15+7=23:23;\boxed{3*5+7}", 2),
        (r"3*5=15:7,15;15+7=23:22;\boxed{3*5+7}", 2),
        (r"3*7=21:5,21;21+5=26:26;\boxed{3*7+5}", 1),  # exact, but the target is out of reach
        (r"3+5=8:7,8;8*7=56:56;\boxed{(3+5)*7}", 1),
        (r"4*5=20:3,20;20+2=22:22;\boxed{4*5+2}", 1),  # numbers that are not there
        (r"3*5=15:7,15;3+7=10:10;\boxed{3*5+7}", 2),  # a number used twice
        (r"3*3=9:7,9;9+7=16:16;\boxed{3*3+7}", 1),
        (r"3-5=-2:7,-2;7-2=5:5;\boxed{7-5+3}", 1),  # negative
        (r"15/5=3:3,7;\boxed{3*5+7}", 1),
        (r"3*5=15:7,15;\boxed{3*5+7}", 2),  # a step is missing
        (r"\boxed{3*5+7}", 1),
        (r"3*5=15:7,15;15+7=22:22;", 2),  # truncated
        ("3*5=15:7,15;15+7=22:", 2),
        ("3*5=15:7,15;15+7", 2),
        ("3*5=15:7,15;", 1),
        ("3*5=15:7,", 1),
        ("3*", 1),
        ("", 1),
        (r"3*5=15:7,15;15+7=22:22;so \boxed{3*5+7}", 3),  # the last segment must be the box alone
        (r"3*5=15:7,15;15+7=22:22;22+0=22:22;\boxed{3*5+7}", 3),
        (r"\boxed{3*5+7};3*5=15:7,15;15+7=22:22;\boxed{3*5+7}", 1),
        (r"03*5=15:07,15;15+7=22:22;\boxed{3*5+7}", None),
        (r"٣*5=15:7,15;15+7=22:22;\boxed{3*5+7}", 1),
    ],
)
def test_oracle(response, wrong):
    assert TASK.first_wrong_step(PROBLEM, TASK.split_steps(response)) == wrong


@pytest.mark.parametrize(
    "left",
    [
        *("15", "7", "7,7,15", "7,15,22", "7,15,15", "3,7,5", "3,5,7,15", "7,16", "15,15", "7,5"),
        *("", "7,", ",7,15", "7,15,", "7,,15", "7;15", "7 15", "7, 15", "7,+15", "7,15:", "7,-15", "7,٢", "7.0,15"),
        *("715", "0000007,15", "7,15,0", "7,15" + ",0" * 9),
    ],
)
def test_a_wrong_word_about_what_is_left(left):
    """A number missing, one too many, one that was used up, another one, nothing at all, other punctuation."""
    steps = TASK.split_steps(rf"3*5=15:{left};15+7=22:22;\boxed{{3*5+7}}")
    assert TASK.first_wrong_step(PROBLEM, steps) == 1


@pytest.mark.parametrize("left", ["", "7", "15", "7,15", "22,0", "22,22", "23"])
def test_a_wrong_word_about_the_end(left):
    steps = TASK.split_steps(rf"3*5=15:7,15;15+7=22:{left};\boxed{{3*5+7}}")
    assert TASK.first_wrong_step(PROBLEM, steps) == 2


def test_a_step_without_what_is_left():
    assert TASK.first_wrong_step(PROBLEM, TASK.split_steps(r"3*5=15;7+15=22;\boxed{7+3*5}")) == 1
    assert TASK.first_wrong_step(PROBLEM, TASK.split_steps(r"3*5=15:7,15;7+15=22;\boxed{7+3*5}")) == 2


@pytest.mark.parametrize(
    ("numbers", "target", "response", "wrong"),
    [
        ([5, 5, 5], 30, r"5*5=25:5,25;5+25=30:30;\boxed{5+5*5}", None),
        ([5, 5, 5], 30, r"5*5=25:25;25+5=30:30;\boxed{5+5*5}", 1),  # the third 5 is forgotten
        ([5, 5, 5], 30, r"5*5=25:5,5,25;5+25=30:5,30;\boxed{5+5*5}", 1),  # one of two is not used up
        ([5, 5, 5], 5, r"5-5=0:0,5;0+5=5:5;\boxed{5-5+5}", None),  # the target stands among the numbers
        ([5, 5, 5], 5, r"5-5=0:5,0;5-0=5:5;\boxed{5-(5-5)}", None),
        ([5, 5, 5], 5, r"5-5=0:0;\boxed{5}", 1),
        ([5, 5, 5], 5, r"\boxed{5}", 1),
        ([5], 5, r"\boxed{5}", None),
        ([5, 5], 5, r"5;\boxed{5}", 1),
        ([2, 2, 4], 8, r"2*2=4:4,4;4+4=8:8;\boxed{2*2+4}", None),  # a result equal to a number at hand
        ([2, 2, 4], 8, r"2*2=4:4;4+4=8:8;\boxed{2*2+4}", 1),
        ([2, 2, 4], 8, r"2+2=4:4,4;4+4=8:8;\boxed{4+2+2}", None),
        ([2, 2, 4], 8, r"4-2=2:2,2;2+2=4:4;\boxed{4-2+2}", 1),  # leaves 2 and 2: at most 4
        ([1, 1, 1, 1], 1, r"1*1=1:1,1,1;1*1=1:1,1;1*1=1:1;\boxed{1*1*1*1}", None),
        ([1, 1, 1, 1], 1, r"1*1=1:1,1;1*1=1:1;\boxed{1*1*1*1}", 1),
    ],
)
def test_equal_numbers(numbers, target, response, wrong):
    problem = problem_of(numbers, target)
    assert TASK.first_wrong_step(problem, TASK.split_steps(response)) == wrong


@pytest.mark.parametrize(
    ("numbers", "path", "expression"),
    [
        ((5, 5, 5), ((5, "*", 5, 25), (5, "+", 25, 30)), "5+5*5"),
        ((5, 5, 5), ((5, "-", 5, 0), (5, "-", 0, 5)), "5-(5-5)"),
        ((2, 2, 4), ((2, "*", 2, 4), (4, "+", 4, 8)), "4+2*2"),
        ((2, 2, 4), ((2, "+", 2, 4), (4, "-", 4, 0)), "4-(2+2)"),
        ((1, 1, 1), ((1, "*", 1, 1), (1, "+", 1, 2)), "1+1*1"),
        ((7,), (), "7"),
    ],
)
def test_combined(numbers, path, expression):
    assert show_arithmetic(combined(numbers, path)) == expression


@st.composite
def games(draw):
    """Numbers with many equal ones, or large ones, and moves from them down to one number."""
    limit = draw(st.sampled_from([9, 99, 9999]))
    number = st.integers(1, 3) | st.integers(1, min(999, limit))
    numbers = tuple(sorted(draw(st.lists(number, min_size=1, max_size=5))))
    pool, path = numbers, []
    while len(pool) > 1:
        move, pool = draw(st.sampled_from(list(moves(pool, limit))))
        path.append(move)
    return limit, numbers, tuple(path), pool[0]


@given(games(), st.randoms(use_true_random=False))
def test_any_moves_make_right_steps_and_a_right_expression(game, random):
    limit, numbers, path, target = game
    task = Countdown(CountdownSettings(limit=limit, largest=min(99, limit)))
    problem = problem_of(random.sample(numbers, len(numbers)), target)
    expression = show_arithmetic(combined(numbers, path))
    assert task.correct(problem, expression)
    steps = [*write_steps(numbers, path), f"\\boxed{{{expression}}}"]
    assert task.first_wrong_step(problem, steps) is None
    assert task.verify(problem, task.solution(problem)).process_correct
    # The same with the numbers left in another order, and with one of them changed, dropped or doubled.
    for at, step in enumerate(steps[:-1], start=1):
        move, said = step.removesuffix(";").split(":")
        left = said.split(",")

        def wrong(left, at=at, move=move):
            return task.first_wrong_step(problem, [*steps[: at - 1], f"{move}:{','.join(left)};", *steps[at:]])

        assert wrong(random.sample(left, len(left))) is None
        place = random.randrange(len(left))
        assert wrong(left[:place] + left[place + 1 :]) == at
        assert wrong([*left, left[place]]) == at
        assert wrong([*left[:place], str(int(left[place]) + 1), *left[place + 1 :]]) == at


def every_result(numbers, limit):
    """All that can be made of the numbers, by another road: split them in two in every way and join what each gives."""
    if len(numbers) == 1:
        return set(numbers)
    out = set()
    for size in range(1, len(numbers)):
        for chosen in combinations(range(len(numbers)), size):
            one = every_result([numbers[i] for i in chosen], limit)
            other = every_result([numbers[i] for i in range(len(numbers)) if i not in chosen], limit)
            out |= {c for a in one for b in other for c in (a + b, a - b, a * b) if 0 <= c <= limit}
    return out


@pytest.mark.parametrize("numbers", [(5, 5, 5), (1, 1, 2, 4), (3, 7, 25), (2, 2, 2, 2)])
def test_reach_is_exact(numbers):
    for limit in (10, 99, 200):
        found = {target for target in range(limit + 2) if reaches(numbers, target, limit)}
        assert found == every_result(list(numbers), limit)


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
    assert TASK.correct(problem_of([2, 5, 4], 1), "2-5+4")


def test_equivalence():
    assert TASK.equivalent(PROBLEM, "7+3*5", "(5*3)+7")
    assert not TASK.equivalent(PROBLEM, "7+3*5", "7+3+5")
    assert TASK.equivalent(PROBLEM, "oops", " oops")
    assert not TASK.equivalent(PROBLEM, "oops", "7")


def test_the_limit_binds_the_steps():
    task = Countdown(CountdownSettings(largest=9, limit=20))
    assert task.first_wrong_step(PROBLEM, task.split_steps(r"3*5=15:7,15;15+7=22:22;\boxed{3*5+7}")) == 1
    with pytest.raises(ValueError, match="out of reach"):
        solve((3, 5, 7), 22, 20)


@pytest.mark.parametrize(("limit", "wrong"), [(59, 1), (60, None), (9999, None)])
def test_a_result_above_the_limit_is_wrong_even_when_the_next_one_is_not(limit, wrong):
    task = Countdown(CountdownSettings(largest=30, limit=limit))
    problem = problem_of([30, 30, 20], 40)
    response = r"30+30=60:20,60;60-20=40:40;\boxed{30+30-20}"
    assert task.first_wrong_step(problem, task.split_steps(response)) == wrong
    assert task.verify(problem, response).verdict is Verdict.PASS


def test_long_limits():
    """999*9 = 8991 and 8991-999 = 7992: four digits a number."""
    task = Countdown(CountdownSettings(level=4, largest=999, limit=9999))
    problem = problem_of([999, 9, 999], 7992)
    response = r"999*9=8991:999,8991;8991-999=7992:7992;\boxed{999*9-999}"
    assert task.verify(problem, response).process_correct
    for index in range(20):
        problem = task.problem("dev", index)
        assert task.verify(problem, task.solution(problem)).process_correct


def test_canonical_solution():
    assert TASK.solution(PROBLEM) == r"3*5=15:7,15;7+15=22:22;\boxed{7+3*5}"


@pytest.mark.parametrize("values", [{"level": 0}, {"level": 5}, {"largest": 50, "limit": 20}, {"colour": 1}])
def test_settings(values):
    with pytest.raises(ValidationError):
        CountdownSettings(**values)
