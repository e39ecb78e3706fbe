"""What algebra decides behind the rules, and the data sets' own answers."""

import itertools
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mulligan.verify.judge import judge, quick

DATA = Path(__file__).parents[3] / "shared" / "data"
RIGHT = [
    (r"-\frac{1}{2}x+3", r"3-\frac{x}{2}"),
    (r"(2,\infty)", r"(2,+\infty)"),
    ("x^2-y=0", "y=x^2"),
    ("2x+4y=6", "x+2y=3"),
    (r"\frac{x^2}{4}+\frac{y^2}{9}=1", "9x^2+4y^2=36"),
    ("3+4i", "4i+3"),
    (r"\sqrt{-4}", "2i"),
    (r"\cos\theta", r"\cos(\theta)"),
    ("x^{1/2}", r"\sqrt{x}"),
    ("|x|", r"\sqrt{x^2}"),
    (r"\ln(x^2)", r"\ln x^2"),
    ("e^{2x}", "(e^x)^2"),
    (r"\frac{a}{b}", "a/b"),
    (r"2\sqrt3", r"\sqrt{12}"),
    (r"\sqrt{12}", "2√3"),
    ("x+1", "1+x"),
    ("(x+1)^2", "x^2+2x+1"),
    ("6-5i", "-5i+6"),
    ("y=2x+1", "2x-y+1=0"),
    ("p - q", "-q+p"),
    (r"\cot x", r"\frac{\cos x}{\sin x}"),
    (r"\frac{\pi}{4}", r"\pi/4"),
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
    (r"\tan^2(y)+1", r"\sec^2(y)"),
    ("5x - 7y + 11z + 4 = 0", "-5x+7y-11z-4=0"),
    ("5r^5", "5 r^{5}"),
    (r"\frac{11+9a}{20}", r"\frac{11}{20}+\frac{9a}{20}"),
    (r"11 \sqrt{5} + 11", r"11(1+\sqrt 5)"),
    ("x^2", "x²"),
    (r"\frac{\sqrt2}{2}", "√2/2"),
    (r"2\pi", "2*pi"),
    (r"2\sqrt{3}", "2*sqrt(3)"),
    (r"\frac{1+\sqrt5}{2}", "(1+sqrt(5))/2"),
    ("x^{10}", "x^10"),
    ("x<1", "-x>-1"),
    ("x^2+y^2=1", "y^2+x^2=1"),
    ("x^2+y^2=1", "2x^2+2y^2=2"),
    ("y=2x+3", "y=3+2x"),
    (r"\frac{x}{2}", "0.5x"),
    (r"\frac{x}{2}", "x/2"),
    ("2x(x+1)", "2x^2+2x"),
    ("e^2", "e^{2}"),
    (r"\ln 2", r"\ln(2)"),
    (r"2\ln 2", r"\ln 4"),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}"),
    ("1+i", "i+1"),
    ("-2 + 7i", "7i-2"),
    (r"\frac{1}{1+i}", r"\frac{1-i}{2}"),
    (r"\infty", r"+\infty"),
    ("2^{100}", "4^{50}"),
    ("2^{10}", "1024"),
    ("3^2x", "9x"),
    ("x_1+x_2", "x₁+x₂"),
    ("a_{n}", "a_n"),
    (r"(\frac{1}{2},\sqrt{8})", r"(0.5, 2\sqrt{2})"),
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
    (r"\frac{\pi^2}{6}", r"\pi^2/6"),
    (r"\sin x", r"\sin(x)"),
    (r"\sin 2x", r"2\sin x\cos x"),
    ("x^2+2x+1", "(x+1)^{2}"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    # A union in other pieces, a sum where the gold answer has one, and factors in another order.
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,1)\cup[1,2)\cup(3,\infty)"),
    (r"\{x+1, \sqrt{8}\}", r"\{2\sqrt{2}, 1+x\}"),
    (r"\sum_{k=1}^{n} k", r"\sum_{k=1}^{n}(k)"),
    ("2xy", "2yx"),
    ("x+y<1", "-1<-x-y"),
    ("xy", r"y \cdot x"),
]
WRONG = [
    ("x+1", "2x+2"),
    (r"\pi", r"\frac{22}{7}"),
    (r"\pi", r"\frac{355}{113}"),
    (r"\pi", r"180^\circ"),
    ("x^2=4", "x=2"),
    ("y=x^2", "y=-x^2"),
    ("2x+4y=6", "x+2y=4"),
    ("i", "-i"),
    ("3+4i", "5"),
    (r"\cos\theta", r"\sin\theta"),
    ("x^2", r"\sqrt{x^4}+x-x+1"),
    ("x", "|x|"),
    ("x", r"\sqrt{x^2}"),
    (r"\frac{a}{b}", "b/a"),
    (r"\sqrt2", r"\x41"),
    (r"\pi", "3.14159265"),
    ("(x+1)^2", "x^2+2x+2"),
    ("y=2x+1", "2x-y+2=0"),
    (r"\sqrt{2}", "1.41421356237"),
    (r"2\pi", "6.2832"),
    ("x<1", "-x>1"),
    ("x^2+y^2=1", "x^2+y^2=2"),
    ("y=2x+3", "y=2x-3"),
    ("x", "-x"),
    ("e", "2.718281828"),
    ("1+i", "1-i"),
    ("i", "1"),
    (r"\infty", r"-\infty"),
    (r"\infty", "100000"),
    ("x+1", r"\frac{1}{0}+x"),
    (r"\sqrt{2}", r"\frac{1}{0}"),
    (r"\binom{10}{2}\pi", r"45\pi+1"),
    ("x^2-1", "(x-1)(x+1)+0.0000001"),
    # The first 60 digits of pi are not pi; two small numbers are not zero; x + 1/(2004!) is not x + 1/(2006!).
    (r"\pi", "3.14159265358979323846264338327950288419716939937510582097494459230781640628"),
    ("e^{-200}", "e^{-201}"),
    ("x e^{-200}", "x e^{-201}"),
    (r"\frac{\pi}{2^{99}}", r"\frac{\pi}{2^{98}}"),
    (r"\{x+1, \sqrt{8}\}", r"\{2\sqrt{2}, 2+x\}"),
    ("x+y<1", "-x-y<-1"),
    ("x^2+1=0", "x^2+2=0"),  # both without a real solution
]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_right(gold, answer):
    assert quick(gold, answer) is None or gold == "xy"
    judged = judge(gold, answer)
    assert judged.verdict == "correct", judged.reason


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_wrong(gold, answer):
    judged = judge(gold, answer)
    assert judged.verdict == "wrong", judged.reason


