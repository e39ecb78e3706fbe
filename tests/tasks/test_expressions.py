from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.tasks.expressions import (
    MAX_DEPTH,
    MAX_MAGNITUDE,
    ExpressionError,
    arithmetic,
    boolean,
    canonical,
    operators,
    show_arithmetic,
)


@pytest.mark.parametrize(
    ("text", "value", "integers"),
    [
        ("7", 7, (7,)),
        ("1+2*3", 7, (1, 2, 3)),
        ("(1+2)*3", 9, (1, 2, 3)),
        ("9-5-3", 1, (9, 5, 3)),
        ("8/4/2", 1, (8, 4, 2)),
        ("1/3+1/6", Fraction(1, 2), (1, 3, 1, 6)),
        ("-(2+3)*--4", -20, (2, 3, 4)),
        (" 1 + 2 ", 3, (1, 2)),
        ("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH, 1, (1,)),
        ("+".join("1" * 100), 100, (1,) * 100),
    ],
)
def test_arithmetic(text, value, integers):
    read = arithmetic(text)
    assert (read.value, read.integers) == (value, integers)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            " ",
            "+",
            "1+",
            "(1",
            "1)",
            "()",
            "1 2",
            "+1",
            "1**2",
            "2^3",
            "1.5",
            "x",
            "1+٣",
            "1e9",
            "__import__('os')",
        ),
        *("1/0", "1/(2-2)", str(MAX_MAGNITUDE + 1), "9*" * 20 + "9", "1" * 201, "1/9999999/9999999"),
        "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1),
        "-" * (MAX_DEPTH + 2) + "1",
    ],
)
def test_arithmetic_refuses(text):
    with pytest.raises(ExpressionError):
        arithmetic(text)


def test_boolean_precedence():
    assert boolean("T|F&!F") == boolean("T|(F&(!F))") != boolean("(T|F)&!F")
    assert boolean("T&F&T") == boolean("(T&F)&T") != boolean("T&(F&T)")
    assert operators(boolean("!T|F")) == {"!", "|"}


@pytest.mark.parametrize("text", ["", "T F", "t", "T&", "!", "TF", "(T", "1", "T^F", "!" * 60 + "T"])
def test_boolean_refuses(text):
    with pytest.raises(ExpressionError):
        boolean(text)


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("3*5+7", "7+5*3", True),
        ("3+(5+7)", "7+3+5", True),
        ("7-5", "5-7", False),
        ("7-5-3", "7-(5-3)", False),
        ("2*(3+4)", "2*3+4", False),
        ("((3))", "3", True),
        ("-3", "3", False),
    ],
)
def test_canonical(left, right, same):
    assert (canonical(arithmetic(left).tree) == canonical(arithmetic(right).tree)) is same


def trees(leaf):
    return st.recursive(leaf, lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner), max_leaves=8)


def written(tree):
    return str(tree) if isinstance(tree, int) else f"({written(tree[0])}{tree[1]}{written(tree[2])})"


@given(trees(st.integers(0, 9)))
def test_showing_keeps_value_and_literals(tree):
    text = written(tree)
    try:
        read = arithmetic(text)
    except ExpressionError:  # a division by zero, or too long
        return
    again = arithmetic(show_arithmetic(read.tree))
    assert (again.value, again.integers) == (read.value, read.integers)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("((3*5)+7)", "3*5+7"),
        ("(9+(5-3))", "9+5-3"),
        ("(9-(5-3))", "9-(5-3)"),
        ("(9-(5*3))", "9-5*3"),
        ("((1+2)*(3*4))", "(1+2)*3*4"),
    ],
)
def test_showing_is_minimal(text, shown):
    assert show_arithmetic(arithmetic(text).tree) == shown


@given(st.text(alphabet="0123456789+-*/()TF&|! x\\", max_size=60))
def test_garbage_raises_only_the_one_error(text):
    for read in (arithmetic, boolean):
        try:
            read(text)
        except ExpressionError as error:
            assert str(error)
