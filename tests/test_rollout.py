"""From problems to forests: passes, groups, seeds, dynamic sampling; and the seams around them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mulligan.errors import UserError
from mulligan.memory import Memory
from mulligan.method import Method
from mulligan.methods.dapo import mixed
from mulligan.methods.grpo import grpo
from mulligan.methods.rloo import rloo
from mulligan.rollout import Ask, climb, fresh, rollout
from mulligan.sampling.scripted import ScriptedSampler
from mulligan.schedule import Schedule, constant
from mulligan.seeds import seed_of
from mulligan.texts import Texts
from mulligan.train import rollout_metrics
from mulligan.types import Forest, Problem, Request, Sample, Stream, Tree, Verdict
from tests.helpers import TASK, TEXTS, TOKENIZER, each


def right(problem: Problem) -> str:
    return TASK.solution(problem)


def wrong(request: Request, attempt: int) -> str:
    return "no answer"


def sampler_of(script: Callable = wrong) -> ScriptedSampler:
    return ScriptedSampler(TOKENIZER, script)


def grow(passes, problems=(0,), *, script: Callable = wrong, seed: int = 0, score=None, sampler=None) -> list[Tree]:
    """The trees of these training problems; a problem's slot is its index."""
    return climb(
        [(i, TASK.problem("train", i)) for i in problems],
        passes,
        seed=seed,
        texts=TEXTS,
        sampler=sampler or sampler_of(script),
        grade=TASK.grade,
        score=score,
    )


# ---- passes ------------------------------------------------------------------------------------


def test_fresh_samples_share_one_group():
    sampler = sampler_of(lambda request, attempt: right(request.problem) if attempt == 1 else ("1x", "length"))
    (tree,) = grow((fresh(3),), sampler=sampler)
    assert [s.grade.verdict for s in tree.samples] == [Verdict.FAIL, Verdict.PASS, Verdict.FAIL]
    assert [s.attempt for s in tree.samples] == [0, 1, 2]
    assert len({s.group for s in tree.samples}) == 1 and list(tree.groups()) == [tree.samples[0].group]
    assert [s.truncated for s in tree.samples] == [True, False, True]
    (request,) = sampler.requests
    assert request.context == TEXTS.prompt(tree.problem) and request.n == 3 and request.prefix == ()
    passed = tree.samples[1]
    assert passed.text == right(tree.problem)  # without EOS
    assert passed.tokens[-1] == TOKENIZER.eos_token_id and len(passed.behavior_logprobs) == len(passed.tokens)


def test_one_order_is_answered_by_its_samples_and_a_list_by_lists():
    seen = []

    def attempt(problem, tree, ask):
        seen.append((yield ask.samples(2)))
        seen.append((yield [ask.samples(1), ask.samples(3)]))
        seen.append((yield [ask.samples(1)]))
        seen.append((yield []))

    (tree,) = grow((attempt,))
    one, several, single, none = seen
    assert [type(s) for s in one] == [Sample] * 2
    assert [[type(s) for s in part] for part in several] == [[Sample], [Sample] * 3]
    assert [[type(s) for s in part] for part in single] == [[Sample]]
    assert none == []  # a list that a pass found nothing for is a list too
    assert tree.samples == [*one, *several[0], *several[1], *single[0]]
    assert len(tree.groups()) == 4  # each order a group of its own, unless it names one


def test_a_pass_may_add_to_an_earlier_group():
    def attempt(problem, tree, ask):
        first = yield ask.samples(1)
        yield ask.samples(2, group=first[0].group)
        group = ask.new_group()
        yield [ask.samples(1, group=group), ask.samples(1, group=group)]

    (tree,) = grow((attempt,))
    assert [len(group) for group in tree.groups().values()] == [3, 2]


def test_a_pass_ends_by_its_own_rule_and_sees_what_came_before():
    """Tries until one passes; the next pass acts only where none did."""
    seen = {}

    def until_right(problem, tree, ask):
        for _ in range(4):
            (sample,) = yield ask.samples(1)
            if sample.passed:
                return

    def only_where_none_passed(problem, tree, ask):
        seen[problem.index] = len(tree.samples)
        if not tree.any_pass():
            yield ask.samples(2, origin="late")

    asked: dict[int, int] = {}

    def script(request, attempt):
        index = request.problem.index
        asked[index] = asked.get(index, 0) + 1
        return right(request.problem) if index == 1 and asked[index] == 3 else "no"

    trees = grow((until_right, only_where_none_passed), (0, 1), script=script)
    assert [len(tree.samples) for tree in trees] == [6, 3]
    assert seen == {0: 4, 1: 3}
    assert [len(tree.of("late")) for tree in trees] == [2, 0]
    assert [len(tree.of("late", "fresh")) for tree in trees] == [6, 3]


