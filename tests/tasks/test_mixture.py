"""Mixtures: proportions, epochs, and that a response is read by its problem's own task."""

import tomllib
from collections import Counter
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.config import to_toml, validate
from mulligan.errors import UserError
from mulligan.measures import rollout_metrics
from mulligan.method import Method
from mulligan.models.tokenizer import pico_tokenizer
from mulligan.rollout import climb, fresh, rollout
from mulligan.sampling.scripted import ScriptedSampler
from mulligan.session import longest_prompt
from mulligan.tasks import build_task
from mulligan.tasks.mixture import LARGEST_BLOCK, _places
from mulligan.tasks.overlap import shared
from mulligan.texts import Texts
from tests.tasks.test_jsonl import questions, rows_of, write


def mixture(*parts, **more):
    return build_task("mixture", {"parts": list(parts), **more})


def folder(path, train=0, dev=0, test=0, start=0):
    path.mkdir()
    for at, (split, n) in enumerate({"train": train, "dev": dev, "test": test}.items()):
        if n:
            write(path / f"{split}.jsonl", rows_of(n, start=start + 1000 * at))
    return {"name": "jsonl", "path": str(path), "verifier": "exact"}


def labels(task, split, n):
    return [task.problem(split, i).task for i in range(n)]


def test_blocks_hold_exact_shares(tmp_path):
    part = folder(tmp_path / "a", train=20, dev=1, test=1)
    task = mixture({**part, "weight": 2}, {"name": "chain"})
    found = labels(task, "train", 300)
    # Two to one makes blocks of three places: two of the first part and one of the second in each.
    for start in range(0, 300, 3):
        assert Counter(found[start : start + 3]) == {"mixture/jsonl": 2, "mixture/chain": 1}
    assert len({tuple(found[start : start + 3]) for start in range(0, 300, 3)}) == 3  # every order comes
    assert found == labels(mixture({**part, "weight": 2}, {"name": "chain"}), "train", 300)
    assert found != labels(mixture({**part, "weight": 2}, {"name": "chain"}, seed=1), "train", 300)


def test_no_problem_comes_again_within_a_part_s_epoch(tmp_path):
    task = mixture({**folder(tmp_path / "a", train=20, dev=1, test=1), "weight": 2}, {"name": "chain"})
    part = task.parts()[0]
    mine = [p for p in (task.problem("train", i) for i in range(60)) if task.of(p) is part]
    asked = [p.data["question"] for p in mine]  # 40 of 60: two epochs of 20
    assert sorted(asked[:20]) == sorted(asked[20:]) == sorted(questions(part, "train"))
    assert asked[:20] != asked[20:]
    assert [p.data["question"] for p in mine] == [part.problem("train", i).data["question"] for i in range(40)]


def test_uids_are_unique_and_lead_back():
    task = mixture({"name": "chain", "level": 2}, {"name": "chain", "level": 4}, {"name": "boolean"})
    problems = [task.problem("train", i) for i in range(60)]
    assert len({p.uid for p in problems}) == 60
    assert {p.task for p in problems} == {"mixture/chain", "mixture/chain-2", "mixture/boolean"}
    for problem in problems:
        _, split, index = problem.uid.rsplit("/", 2)
        assert task.problem(split, int(index)) == problem  # as a run's log is read back
        own = task.of(problem)
        assert own.settings.level == {"chain": 2, "chain-2": 4, "boolean": 1}[problem.task.split("/")[1]]
        assert task.verify(problem, task.solution(problem)).process_correct
        assert task.prompt(problem) == own.prompt(problem)