def test_what_the_rules_decide_needs_no_algebra():
    assert judge("7", "8=7") == quick("7", "8=7")


def test_a_gold_answer_that_cannot_be_read_is_unscorable():
    judged = judge(r"x \foo 2", "x+2")
    assert judged.verdict == "unscorable"
    assert "sympy" in judged.reason
    assert "\n" not in judged.reason
    assert judge("x+2", r"x \foo 2").verdict == "wrong"


WATCHED = """
import json, sys, types
package = types.ModuleType("mulligan")
package.__path__ = [sys.argv[1]]  # as in a worker: without mulligan/__init__.py, and so without torch
sys.modules["mulligan"] = package
from mulligan.verify.judge import judge, warm
assert not {"sympy", "torch", "math_verify"} & set(sys.modules), "loaded before it is asked for"
pairs = json.loads(sys.stdin.read())
warm()
seen = []
sys.addaudithook(lambda event, arguments: seen.append(f"{event} {arguments}") if event in ("open", "import") else None)
verdicts = [judge(gold, answer).verdict for gold, answer in pairs]
loud = list(seen)
print(json.dumps([verdicts, loud, "torch" in sys.modules]))
"""


def test_nothing_is_loaded_after_warming_up():
    pairs = RIGHT + WRONG
    assert len(pairs) >= 50
    mulligan = str(Path(__file__).parents[2] / "mulligan")
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, mulligan], input=json.dumps(pairs), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    verdicts, loud, torch = json.loads(done.stdout.splitlines()[-1])
    assert loud == []
    assert not torch
    assert verdicts == ["correct"] * len(RIGHT) + ["wrong"] * len(WRONG)