def test_a_pass_that_asks_for_nothing_is_skipped():
    def nothing(problem, tree, ask):
        return
        yield

    assert [len(t.samples) for t in grow((nothing, fresh(1), nothing), (0, 1))] == [1, 1]
    assert grow((nothing,))[0].samples == []
    assert grow(())[0].samples == []


def test_resets_keep_prefix_and_parent():
    def attempt(problem, tree, ask):
        (parent,) = yield ask.samples(1)
        yield ask.samples(2, prefix=parent.tokens[:4], parent=parent.uid, origin="reset", max_new_tokens=5)

    (tree,) = grow((attempt,), script=lambda request, attempt: "1x+y=3;" if not request.prefix else "9;")
    parent, *children = tree.samples
    assert parent.branch == 0 and parent.request.parent is None
    for child in children:
        assert child.branch == 4 and child.tokens[:4] == parent.tokens[:4]
        assert child.request.parent == parent.uid and child.request.max_new_tokens == 5
        assert child.text == "1x+y9;"  # the whole response is decoded, and graded
        assert len(child.behavior_logprobs) == len(child.tokens) - 4


def test_what_is_no_answer_is_not_graded():
    def attempt(problem, tree, ask):
        yield ask.samples(1, context=ask.texts.diagnosis(problem, ["1x;"]), origin="diagnosis", graded=False)

    verified = []

    def verify(problem, text):
        verified.append(text)
        return TASK.verify(problem, text)

    (tree,) = climb(
        [(0, TASK.problem("train", 0))],
        (attempt, fresh(1)),
        seed=0,
        texts=TEXTS,
        sampler=sampler_of(),
        grade=each(verify),
    )
    assert [s.grade.verdict for s in tree.samples] == [Verdict.UNGRADED, Verdict.FAIL]
    assert len(verified) == 1 and not tree.samples[0].failed


def test_scores_alone_and_beside_samples():
    calls = []

    def score(samples, stream, context):
        calls.append((len(samples), stream.name))
        return [torch.full((len(s.tokens),), float(s.uid % 10)) for s in samples]

    seen = []

    def attempt(problem, tree, ask):
        samples = yield ask.samples(2)
        seen.append((yield ask.scores(samples, Stream(model="policy"))))
        seen.append((yield [ask.scores(samples[:1], Stream(quantity="entropy")), ask.samples(1)]))
        seen.append((yield [ask.scores([], Stream())]))

    (tree,) = grow((attempt,), score=score)
    assert calls == [(2, "policy_logprobs"), (1, "start_entropy"), (0, "start_logprobs")]
    assert [t.shape for t in seen[0]] == [(len(s.tokens),) for s in tree.samples[:2]]
    assert float(seen[0][1][0]) == 1.0
    scores, samples = seen[1]
    assert scores[0].shape == (len(tree.samples[0].tokens),) and samples == tree.samples[2:]
    assert seen[2] == [[]]
    with pytest.raises(UserError, match="no scorer"):
        grow((attempt,))


def test_problems_advance_on_their_own():
    """No barrier: the second round of one problem is asked for before another's first is answered."""

    def attempt(problem, tree, ask):
        yield ask.samples(1)
        yield ask.samples(1)

    order = []

    class Backwards:
        """Serves the newest request first."""

        def run(self, requests, on_done):
            scripted, stack = sampler_of(), list(requests)
            while stack:
                request = stack.pop()
                order.append(request.problem.index)
                found = []

                def take(_, completions, found=found):
                    found.extend(completions)
                    return ()

                scripted.run([request], take)
                stack.extend(on_done(request, found))

    trees = grow((attempt,), (0, 1, 2), sampler=Backwards())
    assert order == [2, 2, 1, 1, 0, 0]
    assert [t.problem.index for t in trees] == [0, 1, 2]
    assert ids(trees) == ids(grow((attempt,), (0, 1, 2)))


