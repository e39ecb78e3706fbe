"""Resets: where a failed chain is entered again, who the parent is, and every position (arXiv 2605.25507)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mulligan.memory import Memory
from mulligan.methods import build_schedule
from mulligan.reset import (
    SHARES,
    Parent,
    Position,
    Reset,
    SelfDiagnosis,
    early_step,
    entropy_step,
    oracle_step,
    random_step,
    remember_shares,
    restart,
)
from mulligan.rollout import Ask, climb, fresh, rollout
from mulligan.sampling.scripted import ScriptedSampler
from mulligan.select import everything
from mulligan.tasks.chain import Chain, ChainSettings
from mulligan.texts import Texts
from mulligan.types import DIAGNOSIS, FRESH, RESET, Completion, Forest, Grade, Request, Sample, Tree, Verdict
from tests.helpers import TOKENIZER, each, make_forest, make_sample

TASK = Chain(ChainSettings(min_steps=4, max_steps=4))  # four steps and the answer
TEXTS = Texts(TASK, TOKENIZER)
PROBLEM = TASK.problem("train", 0)
STEPS = TASK.true_steps(PROBLEM)


def wrong_from(step: int) -> str:
    """The right solution, but for the results of one step (from 1) and of the last, the answer."""
    steps = list(STEPS)
    for index in {step - 1, len(STEPS) - 1}:
        digits = steps[index].rstrip(";}")
        steps[index] = digits[:-1] + str((int(digits[-1]) + 1) % 10) + steps[index][len(digits) :]
    return "".join(steps)


Script = Callable[[Request, int], str | tuple[str, str]]


def grow(
    at: Position,
    first: Sequence[str | tuple[str, str]],
    *,
    n: int = 2,
    said: str = "",
    seed: int = 0,
    score=None,
    memory: Memory | None = None,
) -> tuple[Tree, ScriptedSampler]:
    """The tree of one problem: these fresh chains, and a reset of one that failed."""

    def script(request: Request, attempt: int):
        if request.origin == FRESH:
            return first[attempt] if request.n == len(first) else STEPS[-1]
        return said if request.origin == DIAGNOSIS else STEPS[-1]

    sampler = ScriptedSampler(TOKENIZER, script)
    (tree,) = climb(
        [(0, PROBLEM)],
        (fresh(len(first)), Reset(n, at)),
        seed=seed,
        texts=TEXTS,
        sampler=sampler,
        grade=TASK.grade,
        score=score,
        memory=memory,
    )
    return tree, sampler


def step_of(tree: Tree) -> int:
    """The step (from 1) before which the resets of this tree begin."""
    reset = tree.of(RESET)[0]
    parent = next(s for s in tree.samples if s.uid == reset.request.parent)
    ends = [0, *TEXTS.step_ends(parent.tokens)]
    return ends.index(reset.branch) + 1


def fixed(step: int) -> Position:
    def at(parent, tree, ask):
        return step
        yield

    return at


# ---- boundaries --------------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, 6))
def test_a_reset_keeps_the_parents_tokens_up_to_the_step(step):
    tree, sampler = grow(fixed(step), [wrong_from(2)], n=3)
    parent, *resets = tree.samples
    assert len(resets) == 3 and len({s.group for s in tree.samples}) == 2
    kept = "".join(TASK.split_steps(wrong_from(2))[: step - 1])
    begin = len(TOKENIZER.encode(kept))
    for sample in resets:
        assert sample.branch == begin and sample.tokens[:begin] == parent.tokens[:begin]
        assert sample.request.parent == parent.uid and sample.origin == RESET
        assert len(sample.behavior_logprobs) == len(sample.tokens) - begin
        assert sample.text == kept + STEPS[-1]  # graded as a whole
    _, request = sampler.requests
    assert request.context == TEXTS.prompt(PROBLEM) and request.graded and request.temperature is None


def test_boundaries_are_token_indices_and_not_text():
    """A token that straddles two steps, and one that no tokenizer would give for this text: both stay as drawn."""
    vocabulary = ("<eos>", "1", "a", ";b", ";", "a;", "c", ";c", "<unk>")
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    drawn = (2, 3, 4, 2, 4, 6)  # a | ;b | ; | a | ; | c: the steps a; b; a; c

    asked: list[Request] = []

    class Given:
        def run(self, requests, on_done) -> None:
            queue = list(requests)
            while queue:
                request = queue.pop(0)
                asked.append(request)
                tokens = (6,) if request.prefix else drawn
                done = [Completion(tokens=tokens, behavior_logprobs=(-1.0,) * len(tokens), finish="length")] * request.n
                queue.extend(on_done(request, done))

    texts = Texts(TASK, tokenizer)
    begins = []
    for step in range(1, 5):
        (tree,) = climb(
            [(0, PROBLEM)],
            (fresh(1), Reset(1, fixed(step))),
            seed=0,
            texts=texts,
            sampler=Given(),
            grade=each(lambda problem, text: Grade(verdict=Verdict.FAIL, reward=0.0)),
        )
        reset = tree.samples[1]
        begins.append(reset.branch)
        assert asked[-1].prefix == drawn[: reset.branch] == reset.tokens[: reset.branch]
    assert begins == [0, 2, 3, 5]  # the straddling token ends the first step
    # Where the last token straddles the last steps, it alone is drawn anew: nothing else is left.
    parent = Parent(make_sample(response=(2, 7)), *texts.steps((2, 7)))
    assert parent.steps == ["a;", "c"] and parent.ends == [2, 2]
    assert [parent.begin(step) for step in (1, 2)] == [0, 1]


def test_the_last_token_is_never_in_the_prefix():
    """It may be EOS, behind which nothing is to be drawn."""
    tree, _ = grow(fixed(2), [STEPS[0] + "x"])  # the second step is "x" and EOS
    assert tree.of(RESET)[0].branch == len(TOKENIZER.encode(STEPS[0]))
    assert tree.of(RESET)[0].tokens[: tree.of(RESET)[0].branch].count(TOKENIZER.eos_token_id) == 0
    backend = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="<eos>")
    texts = Texts(TASK, backend)
    assert texts.steps((*TOKENIZER.encode("1;2"), 2))[1] == [2, 4]


def test_a_chain_of_nothing_is_started_over():
    """An empty response has no steps and no diagnosis; the reset begins at 0."""
    tree, sampler = grow(SelfDiagnosis(), [""], said=r"\boxed{3}")
    assert [r.origin for r in sampler.requests] == [FRESH, RESET]
    assert tree.of(RESET)[0].branch == 0


# ---- the parent --------------------------------------------------------------------------------


def test_the_parent_stays_in_its_group():
    tree, _ = grow(restart, ["".join(STEPS), wrong_from(1), "".join(STEPS), "".join(STEPS)])
    assert [s.passed for s in tree.of(FRESH)] == [True, False, True, True]
    assert tree.of(RESET)[0].request.parent == tree.samples[1].uid
    rows = everything(Forest(0, [tree]))
    groups = Counter(row.group for row in rows)
    assert sorted(groups.values()) == [2, 4] and len(rows) == 6


def test_without_a_failure_there_are_two_fresh_groups():
    tree, sampler = grow(SelfDiagnosis(), ["".join(STEPS)] * 4, n=3)
    assert [(r.origin, r.n, r.prefix) for r in sampler.requests] == [(FRESH, 4, ()), (FRESH, 3, ())]
    assert [len(group) for group in tree.groups().values()] == [4, 3]
    assert len({seed for r in sampler.requests for seed in r.seeds}) == 7


def test_the_parent_is_any_failure_truncated_ones_too():
    """Chains 1, 2 and 4 of five fail, 2 for being cut; each is the parent in a third of 900 draws."""
    first = ["".join(STEPS), wrong_from(1), ("".join(STEPS[:2]), "length"), "".join(STEPS), wrong_from(4)]
    found: Counter[int] = Counter()
    for seed in range(900):
        tree, _ = grow(restart, first, n=1, seed=seed)
        found[tree.of(RESET)[0].request.parent - tree.samples[0].uid] += 1  # type: ignore[operator]
    assert set(found) == {1, 2, 4}
    # Expected 300 each; standard deviation sqrt(900 * 1/3 * 2/3) = 14
    assert all(abs(times - 300) < 5 * 14 for times in found.values())
    parents = [{s.request.parent for s in grow(restart, first, seed=3)[0].of(RESET)} for _ in range(2)]
    assert parents[0] == parents[1] and len(parents[0]) == 1


def test_what_could_not_be_scored_is_no_parent():
    samples = [make_sample(uid=0, verdict=Verdict.UNSCORABLE), make_sample(uid=1, reward=1.0)]
    forest = make_forest(samples)
    order = next(iter(Reset(2, restart)(PROBLEM, forest.trees[0], Ask(PROBLEM, TEXTS, 0, 0))))
    assert order.origin == FRESH and order.n == 2  # type: ignore[union-attr]


class Coins(Texts):
    """Responses of one token: 5 is right, 6 is wrong; nothing to read or to split."""

    def context(self, text: str) -> tuple[int, ...]:
        return (1,)

    def decode(self, tokens: Sequence[int]) -> str:
        return "right" if tokens[-1] == 5 else "wrong"

    def steps(self, tokens: Sequence[int]) -> tuple[list[str], list[int]]:
        return ["wrong"], [1]


class Tossing:
    """A sampler whose samples are right with probability 1/2, each by its own seed."""

    def run(self, requests, on_done) -> None:
        queue = list(requests)
        while queue:
            request = queue.pop()
            done = [
                Completion(tokens=(5 + seed % 2,), behavior_logprobs=(-0.7,), finish="stop") for seed in request.seeds
            ]
            queue.extend(on_done(request, done))


def test_the_first_group_is_unbiased():
    """20,000 prompts of true pass rate 1/2: what is trained of the first group passes in half of the cases. Without the
    parent, as published, it would not: 4 chains have (4 p - 4 p^4) / (1 - p^4) = 1.867 passes where one fails, over 3
    chains 0.622."""
    grades = {
        "right": Grade(verdict=Verdict.PASS, reward=1.0),
        "wrong": Grade(verdict=Verdict.FAIL, reward=0.0),
    }
    trees = climb(
        [(i, PROBLEM) for i in range(20_000)],
        (fresh(4), Reset(1, restart)),
        seed=1,
        texts=Coins(TASK, TOKENIZER),
        sampler=Tossing(),
        grade=each(lambda problem, text: grades[text]),
    )
    first: list[bool] = []
    childless: list[bool] = []
    resets: list[bool] = []
    for tree in trees:
        resets += [s.passed for s in tree.of(RESET)]
        group = next(iter(tree.groups().values()))
        assert len(group) == 4
        first += [s.passed for s in group]
        parents = {s.request.parent for s in tree.of(RESET)}
        childless += [s.passed for s in group if parents and s.uid not in parents]
    few = Forest(0, trees[:100])
    assert [row.sample for row in everything(few)] == few.samples  # all of them are trained
    # Standard errors: 0.5 / sqrt(80,000) = 0.0018 and about 0.002
    assert abs(sum(first) / len(first) - 0.5) < 0.01
    assert abs(sum(resets) / len(resets) - 0.5) < 0.02
    assert abs(sum(childless) / len(childless) - 0.622) < 0.01
    assert abs(len(resets) / len(trees) - 15 / 16) < 0.01  # all four pass once in 16


# ---- positions ---------------------------------------------------------------------------------


def counted(at: Position, seeds: int = 400, chain: str | None = None) -> Counter[int]:
    return Counter(step_of(grow(at, [chain or wrong_from(3)], n=1, seed=seed)[0]) for seed in range(seeds))


def test_random_is_uniform_over_all_steps():
    found = counted(random_step)
    assert set(found) == {1, 2, 3, 4, 5}
    # Expected 80 each; standard deviation sqrt(400 * 0.2 * 0.8) = 8
    assert all(abs(times - 80) < 5 * 8 for times in found.values())
    assert found == counted(random_step)


def test_early_is_uniform_over_the_first_half():
    found = counted(early_step)  # five steps: the first three
    assert set(found) == {1, 2, 3}
    # Expected 133 each; standard deviation sqrt(400 * 2 / 9) = 9.4
    assert all(abs(times - 133.3) < 5 * 9.4 for times in found.values())
    assert set(counted(early_step, 60, chain="".join(STEPS[:4]))) == {1, 2}  # of four
    assert set(counted(early_step, 5, chain=STEPS[0])) == {1}  # of one


def test_restart_is_the_first_step():
    assert set(counted(restart, 5)) == {1}
    tree, _ = grow(restart, [wrong_from(3)])
    assert tree.of(RESET)[0].request.prefix == ()


@pytest.mark.parametrize("step", range(1, 6))
def test_the_oracle_names_the_first_wrong_step(step):
    tree, sampler = grow(oracle_step, [wrong_from(step)])
    assert step_of(tree) == step == tree.samples[0].grade.first_wrong_step
    assert [r.origin for r in sampler.requests] == [FRESH, RESET]


def test_the_oracle_of_a_task_without_one_is_a_restart():
    unknown = Grade(verdict=Verdict.FAIL, reward=0.0)
    (tree,) = climb(
        [(0, PROBLEM)],
        (fresh(1), Reset(1, oracle_step)),
        seed=0,
        texts=TEXTS,
        sampler=ScriptedSampler(TOKENIZER, lambda request, attempt: wrong_from(3)),
        grade=each(lambda problem, text: unknown),
    )
    assert tree.of(RESET)[0].branch == 0


@pytest.mark.parametrize("step", range(1, 6))
def test_entropy_is_read_at_the_first_token_of_each_step(step):
    """Highest at the first token of one step, and higher still in the middle of all of them."""
    calls: list[tuple[int, str, object]] = []

    def score(samples: Sequence[Sample], stream, context):
        calls.append((len(samples), stream.name, context))
        (sample,) = samples
        begins = [0, *TEXTS.step_ends(sample.tokens)[:-1]]
        entropy = torch.full((len(sample.tokens),), 9.0)
        entropy[begins] = torch.tensor([1.0 + (k == step - 1) for k in range(len(begins))])
        return [entropy]

    tree, _ = grow(entropy_step, [wrong_from(3)], score=score)
    assert step_of(tree) == step
    assert calls == [(1, "policy_entropy@sampling", None)]


def test_entropy_that_is_equal_everywhere_is_the_first_step():
    tree, _ = grow(entropy_step, [wrong_from(3)], score=lambda s, *_: [torch.ones(len(s[0].tokens))])
    assert step_of(tree) == 1


# ---- the model's own diagnosis -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "step"),
    [
        (r"1+2=4\boxed{2}", 2),
        (r"\boxed{2}\boxed{4}", 4),  # the last one
        (r"\boxed{2}\boxed{9}", 2),  # the last one in range
        (r"\boxed{ 3 }", 3),
        (r"\boxed{0}step 4", 4),  # no box in range: the last "step k"
        ("step 2 is right but step 3 is not", 3),
        ("step 2, and step 7", 2),
        (r"\boxed{x}", 1),
        (r"\boxed{-2}", 1),
        ("2", 1),
        ("", 1),
        (r"\boxed{6}step 0", 1),
    ],
)
def test_what_the_diagnosis_may_say(said, step):
    tree, _ = grow(SelfDiagnosis(), [wrong_from(3)], said=said)
    assert step_of(tree) == step


def test_the_diagnosis_is_asked_for_by_chain_and_never_trained():
    tree, sampler = grow(SelfDiagnosis(temperature=0.25), [wrong_from(3), "".join(STEPS)], n=4, said=r"\boxed{3}")
    first, asked, reset = sampler.requests
    assert (first.origin, asked.origin, reset.origin) == (FRESH, DIAGNOSIS, RESET)
    parent = tree.samples[0]
    assert asked.context == TEXTS.diagnosis(PROBLEM, TASK.split_steps(parent.text)) != first.context
    assert (asked.n, asked.temperature, asked.graded, asked.prefix) == (1, 0.25, False, ())
    assert asked.parent == reset.parent == parent.uid and reset.temperature is None
    (said,) = tree.of(DIAGNOSIS)
    assert said.grade.verdict is Verdict.UNGRADED and said.text == r"\boxed{3}"
    assert len({asked.group, first.group, reset.group}) == 3
    rows = everything(Forest(0, [tree]))
    assert [row.sample.origin for row in rows] == [FRESH, FRESH, RESET, RESET, RESET, RESET]
    assert SelfDiagnosis().temperature == 0.3


def test_the_reference_answer_is_hidden_from_the_diagnosis():
    assert PROBLEM.answer not in TASK.diagnosis(PROBLEM, TASK.split_steps(wrong_from(5)))


# ---- another problem's diagnosis ---------------------------------------------------------------


def told(step: int, said: str, memory: Memory, *, seed: int = 0, chain: str | None = None) -> Forest:
    """A step of srpo-permuted on one problem whose fresh chains all are this one, with what it remembers."""
    method = build_schedule("srpo-permuted", {"chains": 2, "resets": 1}).schedule.at(0)
    texts = {FRESH: chain or wrong_from(3), DIAGNOSIS: said, RESET: STEPS[-1]}
    forest = rollout(
        lambda: (step, PROBLEM),
        1,
        method.passes,
        step=step,
        seed=seed,
        texts=TEXTS,
        sampler=ScriptedSampler(TOKENIZER, lambda request, attempt: texts[request.origin]),
        grade=TASK.grade,
        memory=memory,
    )
    assert method.remember is remember_shares
    method.remember(forest, memory)
    memory.commit()
    return forest


def test_the_permuted_position_is_that_of_the_step_before():
    memory = Memory()
    told(0, r"\boxed{4}", memory)
    # The middle of the fourth of five steps: 3.5 / 5
    assert memory[SHARES] == [0.7]
    forest = told(1, r"\boxed{1}", memory)
    assert step_of(forest.trees[0]) == 4  # not 1: its own words are not heeded
    assert memory[SHARES] == [0.1]
    # In a chain of two steps 0.1 is the first, and what names no step counts as the first: 0.5 / 2.
    forest = told(2, "", memory, chain="".join(STEPS[:2]))
    assert step_of(forest.trees[0]) == 1 and memory[SHARES] == [0.25]
    # A quarter of five steps is within the second.
    assert step_of(told(3, r"\boxed{5}", memory).trees[0]) == 2
    assert memory[SHARES] == [0.9]
    assert step_of(told(4, r"\boxed{5}", memory, chain="".join(STEPS[:2])).trees[0]) == 2


def test_a_share_is_one_of_the_parents_chain():
    """Not of its neighbours', which may have other lengths."""
    chains = ["".join(STEPS), "".join(STEPS[:2])]
    tree, _ = grow(SelfDiagnosis(), chains, said=r"\boxed{2}")
    memory = Memory()
    remember_shares(Forest(0, [tree]), memory)
    assert memory[SHARES] == [0.75]  # the middle of the second of two steps


def test_the_permuted_position_of_a_first_step_is_random():
    found = Counter(step_of(told(0, r"\boxed{2}", Memory(), seed=seed).trees[0]) for seed in range(100))
    assert set(found) == {1, 2, 3, 4, 5} and max(found.values()) < 45


def test_a_step_without_diagnoses_forgets_nothing():
    memory = Memory()
    told(0, r"\boxed{4}", memory)
    told(1, r"\boxed{4}", memory, chain="".join(STEPS))  # everything passes
    assert memory[SHARES] == [0.7]


def test_the_permuted_position_is_drawn_among_all_that_were_told():
    found = set()
    for seed in range(30):
        memory = Memory({"cursor": 0, SHARES: [0.1, 0.5, 0.9]})
        found.add(step_of(grow(SelfDiagnosis(permuted=True), [wrong_from(3)], seed=seed, memory=memory)[0]))
    assert found == {1, 3, 5}