def test_held_out_problems_interleave_until_all_are_spent(tmp_path):
    task = mixture(
        {**folder(tmp_path / "a", dev=4, test=9, train=3), "weight": 3},
        folder(tmp_path / "b", dev=1, test=6, train=3, start=5000),
    )
    assert [task.size(split) for split in ("train", "dev", "test")] == [None, 5, 15]
    found = labels(task, "test", 15)
    for start in (0, 4, 8):
        assert Counter(found[start : start + 4]) == {"mixture/jsonl": 3, "mixture/jsonl-2": 1}
    assert found[12:] == ["mixture/jsonl-2"] * 3  # 9 of 3 a block are spent after three blocks
    asked = [task.problem("test", i).data["question"] for i in range(15)]
    assert sorted(asked) == sorted(q for part in task.parts() for q in questions(part, "test"))
    again = mixture(*({"name": p.name, **p.model_extra, "weight": p.weight} for p in task.settings.parts))
    assert again.problem("test", 14) == task.problem("test", 14)  # whichever is asked first
    with pytest.raises(UserError, match="'test' has 15 problems, there is no problem 15"):
        task.problem("test", 15)
    with pytest.raises(UserError, match="no split 'corpus'"):
        task.size("corpus")


def test_a_part_without_end_fills_the_places_of_others(tmp_path):
    task = mixture(folder(tmp_path / "a", train=3, dev=2, test=2), {"name": "chain"})
    assert task.size("test") is None
    found = labels(task, "test", 30)
    assert Counter(found) == {"mixture/jsonl": 2, "mixture/chain": 28}
    assert len({task.problem("test", i).prompt for i in range(30)}) == 30


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 7.5, 1e-3, 1e3, 3.14159265]), min_size=1, max_size=5))
def test_places(weights):
    places = _places(weights)
    assert min(places) >= 1
    assert sum(places) <= LARGEST_BLOCK + len(weights)
    for place, weight in zip(places, weights, strict=True):
        assert place == pytest.approx(sum(places) * weight / sum(weights), abs=1 + 0.01 * sum(places))


def test_places_of_round_weights_are_exact():
    assert _places([2, 1]) == [2, 1]
    assert _places([0.7, 0.3]) == [7, 3]
    assert _places([0.5, 0.25, 0.25]) == [2, 1, 1]
    assert _places([1e6, 1]) == [1000, 1]  # 999.999 thousandths, and never none at all


def test_what_one_part_measures_no_other_part_trains_on(tmp_path):
    one = folder(tmp_path / "a", train=30, dev=2, test=2)
    two = folder(tmp_path / "b", train=3, dev=2, test=10, start=20)  # tests on 2020.., trains on 20, 21, 22
    write(tmp_path / "b" / "test.jsonl", rows_of(10, start=5))  # 5 to 14, which the first part trains on
    write(tmp_path / "b" / "dev.jsonl", rows_of(2, start=2000))  # and its dev rows stand in the first's test
    task = mixture(one, two)
    assert [part.size("train") for part in task.parts()] == [20, 3]
    assert [part.size("dev") for part in task.parts()] == [2, 0]
    assert task.left_out()["overlap"] == 12
    assert task.notes() == [
        f"{one['path']}: 10 of 30 training problems stand in dev or test and are left out",
        f"{two['path']}: 2 dev problems stand in test and are left out",
    ]
    assert shared(task, task, "test") == shared(task, task, "dev") == 0


def test_the_record_of_a_run_gives_the_same_mixture(tmp_path):
    task = mixture({**folder(tmp_path / "a", train=9, dev=1, test=1), "weight": 2}, {"name": "chain", "level": 2})
    written = to_toml({"task": {"name": "mixture", **task.settings.model_dump(mode="json")}})
    read = validate(tomllib.loads(written)).task
    again = build_task(read.name, read.settings)
    assert again.settings == task.settings
    assert again.problem("train", 17) == task.problem("train", 17)
    assert again.settings.parts[1].model_extra["registers"] == 3  # defaults are written out


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "task.parts: "),
        ([{"name": "chian"}], r"^task\.parts\[0\]\.name: 'chian' is unknown \(did you mean 'chain'"),
        ([{"name": "chain"}, {"name": "chain", "levle": 2}], r"^task\.parts\[1\]\.levle: chain has no such setting"),
        ([{"name": "chain", "weight": 0}], r"^task\.parts\.0\.weight: "),
        ([{"name": "chain", "weight": "2"}], r"^task\.parts\.0\.weight: "),
        ([{"weight": 1}], r"^task\.parts\.0\.name: "),
        ([{"name": "mixture", "parts": []}], r"^task\.parts\[0\]\.name: a mixture holds tasks, not mixtures"),
        ("chain", r"^task\.parts: "),
    ],
)
def test_errors(parts, message):
    with pytest.raises(UserError, match=message):
        build_task("mixture", {"parts": parts})