# ---- identity and seeds ------------------------------------------------------------------------


def ids(trees: list[Tree]) -> list[list[tuple]]:
    return [[(s.uid, s.group, s.request.seeds[s.attempt], s.tokens) for s in t.samples] for t in trees]


def branching(problem, tree, ask):
    first = yield ask.samples(2)
    yield [ask.samples(2, prefix=s.tokens[:2], parent=s.uid) for s in first]
    yield ask.samples(1)


def test_seeds_are_a_function_of_their_labels_alone():
    (tree,) = grow((branching, fresh(2)), seed=5)
    base = seed_of(5, tree.problem.uid, 0)
    # (pass, round, branch, attempt)
    labels = [(0, 0, 0, 0), (0, 0, 0, 1), (0, 1, 0, 0), (0, 1, 0, 1), (0, 1, 1, 0), (0, 1, 1, 1), (0, 2, 0, 0)]
    labels += [(1, 0, 0, 0), (1, 0, 0, 1)]
    assert [s.request.seeds[s.attempt] for s in tree.samples] == [seed_of(base, *label) for label in labels]


def test_neighbours_and_order_change_nothing():
    alone = [ids(grow((branching,), (i,)))[0] for i in range(3)]
    assert ids(grow((branching,), (0, 1, 2))) == alone
    assert ids(grow((branching,), (2, 0, 1))) == [alone[2], alone[0], alone[1]]
    every = [seed for tree in alone for _, _, seed, _ in tree]
    assert len(set(every)) == len(every)
    assert len({uid for tree in alone for uid, *_ in tree}) == len(every)
    assert not set.intersection(*({group for _, group, *_ in tree} for tree in alone))
    assert [s for t in ids(grow((branching,), (0,), seed=1)) for *_, s, _ in t] != [s for *_, s, _ in alone[0]]


def test_uids_follow_the_order_of_asking_not_of_answering():
    class Last:
        """Answers the orders of a round back to front."""

        def run(self, requests, on_done):
            queue = list(requests)
            while queue:
                request = queue.pop()
                found = []

                def take(_, completions, found=found):
                    found.extend(completions)
                    return ()

                sampler_of(lambda r, a: str(len(r.prefix))).run([request], take)
                queue.extend(on_done(request, found))

    def attempt(problem, tree, ask):
        yield [ask.samples(1, prefix=(5,) * n) for n in range(4)]

    (tree,) = grow((attempt,), (3,), sampler=Last())
    assert [s.branch for s in tree.samples] == [0, 1, 2, 3]
    first = tree.samples[0].uid
    assert [s.uid for s in tree.samples] == [first, first + 1, first + 2, first + 3]


def test_a_pass_draws_its_own_choices_from_its_own_seed():
    problem = TASK.problem("train", 0)
    ask, again = (Ask(problem, TEXTS, 0, 7) for _ in range(2))
    assert ask.draw_seed("parent", 1) == again.draw_seed("parent", 1)
    drawn = {ask.draw_seed("parent", 1), ask.draw_seed("parent", 2), ask.draw_seed("step", 1)}
    assert len(drawn | {Ask(problem, TEXTS, 0, 8).draw_seed("parent", 1)}) == 4


# ---- a step's forest ---------------------------------------------------------------------------


def run_step(n: int, *, keep=None, draws=10, script=wrong, step=0, start=0) -> tuple[Forest, list[int]]:
    """A step's forest, and the cursors that were drawn for it."""
    drawn: list[int] = []

    def draw() -> tuple[int, Problem]:
        drawn.append(start + len(drawn))
        return drawn[-1], TASK.problem("train", drawn[-1])

    forest = rollout(
        draw,
        n,
        (fresh(4),),
        step=step,
        seed=3,
        texts=TEXTS,
        sampler=sampler_of(script),
        grade=TASK.grade,
        keep=keep,
        draws=draws,
    )
    return forest, drawn


def some_pass(every: int) -> Callable:
    """Each such problem's first sample passes; the others fail throughout."""
    return lambda r, k: right(r.problem) if r.problem.index % every == every - 1 and k == 0 else "no"


