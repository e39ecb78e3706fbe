r"""Second rounds: who gets one, what the hint says, and which failures leave for the rescues (LTE, arXiv 2510.26109).

The contexts are the paper's table, on a task whose prompts are English, read by a tokenizer of single bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mulligan.methods import build_schedule
from mulligan.methods.lte import grpo_extra, lte
from mulligan.retry import Extra, Hinted, branch_of
from mulligan.rollout import Pass, climb, fresh, rollout
from mulligan.sampling.scripted import ScriptedSampler
from mulligan.select import SwapFailures, everything, first_group
from mulligan.tasks.boolean import Boolean
from mulligan.tasks.jsonl import Jsonl, JsonlSettings
from mulligan.texts import Texts
from mulligan.types import EXTRA, FRESH, HINTED, Forest, Grade, Problem, Row, Tree, Verdict
from tests.helpers import TASK, TEXTS, TOKENIZER, each, make_forest, make_sample


@cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, for English."""
    alphabet = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """Questions whose answers are 1/2, 2/2, 3/2, ..."""
    folder: Path = tmp_path_factory.mktemp("retry")
    rows = [{"question": f"What is {i} over 2?", "answer": f"{i}/2"} for i in range(1, 30)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Texts(Jsonl(JsonlSettings(path=str(folder))), byte_tokenizer())


Line = str | tuple[str, str]


def grow(
    texts: Texts, first: Sequence[Line], again: Pass, *, second: Line = "so be it", seed: int = 0, grade=None
) -> tuple[Tree, ScriptedSampler]:
    """The tree of one problem after a first round of these responses and another pass."""
    problem = texts.task.problem("train", 0)
    sampler = ScriptedSampler(texts.tokenizer, lambda r, k: first[k] if r.origin == FRESH else second)
    passes = (fresh(len(first)), again)
    (tree,) = climb([(0, problem)], passes, seed=seed, texts=texts, sampler=sampler, grade=grade or texts.task.grade)
    return tree, sampler


def cut(text: str) -> Line:
    return text, "length"


def boxed(answer: str) -> str:
    return rf"\boxed{{{answer}}}"


# ---- who gets a second round -------------------------------------------------------------------


@pytest.mark.parametrize(("again", "origin"), [(Hinted(3), HINTED), (Extra(3), EXTRA)])
def test_only_where_something_failed_and_nothing_passed(texts, again, origin):
    right = boxed(texts.task.problem("train", 0).answer)
    tree, _ = grow(texts, [boxed("7"), boxed("8")], again)
    assert [s.origin for s in tree.samples] == [FRESH] * 2 + [origin] * 3
    assert len(tree.groups()) == 2
    for first in ([boxed("7"), right], [right, right], [cut(boxed("7")), right]):
        assert not grow(texts, first, again)[0].of(origin)

    def nothing(problem: Problem, text: str) -> Grade:
        return Grade(verdict=Verdict.UNSCORABLE, reward=0.0, answer="7")

    assert not grow(texts, [boxed("7")] * 2, again, grade=each(nothing))[0].of(origin)

    def half(problem: Problem, text: str) -> Grade:
        verdict = Verdict.FAIL if "7" in text else Verdict.UNSCORABLE
        return Grade(verdict=verdict, reward=0.0, answer=texts.task.extract(text))

    tree, sampler = grow(texts, [boxed("7"), boxed("8")], again, grade=each(half))
    assert len(tree.of(origin)) == 3
    assert "8" not in texts.decode(sampler.requests[1].context)  # what nobody could score is no wrong answer


def test_there_is_one_round_with_the_task_as_the_pass_names_it(texts):
    tree, sampler = grow(texts, [boxed("7")] * 4, Hinted(6))
    assert [(r.origin, r.n) for r in sampler.requests] == [(FRESH, 4), (HINTED, 6)]
    assert all(s.failed for s in tree.samples)
    assert len({seed for r in sampler.requests for seed in r.seeds}) == 10


def test_extra_asks_with_the_plain_prompt(texts):
    tree, sampler = grow(texts, [boxed("7"), cut("...")], Extra(5))
    first, extra = sampler.requests
    assert extra.n == 5 and extra.context == first.context == texts.prompt(tree.problem)


# ---- what the hint says ------------------------------------------------------------------------

SILENCE = "Do not use or mention the hint explicitly in any of your intermediate steps."
FINISH = r"and put your final answer within \boxed{}."
STEPS, CONCISE = f"Please reason step by step, {FINISH}", f"Please think concisely, {FINISH}"


def prompt_of(sampler: ScriptedSampler, texts: Texts) -> list[str]:
    """The lines of the second round's context, its question aside."""
    _, hinted = sampler.requests
    assert hinted.context[0] == texts.tokenizer.bos_token_id
    question, *rest = texts.decode(hinted.context).split("\n")
    assert question == hinted.problem.data["question"]
    return rest


def test_none_truncated(texts):
    _, sampler = grow(texts, [boxed("70"), boxed("80"), "no answer"], Hinted(2))
    assert prompt_of(sampler, texts) == [f"Hint: possible incorrect answers include 70, 80. {SILENCE}", STEPS]


def test_some_truncated(texts):
    """The answers of the others, and concise in place of step by step."""
    _, sampler = grow(texts, [boxed("70"), cut(boxed("90")), boxed("80")], Hinted(2))
    assert prompt_of(sampler, texts) == [f"Hint: possible incorrect answers include 70, 80. {SILENCE}", CONCISE]
    _, sampler = grow(texts, ["no answer", cut(boxed("90"))], Hinted(2))
    assert prompt_of(sampler, texts) == [CONCISE]


def test_all_truncated(texts):
    """No hint, whatever they had said so far."""
    _, sampler = grow(texts, [cut(boxed("70")), cut("...")], Hinted(2))
    assert prompt_of(sampler, texts) == [CONCISE]


def test_nothing_to_say_is_no_second_round(texts):
    tree, _ = grow(texts, ["no answer", "none either"], Hinted(2))
    assert not tree.of(HINTED)


def answers_in(sampler: ScriptedSampler, texts: Texts) -> list[str]:
    hint = prompt_of(sampler, texts)[0]
    return hint.removeprefix("Hint: possible incorrect answers include ").split(". Do not")[0].split(", ")


def test_equal_answers_are_one(texts):
    """By the verifier's equivalence; the first spelling stays."""
    given = ["7.0", "7", "14/2", r"\frac{14}{2}", "east", r"\text{east}", "8"]
    _, sampler = grow(texts, [boxed(answer) for answer in given], Hinted(2))
    assert answers_in(sampler, texts) == ["7.0", "east", "8"]


def test_answers_are_capped(texts):
    first = [boxed(str(70 + k)) for k in range(12)]
    _, sampler = grow(texts, first, Hinted(2, most_answers=3))
    assert answers_in(sampler, texts) == ["70", "71", "72"]
    _, sampler = grow(texts, first, Hinted(2))
    assert len(answers_in(sampler, texts)) == 8


def test_nothing_right_and_nothing_empty_is_fed_back(texts):
    """Whatever the verdict was: a wrong format, say, around the right answer."""
    right = texts.task.problem("train", 0).answer
    given = [right, f" {right} ", "", "  ", None, "7"]

    def strict(problem: Problem, text: str) -> Grade:
        return Grade(verdict=Verdict.FAIL, reward=0.0, answer=given[int(text)])

    _, sampler = grow(texts, [str(k) for k in range(len(given))], Hinted(2), second="5", grade=each(strict))
    assert answers_in(sampler, texts) == ["7"]
    tree, _ = grow(texts, [str(k) for k in range(5)], Hinted(2), second="5", grade=each(strict))
    assert not tree.of(HINTED)  # without the 7 nothing is left to say


def test_only_final_answers_are_fed_back_never_reasoning(texts):
    _, sampler = grow(texts, ["because of the secret " + boxed("70"), boxed("80")], Hinted(2))
    assert "secret" not in texts.decode(sampler.requests[1].context)


def test_the_branch_is_by_the_truncated_failures():
    whole, short = make_sample(), make_sample(finish="length")
    assert [branch_of(s) for s in ([whole, whole], [whole, short], [short, short])] == ["none", "some", "all"]


# ---- other problems' answers, the placebo ------------------------------------------------------


def test_the_placebo_names_as_many_right_answers_of_other_problems(texts):
    task = texts.task
    problem = task.problem("train", 0)
    size = task.size("train")
    truths = {task.problem("train", i).answer for i in range(size)} - {problem.answer}
    first = [boxed("70"), boxed("71"), boxed("71.0"), cut(boxed("72"))]
    found = set()
    for seed in range(8):
        tree, sampler = grow(texts, first, Hinted(2, source="other"), seed=seed)
        lines = prompt_of(sampler, texts)
        answers = answers_in(sampler, texts)
        assert len(answers) == len(set(answers)) == 2 and set(answers) <= truths
        assert lines[1] == CONCISE and len(tree.of(HINTED)) == 2
        assert answers == answers_in(grow(texts, first, Hinted(2, source="other"), seed=seed)[1], texts)
        found.add(tuple(answers))
    assert len(found) > 4
    assert not grow(texts, ["no answer"], Hinted(2, source="other"))[0].of(HINTED)


def test_the_placebo_where_there_are_too_few_answers():
    """A truth value that is wrong here is the one other there is."""
    texts = Texts(Boolean(), TOKENIZER)
    wrong = {"T": "F", "F": "T"}[texts.task.problem("train", 0).answer]
    _, sampler = grow(texts, [boxed(wrong), boxed("x"), boxed("y")], Hinted(2, source="other"))
    assert texts.decode(sampler.requests[1].context).endswith(f"!{wrong}?")


# ---- who leaves --------------------------------------------------------------------------------


def run_step(group: int, rescues: int, *, seed: int = 0, step: int = 0, select: SwapFailures | None = None):
    """The forest of one problem that fails everywhere at first, and its rows."""

    def script(request, attempt: int) -> str:
        right = request.origin == HINTED and attempt < rescues
        return TASK.solution(request.problem) if right else boxed("123")

    method = lte(group)
    forest = rollout(
        lambda: (0, TASK.problem("train", 0)),
        1,
        method.passes,
        step=step,
        seed=seed,
        texts=TEXTS,
        sampler=ScriptedSampler(TOKENIZER, script),
        grade=TASK.grade,
    )
    return forest, (select or method.terms[0].select)(forest)


def gone(forest: Forest, rows: Sequence[Row]) -> tuple[int, ...]:
    """Attempts of the first round that are not trained."""
    stayed = {row.sample.uid for row in rows}
    return tuple(s.attempt for s in forest.trees[0].of(FRESH) if s.uid not in stayed)


@pytest.mark.parametrize(
    ("rescues", "most", "enter"),
    [(0, None, 0), (1, None, 1), (3, None, 3), (4, None, 3), (4, 4, 4), (4, 9, 4), (3, 2, 2), (2, 1, 1)],
)
def test_the_group_keeps_its_size_and_one_failure(rescues, most, enter):
    forest, rows = run_step(4, rescues, select=SwapFailures(origin=HINTED, most=most))
    assert len(forest.samples) == 8 and len(rows) == 4
    coming = [row for row in rows if row.sample.origin == HINTED]
    assert len(coming) == enter == len(gone(forest, rows))
    assert all(row.sample.passed for row in coming)
    assert {row.group for row in rows} == {forest.trees[0].samples[0].group}
    assert len({row.sample.uid for row in rows}) == 4


def test_who_leaves_is_a_function_of_the_seed():
    left = [gone(*run_step(6, 2, seed=seed)) for seed in range(12)]
    assert left == [gone(*run_step(6, 2, seed=seed)) for seed in range(12)]
    assert len(set(left)) > 5
    assert len({gone(*run_step(6, 2, step=step)) for step in range(12)}) > 5


def test_every_failure_is_as_likely_to_leave():
    """Two of six leave: each with probability 1/3, each pair with 1/15; 900 draws."""
    pairs: Counter[tuple[int, ...]] = Counter()
    for seed in range(0, 9000, 10):  # a hand-made sample's seed is its uid
        failures = [make_sample(uid=seed + k) for k in range(6)]
        rescues = [make_sample(uid=seed + 6 + k, reward=1.0, origin=HINTED, group=1) for k in range(2)]
        stayed = {row.sample.uid for row in SwapFailures(origin=HINTED)(make_forest([*failures, *rescues]))}
        pairs[tuple(k for k in range(6) if seed + k not in stayed)] += 1
    assert len(pairs) == 15
    # Expected 60 each, standard deviation sqrt(900 / 15 * 14 / 15) = 7.5
    assert max(pairs.values()) < 60 + 5 * 7.5 and min(pairs.values()) > 60 - 5 * 7.5


def test_a_tree_of_passes_and_failures_is_left_alone():
    samples = [make_sample(uid=k, reward=float(k % 2)) for k in range(4)]
    forest = make_forest(samples)
    assert [row.sample for row in SwapFailures(origin=HINTED)(forest)] == samples
    assert [row.sample for row in everything(forest)] == samples


def test_what_was_never_scored_neither_leaves_nor_counts():
    """Of four samples two could be scored, so the group has two places, and one rescue may enter."""
    verdicts = (Verdict.UNSCORABLE, Verdict.FAIL, Verdict.UNSCORABLE, Verdict.FAIL)
    first = [make_sample(uid=k, verdict=verdict) for k, verdict in enumerate(verdicts)]
    rescues = [make_sample(uid=4 + k, reward=1.0, origin=HINTED, group=1) for k in range(4)]
    forest = make_forest([*first, *rescues])
    assert first_group(forest.trees[0]) == [first[1], first[3]]
    rows = SwapFailures(origin=HINTED)(forest)
    assert sorted(row.sample.origin for row in rows) == [FRESH, HINTED]
    assert {row.group for row in rows} == {0}


def test_only_failures_leave_and_only_those_of_the_first_group():
    """Whatever pass draws a second round in whatever tree."""
    first = [make_sample(uid=k, reward=float(k < 3)) for k in range(4)]
    rescues = [make_sample(uid=4 + k, reward=1.0, origin=HINTED, group=1) for k in range(3)]
    rows = SwapFailures(origin=HINTED)(make_forest([*first, *rescues]))
    assert [row.sample for row in rows] == [*first[:3], rescues[0]]
    apart = [make_sample(uid=k, group=k) for k in range(3)]  # each a group of its own: the first has one place
    rows = SwapFailures(origin=HINTED, most=3)(make_forest([*apart, *rescues]))
    assert [row.sample for row in rows] == [rescues[0], *apart[1:]]
    assert SwapFailures(origin=HINTED)(make_forest([make_sample(verdict=Verdict.UNSCORABLE), *rescues])) == []
    assert SwapFailures(origin=HINTED, most=2)(make_forest([make_sample(verdict=Verdict.UNSCORABLE), *rescues])) == []


def test_samples_of_further_groups_stay():
    """Resets beside a second round, say: only the first group has places to give."""
    first = [make_sample(uid=k) for k in range(2)]
    resets = [make_sample(uid=2 + k, group=1, origin="reset") for k in range(2)]
    rescue = make_sample(uid=4, reward=1.0, origin=HINTED, group=2)
    rows = SwapFailures(origin=HINTED)(make_forest([*first, *resets, rescue]))
    assert sorted(row.sample.uid for row in rows if row.sample.uid in (2, 3)) == [2, 3]
    assert [row.group for row in rows] == [0, 0, 1, 1] and any(row.sample is rescue for row in rows)


def test_a_rescue_that_mentions_the_hint_is_not_trained(texts):
    """It passes, and a reader without the hint could make nothing of it."""
    right = boxed(texts.task.problem("train", 0).answer)
    said = ["As the hint says, it is not 7: " + right, "It is none of the incorrect answers: " + right, "So " + right]
    second: Callable[[int], str] = said.__getitem__
    problem = texts.task.problem("train", 0)
    sampler = ScriptedSampler(texts.tokenizer, lambda r, k: boxed("7") if r.origin == FRESH else second(k))
    (tree,) = climb([(0, problem)], lte(3).passes, seed=0, texts=texts, sampler=sampler, grade=texts.task.grade)
    again = tree.of(HINTED)
    assert [s.passed for s in again] == [True] * 3
    assert [s.grade.mentions_hint for s in again] == [True, True, False]
    rows = lte(3).terms[0].select(Forest(0, [tree]))
    assert len(rows) == 3 and [row.sample for row in rows if row.sample.origin == HINTED] == [again[2]]


def test_grpo_extra_swaps_its_own_second_round():
    right = TASK.solution(TASK.problem("train", 0))
    sampler = ScriptedSampler(TOKENIZER, lambda r, k: boxed("123") if r.origin == FRESH else right)
    problem = TASK.problem("train", 0)
    method = grpo_extra(3)
    (tree,) = climb([(0, problem)], method.passes, seed=0, texts=TEXTS, sampler=sampler, grade=TASK.grade)
    rows = method.terms[0].select(Forest(0, [tree]))
    assert sorted(row.sample.origin for row in rows) == [EXTRA, EXTRA, FRESH]
    # LTE's select takes none of them: they are no hinted samples.
    rows = lte(3).terms[0].select(Forest(0, [tree]))
    assert sorted(row.sample.origin for row in rows) == [EXTRA] * 3 + [FRESH] * 3


def test_presets_have_the_rounds_of_their_group_size():
    for name, second in (("lte", Hinted(5)), ("lte-dagger", Hinted(5)), ("grpo-extra", Extra(5))):
        assert build_schedule(name, {"group_size": 5}).schedule.at(0).passes == (fresh(5), second)
