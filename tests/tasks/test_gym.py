"""Reasoning-gym's problems behind the guard. The whole audit is ``benchmarks/gym_audit.py``; here, a sample of it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.errors import UserError
from mulligan.tasks import build_task, gym, gym_score
from mulligan.tasks.base import BUCKETS
from mulligan.tasks.gym_score import FLOOR, LONGEST, bare, same
from mulligan.tasks.gym_table import EXACT, EXCLUDED, OWN_SCORER
from mulligan.types import Verdict
from mulligan.verify import pool
from mulligan.verify.pool import Outcome

reasoning_gym = pytest.importorskip("reasoning_gym")
from reasoning_gym.factory import DATASETS  # noqa: E402

AUDIT = Path(__file__).parents[2] / "benchmarks" / "gym_audit.py"
# Whose scorers evaluate the model's answer in 0.1.25, found by hand.
NINE = (
    *("string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown", "puzzle24", "simple_integration"),
    *("intermediate_integration", "polynomial_multiplication"),
)
SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # sums of two digits
HANOI = {"min_disks": 2, "max_disks": 2, "min_pegs": 3, "max_pegs": 3}


def task(dataset, seed=0, **config):
    return build_task("reasoning-gym", {"dataset": dataset, "config": config, "seed": seed})


# --- the allow-list -------------------------------------------------------------------------------------


def test_the_table_names_every_data_set_once():
    listed = [*EXACT, *OWN_SCORER, *EXCLUDED]
    assert len(listed) == len(set(listed))
    assert set(listed) == set(DATASETS)


def test_the_page_lists_the_table():
    page = (AUDIT.parents[1] / "docs" / "reasoning-gym.md").read_text()
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("|")]
    for names, head in (
        (EXACT, f"compared as texts ({len(EXACT)})"),
        (OWN_SCORER, f"in the worker ({len(OWN_SCORER)})"),
    ):
        assert [set(right.replace("`", "").split()) for left, right in rows if left.strip().endswith(head)] == [names]
    out = {name: right.strip() for left, right in rows for name in left.replace("`", "").split() if name in EXCLUDED}
    assert out == EXCLUDED


@pytest.mark.parametrize("name", [*NINE, "game_of_life_halting", "complex_arithmetic", "ransom_note"])
def test_broken_ones_are_refused_with_the_reason(name):
    with pytest.raises(UserError, match=f"task.dataset: '{name}' is not offered: it") as error:
        task(name)
    assert "\n" not in str(error.value)


def test_no_offered_scorer_evaluates_and_all_nine_do():
    spec = importlib.util.spec_from_file_location("gym_audit", AUDIT)
    assert spec is not None and spec.loader is not None
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)
    assert all(audit.evaluates(DATASETS[name][0]) for name in NINE)
    assert not any(audit.evaluates(DATASETS[name][0]) for name in OWN_SCORER)


def test_the_audit_finds_what_the_table_says():
    """Of eight data sets: their items under two hash seeds, their source, junk, hostile answers and golds."""
    names = {
        "basic_arithmetic": "exact",
        "chain_sum": "exact",
        "tower_of_hanoi": "own scorer",
        "self_reference": "own scorer",
        "string_insertion": "out",
        "game_of_life_halting": "out",
        "complex_arithmetic": "out",
        "isomorphic_strings": "out",
    }
    done = subprocess.run([sys.executable, AUDIT, "--json", *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["dataset"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert {name: row["mode"] for name, row in rows.items()} == names
    assert rows["string_insertion"]["events"] == "its scorer evaluates the answer"
    assert rows["game_of_life_halting"]["junk"]["junk"][0] == 1.0
    assert rows["complex_arithmetic"]["junk"]["NaN"][0] == 1.0
    assert [name for name, row in rows.items() if not row["same_items"]] == ["isomorphic_strings"]


# --- problems and splits --------------------------------------------------------------------------------


def test_neighbouring_seeds_of_the_library_share_their_items():
    """Why we do not take the library's own seeds: item i of seed s is item i + 1 of seed s - 1."""
    zero, one = (
        [item["question"] for item in reasoning_gym.create_dataset("chain_sum", seed=s, size=50)] for s in (0, 1)
    )
    assert zero[1:] == one[:-1]


def test_no_question_stands_in_two_splits_whatever_the_seeds():
    """200 sums of two digits there are at most, so 300 problems a split meet nearly all that the split may have."""
    asked = {
        split: {
            task("chain_sum", seed, **SMALL).problem(split, i).data["question"] for seed in (0, 1) for i in range(150)
        }
        for split in BUCKETS
    }
    assert all(len(questions) > 10 for questions in asked.values())
    assert sum(map(len, asked.values())) == len(set.union(*asked.values()))


def test_case_and_blanks_make_no_other_question(monkeypatch):
    built = task("chain_sum", **SMALL)
    item = {"question": "What is 1 + 2?", "answer": "3", "metadata": {}}
    monkeypatch.setattr(built, "_item", lambda seed: item)
    first = built.draw(gym.Random(0), "train")[0]
    item["question"] = " what IS 1 +  2?\n"
    assert built.draw(gym.Random(0), "train")[0] == first