def rows(name: str) -> list[dict[str, str]]:
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def refused(pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [pair for pair in pairs if (quick(*pair) or judge(*pair)).verdict != "correct"]


def test_gsm8k():
    texts = [row["answer"] for row in rows("gsm8k/test.jsonl")]
    golds = [text.rpartition("####")[2].strip() for text in texts]
    assert len(golds) == 1319
    assert refused([(gold, gold) for gold in golds]) == []
    assert refused([(gold, f"\\boxed{{{gold}}}") for gold in golds]) == []
    assert refused(list(zip(golds, texts, strict=True))) == []
    assert refused(list(zip(texts, golds, strict=True))) == []


def test_math500():
    found = rows("math500/test.jsonl")
    assert len(found) == 500
    for form in ("{}", "\\boxed{{{}}}", "${}$", "The answer is ${}$."):
        assert refused([(row["answer"], form.format(row["answer"])) for row in found]) == [], form
    assert refused([(row["answer"], row["solution"]) for row in found]) == []
    assert refused([(row["solution"], row["answer"]) for row in found]) == []


def test_math_training_answers():
    answers = random.Random(0).sample([row["answer"] for row in rows("math/train.json") if row["answer"]], 500)
    assert refused([(answer, answer) for answer in answers]) == []
    assert refused([(answer, f"\\boxed{{{answer}}}") for answer in answers]) == []


def test_golds_of_different_problems_are_seldom_equal():
    # Numbers repeat, so the different texts are compared: each with its neighbour in order.
    answers = sorted({row["answer"] for row in rows("math500/test.jsonl")})
    judged = [judge(one, two) for one, two in itertools.pairwise(answers)]
    equal = [one.reason for one in judged if one.verdict == "correct"]
    assert equal == ["the same number"] * 4  # 36 and 36 degrees, and the like


def test_the_documented_examples():
    page = Path(__file__).parents[2] / "docs" / "verifier.md"
    checked = 0
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [re.findall("`([^`]+)`", cell) for cell in line.split("|")]
        if len(cells) != 5 or not cells[1]:
            continue
        for verdict, answers in (("correct", cells[2]), ("wrong", cells[3])):
            for answer in answers:
                assert judge(cells[1][0], answer).verdict == verdict, (cells[1][0], answer)
                checked += 1
    assert checked > 100


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("2^{1000}", "2^{1000}+1", "wrong"),
        ("2^{1000}", "4^{500}", "correct"),
        (r"2^{1000}\pi", r"(2^{1000}+1)\pi", "wrong"),
        ("e^x", "e^x+10^{-300}", "wrong"),
        (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}", "correct"),
    ],
)
def test_a_small_difference_between_large_numbers(gold, answer, verdict):
    """Equal to 60 digits is not equal: 2^1000 has 302."""
    assert judge(gold, answer).verdict == verdict


@pytest.mark.parametrize(("gold", "answer"), [("2x", "x2"), ("x^2", "x2"), ("2x+1", "x2+1")])
def test_a_digit_behind_a_letter_is_no_product(gold, answer):
    assert judge(gold, answer).verdict == "wrong"
    assert judge(answer, answer).verdict == "correct"


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("2,4", "2,4,...", "wrong"),
        ("2,4,...", "2,4", "wrong"),
        ("0.3", "0.3...", "wrong"),
        (r"1,2,\ldots", r"1,2,\ldots", "correct"),
        ("7", "well...\n#### 7", "correct"),
        ("7", "()", "wrong"),
        ("7", "$()$", "wrong"),
    ],
)
def test_what_goes_on_and_what_is_empty(gold, answer, verdict):
    assert judge(gold, answer).verdict == verdict
