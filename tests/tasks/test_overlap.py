"""What makes two questions the same, and how many stand in two places."""

import pytest

from mulligan.tasks import build_task
from mulligan.tasks.overlap import shared
from mulligan.tasks.rows import normalised
from tests.tasks.test_jsonl import rows_of, write


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("What is 2 + 2?", "what is  2+2 ?"),
        ("What is $2+2$?", "What is 2+2"),
        ("Find \\(x\\) with $\\dfrac12 x = 3$.", "Find $x$ with \\frac12 x=3"),
        ("Ann’s “first”", 'Ann\'s "first"'),
        ("ＡＢＣ １２", "abc 12"),
        ("$\\left( 3, 4 \\right)$", "(3,4)"),
        ("a\u00a0b\n\nc", "A b c"),
        ("It costs $5.", "It costs 5."),
    ],
)
def test_the_same_question(left, right):
    assert normalised(left) == normalised(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("What is 1 1/2?", "What is 11/2?"),
        ("What is 2 - 3?", "What is 2 + 3?"),
        ("x = -1", "x = 1"),
        ("What is 1.5?", "What is 15?"),
        ("a_1", "a_2"),
        ("\\leftarrow", "arrow"),
        ("ab", "a b"),
    ],
)
def test_another_question(left, right):
    assert normalised(left) != normalised(right)


def build(path, **splits):
    path.mkdir()
    for split, rows in splits.items():
        write(path / f"{split}.jsonl", rows)
    return build_task("jsonl", {"path": str(path)})


def test_shared(tmp_path):
    one = build(tmp_path / "a", train=rows_of(30), dev=rows_of(2, start=90), test=rows_of(5, start=100))
    spelled = [{"question": "what IS 3+1", "answer": "4"}, {"question": "What is 91 + 1?", "answer": "92"}]
    other = build(tmp_path / "b", test=[*rows_of(4, start=28), *spelled], train=rows_of(3, start=200))
    # 28 and 29 of the four, and 3 in another spelling; 91 stands in dev, which is not trained on.
    assert shared(one, other, "test") == 3
    assert shared(one, other, "test", 1) == 1
    assert shared(one, other, "test", 400) == 3
    assert shared(other, one, "test") == 0
    assert shared(one, one, "test") == 0


def test_shared_with_tasks_without_end(tmp_path):
    chain = build_task("chain", {"level": 2})
    assert shared(chain, chain, "test", 50) == 0
    asked = [{"question": chain.problem("train", i).prompt, "answer": "1"} for i in (0, 5, 1999)]
    # The first 2,000 are compared: all three are found.
    assert shared(chain, build(tmp_path / "a", test=[*asked, *rows_of(2)]), "test") == 3