def test_a_problem_is_a_pure_function():
    forwards = [task("self_reference").problem("dev", i) for i in range(4)]
    again = task("self_reference")
    assert [again.problem("dev", i) for i in reversed(range(4))][::-1] == forwards
    assert [task("self_reference", 1).problem("dev", i) for i in range(4)] != forwards
    assert again.problem("dev", 2).uid == "reasoning-gym/dev/2"
    json.dumps(forwards[0].data)


def test_a_seed_that_the_data_set_gives_up_on_is_passed_over(monkeypatch):
    built = task("chain_sum")
    make, asked = built._item, []

    def fails_at_first(seed):
        asked.append(seed)
        if len(asked) < 3:
            raise UserError("given up")
        return make(seed)

    monkeypatch.setattr(built, "_item", fails_at_first)
    assert built.draw(gym.Random(0), "train")[1].answer == make(asked[2])["answer"]
    assert len(set(asked)) == 3


def test_texts_are_those_of_other_questions():
    built = task("chain_sum")
    problem = built.problem("train", 0)
    question = problem.data["question"]
    finish = "Please reason step by step, and put your final answer within \\boxed{}."
    assert built.prompt(problem) == f"{question}\n{finish}"
    assert built.hint(problem, []) == f"{question}\n{finish}"
    assert built.hint(problem, ["7"]).startswith(f"{question}\nHint: possible incorrect answers include 7.")
    assert f"Problem: {question}" in built.diagnosis(problem, ["a", "b"])
    assert built.split_steps("a\n\nb") == ["a\n\n", "b"] and built.english


# --- comparing texts ------------------------------------------------------------------------------------

SAME = [
    ("Yes", "yes"), ("-4", "-4.0"), ("1000", "1,000"), ("[1, 2]", "[1,2]"), ("0 1\n1 0", " 0  1\n\n1 0 \n"),
    ("three, Mars, the", "three,Mars,the"), ("Ann is a fool, and Bo is a sage.", "Ann is a fool, and Bo is a sage"),
]  # fmt: skip
OTHER = [
    ("12", "12 or 13"), ("12", "1212"), ("12", "x 12"), ("12", "12.4"), ("12", ""), ("", ""), ("5, 120", "5120"),
    ("0 1\n1 0", "0 1 1 0"), ("0 1\n1 0", "0 1\n1 0\n0 0"), ("Yes", "Yes No"), ("nan", ""),
    ("12", "{12}x"), ("7", "8=7"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_same(gold, answer):
    assert same(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), OTHER)
def test_other(gold, answer):
    assert not same(gold, answer)


def test_bare():
    assert bare(r" $\text{Yes}$ ") == bare(r"\( Yes \)") == bare("`Yes`") == "Yes"
    assert bare(r"\text{a} or \text{b}") == r"\text{a} or \text{b}"
    assert bare("$a$ or $b$") == "$a$ or $b$"
    assert bare("") == ""


@given(st.text(max_size=60) | st.text(alphabet="\\text{}$`()[] ab1,.\n", max_size=60))
def test_comparing_never_raises_and_junk_around_the_gold_is_never_paid(text):
    assert not same("314159", bare(text) + " 314159 " + "z")
    bare(text)


# --- grading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["basic_arithmetic", "chain_sum", "gsm_symbolic", "mini_sudoku", "self_reference", "jugs"]
)
def test_golds_are_right_and_junk_is_not(name):
    """In both ways of comparing. The library itself pays for '12 or something else': a part, and 1 in gsm_symbolic."""
    built = task(name)
    problem = built.problem("test", 0)
    gold = problem.answer
    junk = ["x", "[]", f"{gold} or something else", f"{gold}{gold}", problem.data["question"], "1 2 3 4 5 6 7 8 9"]
    responses = [f"So \\boxed{{{gold}}}.", *(f"\\boxed{{{text}}}" for text in junk), gold]
    right, *wrong = built.grade(problem, responses)
    assert (right.verdict, right.reward, right.reason) == (Verdict.PASS, 1.0, "right")
    assert [(g.verdict, g.reward) for g in wrong] == [(Verdict.FAIL, 0.0)] * (len(junk) + 1)
    assert wrong[-1].reason == "no final answer"
    hedged = built.verify(problem, f"\\boxed{{{gold}}} \\boxed{{xy}} \\boxed{{{gold}}}")
    assert (hedged.reward, hedged.reason) == (0.0, "several different final answers")
    assert built.verify(problem, built.solution(problem)).verdict is Verdict.PASS
    assert built.correct(problem, gold) and not built.correct(problem, "x")


