import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.verify.answer import SEVERAL, boxes, equal, final_answer, normalise

SAME = [
    ("3/2", "1 1/2"),
    ("72", "72"),
    ("72", "72."),
    ("72", " $72$ "),
    ("72", r"\(72\)"),
    ("72", r"\$72"),
    ("-5", "-$5"),
    ("-5", "−5"),
    ("-5", "- 5"),
    ("1000", "1,000"),
    ("1,000", "1, 000"),
    ("1000", r"1{,}000"),
    ("10000", r"10,\!000"),
    ("1,234,567.5", "1234567.50"),
    ("0.5", ".5"),
    ("0.5", "1/2"),
    ("0.5", r"\frac{1}{2}"),
    ("-1/2", r"-\dfrac{1}{2}"),
    ("-1/2", r"\frac{-1}{2}"),
    ("3/2", r"\frac32"),
    ("2/4", "1 / 2"),
    ("7", "+7"),
    ("007", "7"),
    ("east", r"\text{east}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
    (r"70 \sqrt{2}", r"70\sqrt2"),
    (r"\cot x", r"$\cot  x$"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("x = 5", "x=5"),
    (r"20 \%", "20%"),
]
DIFFERENT = [
    ("7", "8=7"),
    ("7", "8"),
    ("10", r"10\%"),
    ("0.1", "10%"),
    ("2e-7", "1e-7"),
    ("0.3333333", "1/3"),
    ("11/2", "1 1/2"),
    ("11/2", r"1 \, 1/2"),
    ("35", r"3\quad\ 5"),
    ("35", r"3\text{ } 5"),
    ("35", "3 5"),
    ("35", "3, 5"),
    ("5", "x=5"),
    ("5", "5 cm"),
    ("12", "1$2"),
    ("4", "2+2"),
    ("8", "2^3"),
    ("1", "1/0"),
    ("1/0", "2/0"),
    ("1", "0,001"),
    ("25", "2,5"),
    ("3", "٣"),
    ("2", "²"),
    ("", ""),
    ("5", ""),
    ("$", "$"),
    ("Evelyn", "evelyn"),
    ("x+1", "1+x"),
    ("1", r"\sum_{k=1}^{1} k"),
    ("9" * 5000, "9" * 4999),
]


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_same(gold, answer):
    assert equal(gold, answer)
    assert equal(answer, gold)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold, answer):
    assert not equal(gold, answer)
    assert not equal(answer, gold)


@pytest.mark.parametrize(
    ("response", "found"),
    [
        ("none", []),
        (r"\boxed{3}", ["3"]),
        (r"\boxed {3}", ["3"]),
        (r"\boxed{\frac{1}{2}}", [r"\frac{1}{2}"]),
        (r"\boxed{\{1,2\}}", [r"\{1,2\}"]),
        (r"\boxed{\left\{ x \right.}", [r"\left\{ x \right."]),
        (r"\boxed{3} then \boxed{4", ["3"]),
        (r"\boxed{ then \boxed{4}", ["4"]),
        (r"\boxed{\boxed{4}}", ["4"]),
        (r"within \boxed{} I put \boxed{5}", ["5"]),
        (r"{ \boxed{5} } } \boxed{5}", ["5", "5"]),
    ],
)
def test_boxes(response, found):
    assert boxes(response) == found


def test_hedging_is_no_answer():
    assert final_answer(r"\boxed{3} or \boxed{4}") == (None, SEVERAL)
    assert final_answer(r"\boxed{0.5}, that is \boxed{\frac12}") == (r"\frac12", "")
    assert final_answer("3") == (None, "no final answer")


@given(st.text(alphabet="0123456789,./-+$\\{}() \nfracboxedtext", max_size=100), st.text(max_size=40))
def test_garbage_never_raises(left, right):
    assert equal(left, right) == equal(right, left)
    assert equal(left, left) == bool(normalise(left))
    final_answer(left)


def test_long_garbage_is_quick():
    for text in (r"\boxed{" * 50_000, "{" * 100_000, "$" * 100_000, r"\boxed{1}" * 20_000, "\\frac{" * 50_000):
        final_answer(text)
        equal("1", text)
        equal("1", text[:2000])
