"""The corpus holds what it says, at the rates it says, and shares no problem with the other splits."""

from __future__ import annotations

import math

import pytest

from mulligan.base.corpus import Corpus, Rates, judge, write_chain
from mulligan.base.pretrain import RECIPES, load_recipe
from mulligan.seeds import rng_of
from mulligan.tasks.base import BUCKETS, bucket_of
from mulligan.tasks.chain import Chain, ChainSettings, apply

HALF = Rates(borrow=0.5, carry=0.5, times=0.5, drop=0.2)
KINDS = ["easy", "short", "default", "long", "one", "two", "alone", "hint", "judge", "countdown", "boolean"]


def test_a_row_is_a_pure_function_of_seed_and_index():
    mixture = dict.fromkeys(KINDS, 1.0)
    ahead, again = Corpus(3, HALF, mixture), Corpus(3, HALF, mixture)
    rows = [ahead.row(index) for index in range(60)]
    assert [again.row(index) for index in reversed(range(60))] == rows[::-1]
    assert [Corpus(4, HALF, mixture).row(index) for index in range(60)] != rows


def test_without_rates_every_chain_is_the_true_one():
    corpus = Corpus(0, Rates(), {"default": 1})
    task = corpus.chains["default"]
    for index in range(50):
        problem = task.problem("corpus", index)
        assert corpus.row(index).response == task.solution(problem)


def test_rows_of_the_other_tasks_are_right_in_every_step():
    """Whatever the rates; level 1 is twice as common as level 2: 200 of 300, four standard deviations are 33."""
    for kind, tasks, sizes in (("countdown", "countdowns", {2: 1, 3: 2}), ("boolean", "booleans", {3: 1, 4: 2})):
        corpus, levels = Corpus(5, HALF, {kind: 1}), []
        for index in range(300):
            row = corpus.row(index)
            question = row.context.split(">")[0]
            size = question.count(",") + 1 if kind == "countdown" else sum(map(question.count, "&|!"))
            levels.append(sizes[size])
            task = getattr(corpus, tasks)[levels[-1]]
            problem = task.problem("corpus", index)
            assert row.context == problem.prompt
            assert task.verify(problem, row.response).process_correct
        assert abs(levels.count(1) - 200) < 33


def test_wrong_procedures_act_at_their_rates():
    """Counts each procedure among the steps where it applies: within four standard deviations of its rate."""
    task, seen, wrong = Chain(ChainSettings()), dict.fromkeys("+-*", 0), dict.fromkeys("+-*", 0)
    dropped = 0
    for index in range(1500):
        problem = task.problem("corpus", index)
        steps = write_chain(task, problem, HALF, 1.0, rng_of(0, index))
        dropped += len(steps) == len(task.operations(problem))
        for step in steps[:-1]:
            _, work, result = step.rstrip(";").split("=")
            symbol = next(s for s in "+-*" if s in work)
            a, b = map(int, work.split(symbol))
            applies = {"-": a < b, "+": a + b >= 10, "*": a * b >= 10}[symbol]
            mistaken = {"-": (b - a) % 10, "+": (a + b + 1) % 10, "*": a * (b - 1) % 10}[symbol]
            right = apply(symbol, a, b, 10)
            if not applies:
                assert int(result) == right
            elif mistaken != right:  # 3-8 is 5 either way
                seen[symbol] += 1
                wrong[symbol] += int(result) == mistaken
    for symbol, n in seen.items():
        assert abs(wrong[symbol] / n - 0.5) < 4 * math.sqrt(0.25 / n), symbol
    assert abs(dropped / 1500 - 0.2) < 4 * math.sqrt(0.16 / 1500)


def test_a_hint_names_no_right_answer_and_is_not_written_again():
    corpus = Corpus(1, HALF, {"hint": 1})
    hinted = 0
    for index in range(300):
        row = corpus.row(index)
        if "!" in row.context:
            hinted += 1
            answers = row.context.split("!")[1].rstrip("~?").split(",")
            assert row.response.split("{")[1].rstrip("}") not in answers
    assert hinted > 150


def test_rows_alone_have_no_question():
    corpus = Corpus(1, HALF, {"alone": 1})
    assert all(corpus.row(index).context == "" and corpus.row(index).response for index in range(40))


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (["1x+y=3+8=1;", "2z*7=7*7=2;", "\\boxed{182}"], "1:3+8=1/1T2:7*7=2/9F\\boxed{2}"),
        (["1x+y=3+8=1;", "2z*7=7*7=9;", "\\boxed{189}"], "1:3+8=1/1T2:7*7=9/9T3:189T\\boxed{0}"),
        (["1x+y=3+8=1;", "2z*7=7*7=9;", "\\boxed{188}"], "1:3+8=1/1T2:7*7=9/9T3:188F\\boxed{3}"),
        (["1x+y=3+8=1;", "\\boxed{187}"], "1:3+8=1/1T2:F\\boxed{2}"),  # the last operation is missing
    ],
)
def test_judgements(steps, said):
    assert judge(["1x+y=3+8=1;", "2z*7=7*7=9;", "\\boxed{189}"], steps) == said


def test_the_corpus_owns_its_buckets_alone():
    held_out = BUCKETS["train"] | BUCKETS["dev"] | BUCKETS["test"]
    assert not BUCKETS["corpus"] & held_out
    task = Chain()
    for index in range(200):
        problem = task.problem("corpus", index)
        assert bucket_of("chain", f"10|{problem.prompt.rstrip('?')}") in BUCKETS["corpus"]


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="'jugde'"):
        Corpus(0, HALF, {"jugde": 1})


@pytest.mark.parametrize("name", [path.stem for path in RECIPES.glob("*.toml")])
def test_the_shipped_recipes_name_known_kinds(name):
    for phase in load_recipe(name).phases:
        assert Corpus(0, phase.rates, phase.mixture).row(0).response


@pytest.mark.parametrize("name", [path.stem for path in RECIPES.glob("*.toml")])
def test_the_shipped_recipes_and_logs_belong_together(name):
    """The log's learning rates are those of the recipe, from the first line to the last update."""
    import json

    recipe = load_recipe(name)
    lines = [json.loads(line) for line in (RECIPES.parent / "logs" / f"{name}.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(20, recipe.updates + 1, 20))
    for line in lines:
        assert line["learning_rate"] == pytest.approx(recipe.rate_at(line["update"] - 1), abs=1e-7)
        assert line["phase"] == recipe.phase_at(line["update"] - 1)
