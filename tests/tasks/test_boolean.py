import pytest
from pydantic import ValidationError

from mulligan.tasks.boolean import Boolean, BooleanSettings, reductions, show
from mulligan.tasks.expressions import Leaf, Node, boolean
from mulligan.types import Problem

TASK = Boolean()
PROBLEM = Problem(
    task="boolean", split="train", index=0, prompt="(T&F)|!T?", answer="F", data={"expression": "(T&F)|!T"}
)


@pytest.mark.parametrize(
    ("response", "wrong"),
    [
        (r"F|!T;F|F;F;\boxed{F}", None),
        (r"(T&F)|F;F|F;F;\boxed{F}", None),  # another order
        (r"T&F|F;(F)|F;F;\boxed{F}", None),  # other parentheses, the same tree
        (r"T|!T;T|F;T;\boxed{T}", 1),  # T&F is not T
        (r"F|!T;F|T;T;\boxed{T}", 2),
        (r"F|!T;F|F;T;\boxed{T}", 3),
        (r"F|!T;F|F;F;\boxed{T}", 4),
        (r"F|F;F;\boxed{F}", 1),  # two reductions at once
        (r"F|!T;!T;F;\boxed{F}", 2),  # a short circuit
        (r"(T&F)|!T;F|!T;F|F;F;\boxed{F}", 1),  # no reduction at all
        (r"F|!T;F|F;\boxed{F}", 3),  # a step is missing
        (r"\boxed{F}", 1),
        (r"F|!T;F|F;F;F;\boxed{F}", 4),
        (r"F|!T;F|F;F;", 3),  # truncated
        ("F|!T;F|", 2),
        ("F|!", 1),
        ("", 1),
        (r"F|!T;F|F;F;so \boxed{F}", 4),
        (r"F|!T;;F|F;F;\boxed{F}", 2),
        (r"\boxed{F};F|!T;F|F;F;\boxed{F}", 1),
    ],
)
def test_oracle(response, wrong):
    assert TASK.first_wrong_step(PROBLEM, TASK.split_steps(response)) == wrong


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("T", []),
        ("!F", ["T"]),
        ("T|F", ["T"]),
        ("(T&F)|!T", ["F|!T", "(T&F)|F"]),
        ("!(T&!F)", ["!(T&T)"]),
        ("T&F&T", ["F&T"]),
        ("!!T", ["!F"]),
    ],
)
def test_reductions(text, wanted):
    assert [show(tree) for tree in reductions(boolean(text))] == wanted


def test_canonical_solution():
    assert TASK.solution(PROBLEM) == r"F|!T;F|F;F;\boxed{F}"


def test_answers():
    assert TASK.correct(PROBLEM, " F ")
    assert not TASK.correct(PROBLEM, "T")
    assert not TASK.correct(PROBLEM, "F|F")
    assert TASK.equivalent(PROBLEM, "T", "T ")
    assert TASK.extract("F;") is None


@pytest.mark.parametrize("level", range(1, 7))
def test_level_counts_operators(level):
    task = Boolean(BooleanSettings(level=level))
    for index in range(30):
        text = task.problem("train", index).data["expression"]
        assert sum(map(text.count, "&|!")) == level + 2
        assert show(boolean(text)) == text


def every_tree(size):
    if size == 0:
        return [Leaf(False), Leaf(True)]
    pairs = [(a, b) for n in range(size) for a in every_tree(n) for b in every_tree(size - 1 - n)]
    return [Node("!", (a,)) for a in every_tree(size - 1)] + [Node(op, pair) for op in "&|" for pair in pairs]


def test_why_level_1_has_three_operators():
    """E(n) = E(n-1) + 2 sum E(k) E(n-1-k), E(0) = 2: 2 + 2*4 = 10, 10 + 2*(2*20) = 90, 90 + 2*(2*180 + 100) = 1010.

    Each has a text of its own, which reads back as the same tree."""
    for size, count in ((1, 10), (2, 90), (3, 1010)):
        trees = every_tree(size)
        texts = {show(tree) for tree in trees}
        assert len(trees) == len(texts) == count
        assert all(boolean(show(tree)) == tree for tree in trees)


@pytest.mark.parametrize("level", [0, 7])
def test_levels(level):
    with pytest.raises(ValidationError):
        BooleanSettings(level=level)