def test_a_part_needs_training_problems(tmp_path):
    task = mixture(folder(tmp_path / "a", test=3), {"name": "chain"})
    with pytest.raises(UserError, match=r"^task\.parts: 'jsonl' has no training problems$"):
        task.problem("train", 0)
    assert task.problem("test", 0) is not None


def test_steps_are_those_of_the_problem_s_own_task(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    write(path / "train.jsonl", [{"question": "1+1?", "answer": "2"}] * 3)
    part = {"name": "jsonl", "path": str(path), "verifier": "exact", "step_delimiter": "=", "instruction": "x"}
    task, tokenizer = mixture(part, {"name": "chain", "level": 2}), pico_tokenizer()
    texts = Texts(task, tokenizer)
    problems = {task.problem("train", i).task: task.problem("train", i) for i in range(4)}
    tokens = tuple(tokenizer.encode("1=2;3=4", add_special_tokens=False))
    assert texts.of(problems["mixture/jsonl"]).steps(tokens) == (["1=", "2;3=", "4"], [2, 6, 7])
    assert texts.of(problems["mixture/chain"]).steps(tokens) == (["1=2;", "3=4"], [4, 7])
    assert texts.task is task
    with pytest.raises(AssertionError, match=r"ask mixture\.of"):
        texts.steps(tokens)


def test_a_rollout_grades_each_problem_by_its_own_task_and_counts_by_part():
    task, tokenizer = mixture({"name": "chain", "level": 2}, {"name": "boolean"}), pico_tokenizer()
    texts = Texts(task, tokenizer)
    asked: list[list[str]] = []

    def look(problem, tree, ask):
        asked.append(ask.texts.steps(tree.samples[0].tokens)[0])
        yield ask.samples(1, origin="again")

    sampler = ScriptedSampler(tokenizer, lambda request, attempt: (task.solution(request.problem), "stop"))
    numbers = count()
    method = Method(name="two", passes=(fresh(2), look))
    forest = rollout(
        lambda: (i := next(numbers), task.problem("train", i)),
        4,
        method.passes,
        step=0,
        seed=0,
        texts=texts,
        sampler=sampler,
        grade=task.grade,
    )
    assert all(s.passed and s.grade.process_correct for s in forest.samples)
    assert ["".join(steps) for steps in asked] == [t.samples[0].text for t in forest.trees]
    numbers = rollout_metrics(forest)
    assert numbers["rollout/chain/pass"] == numbers["rollout/boolean/reward"] == 1.0
    alone = build_task("chain", {})
    tree = climb(
        [(0, alone.problem("train", 0))],
        (fresh(2),),
        seed=0,
        texts=Texts(alone, tokenizer),
        sampler=ScriptedSampler(tokenizer, lambda request, attempt: ("1", "stop")),
        grade=alone.grade,
    )
    assert not [key for key in rollout_metrics(type(forest)(0, tree)) if key.count("/") > 1]


def test_oracle_and_english_only_where_every_part_has_them(tmp_path):
    part = folder(tmp_path / "a", train=3)
    assert mixture({"name": "chain"}, {"name": "boolean"}).has_oracle
    assert not mixture({"name": "chain"}, part).has_oracle
    assert mixture(part).english
    assert not mixture({"name": "chain"}, part).english


def test_the_longest_prompt_of_any_part_is_found(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    rows = [{"question": "1", "answer": 1}] * 30 + [{"question": "9" * 300, "answer": 1}]
    write(path / "train.jsonl", rows)
    write(path / "dev.jsonl", rows_of(1))
    task = mixture(
        {"name": "chain", "weight": 50}, {"name": "jsonl", "path": str(path), "instruction": "x", "weight": 1}
    )
    length, problem = longest_prompt(task, Texts(task, pico_tokenizer()), {"train": None})
    assert problem.data["question"] == "9" * 300
    assert length > 300