def test_a_detour_is_paid_in_part_and_does_not_pass():
    """Two disks, three moves: a, then t, then a onto it. The detour sends disk 1 by way of the target: 4 moves, 3/4."""
    built = task("tower_of_hanoi", **HANOI)
    problem = built.problem("train", 0)
    first, second, third = problem.answer.split("\n")
    start, target = second.split(" Peg ")[1][0], second[-1]
    detour = [f"Move disk 1 from Peg {start} to Peg {target}", f"Move disk 1 from Peg {target} to Peg {first[-1]}"]
    longer = "\n".join([*detour, second, third])
    half_way = "\n".join([first, second])  # not solved; the library pays 0.05, which is nothing
    grades = built.grade(problem, [f"\\boxed{{{text}}}" for text in (problem.answer, longer, half_way)])
    assert [g.reward for g in grades] == [1.0, 0.75, 0.0]
    assert [g.verdict for g in grades] == [Verdict.PASS, Verdict.FAIL, Verdict.FAIL]
    assert grades[1].reason == "partly right, 0.75"


def test_no_text_of_the_model_reaches_the_library_here(monkeypatch):
    """The scorer of this process is broken, and the verdicts stay: they come from the worker."""

    def never(*_):
        raise AssertionError("a scorer was called in the user's process")

    for name in OWN_SCORER:
        monkeypatch.setattr(DATASETS[name][0], "score_answer", never)
    built = task("self_reference")
    problem = built.problem("train", 0)
    assert [g.reward for g in built.grade(problem, [built.solution(problem), "\\boxed{99}"])] == [1.0, 0.0]


class DeadPool:
    """A pool whose workers die on everything that holds a Q."""

    def run(self, function, arguments):
        assert function == "gym"
        return [
            Outcome(None, "out of time (5 s)", 5.0, 0) if "Q" in each["answer"] else Outcome(0.5, "", 0.1, 0)
            for each in arguments
        ]


def test_what_cannot_be_scored_is_neither_right_nor_wrong(monkeypatch):
    monkeypatch.setattr(pool, "shared_pool", DeadPool)
    built = task("jugs")
    grades = built.grade(built.problem("train", 0), ["\\boxed{Q}", "none", "\\boxed{r}"])
    assert [g.verdict for g in grades] == [Verdict.UNSCORABLE, Verdict.FAIL, Verdict.FAIL]
    assert [g.reward for g in grades] == [0.0, 0.0, 0.5]
    assert [g.reason for g in grades] == ["out of time (5 s)", "no final answer", "partly right, 0.5"]


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (1.0, 1.0),
        (True, 1.0),
        (3, 1.0),
        (0.5, 0.5),
        (FLOOR, 0.0),
        (0.01, 0.0),
        (-1.0, 0.0),
        (float("nan"), 0.0),
        (float("inf"), 0.0),
    ],
)
def test_what_a_scorer_says(said, score, monkeypatch):
    monkeypatch.setitem(gym_score._scorers, "jugs", lambda answer, item: said)
    assert gym_score.score("jugs", {}, "a") == score
    assert gym_score.score("jugs", {}, "a" * (LONGEST + 1)) == 0.0


def test_what_a_scorer_stumbles_over_is_wrong(monkeypatch):
    def stumble(answer, item):
        raise {"deep": RecursionError, "odd": ValueError}[answer]

    monkeypatch.setitem(gym_score._scorers, "jugs", stumble)
    assert gym_score.score("jugs", {}, "odd") == 0.0
    with pytest.raises(RecursionError):  # the worker's affair
        gym_score.score("jugs", {}, "deep")


# --- settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "task.dataset: reasoning-gym has no default for it"),
        ({"dataset": "chain_sun"}, r"task.dataset: 'chain_sun' is unknown \(did you mean 'chain_sum'\?\)"),
        (
            {"dataset": "chain_sum", "config": {"min_trems": 1}},
            r"chain_sum has no such setting \(did you mean 'min_terms'",
        ),
        ({"dataset": "chain_sum", "config": {"min_terms": 0}}, "min_terms must be positive"),
        ({"dataset": "chain_sum", "config": {"min_terms": "two"}}, "task.config: chain_sum does not work with"),
        ({"dataset": "chain_sum", "config": {"seed": 1}}, "task.config.seed: .* task.seed"),
        ({"dataset": "chain_sum", "config": {"size": 1}}, "task.config.size"),
        ({"dataset": "chain_sum", "config": 3}, "task.config"),
        ({"dataset": "chain_sum", "step_delimiter": ""}, "task.step_delimiter"),
    ],
)
def test_bad_settings_are_one_line(settings, line):
    with pytest.raises(UserError, match=line) as error:
        build_task("reasoning-gym", settings)
    assert "\n" not in str(error.value)


def test_without_the_library_or_with_another(monkeypatch):
    monkeypatch.setattr(gym, "AUDITED", "0.0.1")
    with pytest.raises(UserError, match=r"audited in 0.0.1: pip install reasoning-gym==0.0.1"):
        task("chain_sum")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"needs another package: pip install 'mulligan\[gym\]'"):
        task("chain_sum")


def test_data_sets_print_nothing_here(capfd):
    task("bf").problem("train", 0)
    assert capfd.readouterr().out == ""