def test_without_a_filter_every_problem_is_kept():
    forest, drawn = run_step(3, script=some_pass(3))
    assert drawn == [0, 1, 2] and [t.problem.index for t in forest.trees] == [0, 1, 2]
    assert forest.filtered == [] and len(forest.samples) == 12


def test_dynamic_sampling_draws_until_the_batch_is_full():
    forest, drawn = run_step(3, keep=mixed, script=some_pass(3), start=2)
    assert [t.problem.index for t in forest.trees] == [2, 5, 8]
    assert drawn == list(range(2, 9))  # never more at a time than are missing, so the last one drawn is kept
    assert [t.problem.index for t in forest.filtered] == [3, 4, 6, 7]
    assert {s.request.problem.index for s in forest.samples} == {2, 5, 8}


def test_dynamic_sampling_ends_at_its_limit_with_what_it_has():
    forest, drawn = run_step(3, keep=mixed, script=some_pass(5), draws=2)
    assert len(drawn) == 6 and [t.problem.index for t in forest.trees] == [4]


@pytest.mark.parametrize(("answer", "solved", "none"), [(right, 4, 0), (lambda p: "no", 0, 4)])
def test_nothing_kept_is_an_error_that_says_why(answer, solved, none):
    with pytest.raises(
        UserError, match=rf"step 8: .* drew 4 problems .* \({solved} solved by every .* {none} by none\)"
    ):
        run_step(2, keep=mixed, script=lambda r, k: answer(r.problem), draws=2, step=7)


def test_a_step_is_the_same_whatever_was_drawn_before():
    one = ids(run_step(2, start=4)[0].trees)
    assert one == ids(run_step(2, start=4)[0].trees)
    assert one[0] == ids(run_step(1, start=4)[0].trees)[0]
    other = ids(run_step(2, start=4, step=1)[0].trees)
    assert [uid for uid, *_ in other[0]] == [uid for uid, *_ in one[0]]
    assert not {s for t in one for _, _, s, _ in t} & {s for t in other for _, _, s, _ in t}


def test_every_sampled_token_is_counted():
    """Filtered groups and re-entered prefixes: what the sampler drew, and nothing else."""
    sampler = sampler_of(some_pass(3))
    drawn = []

    def draw():
        drawn.append(len(drawn))
        return drawn[-1], TASK.problem("train", drawn[-1])

    forest = rollout(draw, 2, (branching,), step=0, seed=0, texts=TEXTS, sampler=sampler, grade=TASK.grade, keep=mixed)
    own = sum(len(s.behavior_logprobs) for t in (*forest.trees, *forest.filtered) for s in t.samples)
    asked = 0
    for request in sampler.requests:
        for k in range(request.n):
            text = some_pass(3)(request, k)
            asked += len(TOKENIZER.encode(text, add_special_tokens=False)) + 1  # and EOS
    assert own == asked
    assert sum(len(s.tokens) - s.branch for t in (*forest.trees, *forest.filtered) for s in t.samples) == own
    assert rollout_metrics(forest)["rollout/filtered"] == len(forest.filtered) > 0


# ---- memory ------------------------------------------------------------------------------------


def test_memory_keeps_what_is_committed():
    memory = Memory()
    assert [memory.next_index(), memory.next_index()] == [0, 1]
    assert memory.state() == {"cursor": 0}  # nothing before the commit
    memory.commit()
    assert memory.state() == {"cursor": 2}
    assert memory.next_index() == 2
    memory["hardness"] = {"a": 1}
    assert "hardness" in memory and memory["hardness"] == {"a": 1}
    memory.rollback()
    assert memory.state() == {"cursor": 2} and "hardness" not in memory
    assert memory.next_index() == 2  # an interrupted step draws the same problems again
    with pytest.raises(KeyError):
        memory["hardness"]


def test_memory_gives_defaults():
    memory = Memory({"cursor": 4})
    assert memory.get("totals", 7) == 7 and memory.get("cursor", 7) == 4
    assert "totals" not in memory
    memory["totals"] = 1
    assert memory.get("totals", 7) == 1


def test_memory_forgets_what_was_changed_in_place():
    memory = Memory({"cursor": 0, "solved": [1]})
    memory["solved"].append(2)
    assert memory["solved"] == [1, 2]
    memory.rollback()
    assert memory["solved"] == [1] == memory.state()["solved"]
    memory["solved"].append(3)
    memory.commit()
    assert memory.state()["solved"] == [1, 3]
    assert Memory(memory.state())["solved"] == [1, 3]


# ---- schedule ----------------------------------------------------------------------------------


def test_exactly_so_many_warm_up_steps():
    warm, middle, last = rloo(), Method(name="middle"), grpo()
    schedule = Schedule(((20, warm), (1, middle), (None, last)))
    assert [schedule.at(step).name for step in range(24)] == ["rloo"] * 20 + ["middle"] + ["grpo"] * 3
    assert schedule.at(10**9) is last
    assert schedule.methods == [warm, middle, last]
    assert constant(warm).at(0) is warm and constant(warm).methods == [warm]


@pytest.mark.parametrize("phases", [(), ((3, 0),), ((0, 0), (None, 0)), ((None, 0), (None, 0)), ((-1, 0), (None, 0))])
def test_phases_that_make_no_sense(phases):
    with pytest.raises(ValueError, match="number of steps of at least 1"):
        Schedule(tuple((steps, grpo()) for steps, _ in phases))


# ---- step ends ---------------------------------------------------------------------------------


def words(*vocabulary: str, byte_level: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly these tokens (after ``<eos>``), or of single bytes."""
    if byte_level:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(("<eos>", *vocabulary))}, unk_token="<eos>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_step_ends_are_token_indices():
    response = "1x+y=3+8=1;2z*7=1*7=7;\\boxed{177}"
    tokens = (*TOKENIZER.encode(response), TOKENIZER.eos_token_id)
    # 11 tokens, 11 more, then "\boxed{" (one token), 1, 7, 7, "}" and EOS
    assert TEXTS.step_ends(tokens) == [11, 22, 28]
    assert TEXTS.step_ends(tokens[:-1]) == [11, 22, 27]
    ends = TEXTS.step_ends(tokens)
    pieces = [TEXTS.decode(tokens[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    assert pieces == TASK.split_steps(response)
    assert TEXTS.step_ends(tokens[:22]) == [11, 22]
    assert TEXTS.step_ends(tokens[:5]) == [5]
    assert TEXTS.step_ends(()) == [] == TEXTS.step_ends((TOKENIZER.eos_token_id,))


def test_a_token_that_straddles_two_steps_belongs_to_the_first():
    tokenizer = words("a", ";b", ";", "c;d;e", "f")
    texts = Texts(TASK, tokenizer)
    # a | ;b | ; | f   is "a;b;f": steps "a;" "b;" "f"; the token ";b" ends the first
    assert texts.step_ends((1, 2, 3, 5)) == [2, 3, 4]
    # a | c;d;e | f  is "ac;d;ef": "ac;" and "d;" both end within the second token
    assert texts.step_ends((1, 4, 5)) == [2, 2, 3]


def test_special_tokens_have_no_length():
    tokenizer = words("a", ";")
    # EOS in the middle stands at the head of the step after it; at the end it belongs to the last step.
    assert Texts(TASK, tokenizer).step_ends((1, 2, 0, 1, 2, 0)) == [2, 6]


def test_a_character_of_several_tokens_is_never_cut():
    tokenizer = words(byte_level=True)

    class Lines(type(TASK)):
        def split_steps(self, response: str) -> list[str]:
            head, mark, tail = response.partition("é")
            return [part for part in (head + mark, tail) if part]

    texts = Texts(Lines(), tokenizer)
    tokens = tuple(tokenizer.encode("aéb", add_special_tokens=False))
    assert len(tokens) == 4
    assert texts.step_ends(tokens) == [3, 4]  # behind both bytes of é, though the first decodes to one character


def test_texts_put_bos_before_every_context():
    problem = TASK.problem("train", 0)
    bos = TOKENIZER.bos_token_id
    assert TEXTS.prompt(problem) == (bos, *TOKENIZER.encode(problem.prompt, add_special_tokens=False))
    assert TEXTS.nothing() == (bos,)
    assert TEXTS.hint(problem, ["12"]) != TEXTS.hint(problem, ["12"], concise=True) != TEXTS.prompt(problem)
    assert Texts(TASK, words("a")).context("") == ()
    with pytest.raises(UserError, match="no BOS"):
        Texts(TASK, words("a")).nothing()
