"""Reward functions of a user's own file, called as TRL's trainer calls them."""

import pytest

from mulligan.assign import assign
from mulligan.contract import check_schedule
from mulligan.errors import UserError
from mulligan.measures import rollout_metrics
from mulligan.methods import build_schedule
from mulligan.models.tokenizer import pico_tokenizer
from mulligan.rollout import fresh, rollout
from mulligan.sampling.scripted import ScriptedSampler
from mulligan.tasks import build_task
from mulligan.texts import Texts
from mulligan.types import Verdict
from tests.e2e.test_real_model import byte_level_bpe
from tests.tasks.test_jsonl import write

# As a user of TRL has them: nothing in here knows of Mulligan.
CODE = r"""
import numpy as np

SEEN = []

def length(completions, **kwargs):
    return [-len(text) / 10 for text in completions]

def seen(prompts, completions, completion_ids, answer, tag, **kwargs):
    SEEN.append((prompts, completions, completion_ids, answer, tag, sorted(kwargs)))
    return [0.0] * len(completions)

def only_even(completions, answer):
    return [1.0 if len(text) % 2 == 0 else None for text in completions]

def says_so(completions, tag=None, log_extra=None, trainer_state=None):
    return np.array([tag[at] in text for at, text in enumerate(completions)], dtype=np.float32)

async def later(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]

class Strict:
    def __call__(self, completions, **kwargs):
        return [2] * len(completions)

strict = Strict()

def chat(prompts, completions, **kwargs):
    assert "prompt" not in kwargs
    assert all(prompt[0]["role"] == "user" for prompt in prompts)
    return [float(len(turn[0]["content"])) for turn in completions if turn[0]["role"] == "assistant"]

def short(completions, **kwargs):
    return [1.0]

def nothing(completions, **kwargs):
    return None

def words(completions, **kwargs):
    return ["good"] * len(completions)

def infinite(completions, **kwargs):
    return [float("inf")] * len(completions)

def fails(completions, **kwargs):
    return [kwargs["trainer_state"].global_step] * len(completions)

def needs(completions, target, **kwargs):
    return [0.0] * len(completions)

def never(completions, **kwargs):
    return [None] * len(completions)

CONSTANT = 3
"""


@pytest.fixture
def build(tmp_path):
    (tmp_path / "rw.py").write_text(CODE)
    rows = [{"question": f"What is {i}?", "answer": str(i), "tag": f"t{i % 3}"} for i in range(20)]
    write(tmp_path / "all.jsonl", rows)

    def made(*names, path="all.jsonl", **settings):
        rewards = [f"{tmp_path / 'rw.py'}:{name}" for name in names]
        told = {"verifier": "exact", "rewards": rewards, **settings}
        return build_task("jsonl", {"path": str(tmp_path / path), **told})

    return made


def graded(task, *responses, tokens=()):
    return task.grade(task.problem("train", 0), responses, tokens)


def rewards(task, *responses, tokens=()):
    return [grade.reward for grade in graded(task, *responses, tokens=tokens)]


def test_the_verifier_s_reward_and_the_functions_add_up(build):
    task = build("length", "strict", reward_weights=[1.0, 0.25])
    right = f"\\boxed{{{task.problem('train', 0).answer}}}"
    # Right: 1 + 1 * (-len/10) + 0.25 * 2. Wrong ("12345678"): 0 - 0.8 + 0.5.
    good, bad = graded(task, right, "12345678")
    assert good.reward == pytest.approx(1 - len(right) / 10 + 0.5)
    assert bad.reward == pytest.approx(-0.3)
    assert (good.verdict, bad.verdict) == (
        Verdict.PASS,
        Verdict.FAIL,
    )  # the verdict is the verifier's, whatever the sum
    assert bad.reason == "no final answer"
    only = build("strict", answer_weight=0.0)
    assert rewards(only, right, "no") == [2.0, 2.0]
    assert [g.verdict for g in graded(only, right, "no")] == [Verdict.PASS, Verdict.FAIL]
    assert rewards(build("strict", answer_weight=3.0), right, "no") == [5.0, 2.0]


def test_what_a_function_is_given(build):
    task = build("seen")
    problem = task.problem("train", 3)
    task.grade(problem, ["a", "bc"], [(7,), (8, 9)])
    told = task.rewards.functions[0].call.__globals__["SEEN"][-1]
    row = problem.data["columns"]
    assert told == (
        [row["question"]] * 2,  # without our instruction, as in the data set
        ["a", "bc"],
        [[7], [8, 9]],
        [row["answer"]] * 2,
        [row["tag"]] * 2,
        ["question"],  # every other column
    )


def test_none_does_not_apply(build):
    task = build("only_even", answer_weight=0.0)
    even, odd = graded(task, "ab", "abc")
    assert (even.verdict, even.reward) == (Verdict.FAIL, 1.0)
    assert (odd.verdict, odd.reward, odd.reason) == (Verdict.UNSCORABLE, 0.0, "no reward function applies")
    assert rewards(build("only_even"), "ab", "abc") == [1.0, 0.0]  # the verifier's 0 applies to both
    assert rewards(build("only_even", "strict", answer_weight=0.0), "ab", "abc") == [3.0, 2.0]


def test_signatures_of_all_kinds(build):
    task = build("says_so", "later", answer_weight=0.0)
    tag = task.problem("train", 0).data["columns"]["tag"]
    assert rewards(task, f"x{tag}", "x", tokens=[(1, 2, 3), ()]) == [4.0, 0.0]
    assert graded(task) == []


def test_without_answers(build, tmp_path):
    write(tmp_path / "ask.jsonl", [{"prompt": f"Say {i}."} for i in range(20)])
    task = build("length", path="ask.jsonl", pass_at=-0.5)
    problem = task.problem("train", 0)
    assert (problem.prompt, problem.answer) == (problem.data["question"], "")  # nobody asks for a box
    short, long = task.grade(problem, ["\\boxed{1}"[:5], "123456"], ())
    assert (short.verdict, short.reward, short.answer) == (Verdict.PASS, -0.5, None)
    assert (long.verdict, long.reward) == (Verdict.FAIL, -0.6)
    assert long.reason == "reward -0.6, passes at -0.5"
    assert task.hint(problem, []) == problem.prompt
    assert not task.correct(problem, "1")
    blind = build("length", answer_column="")  # a column that is called `answer` and is none
    assert blind.problem("train", 0).answer == ""
    assert build("length", path="ask.jsonl", instruction="Be brief.").problem("train", 0).prompt.endswith("\nBe brief.")
    with pytest.raises(UserError, match="column 'answer, final_answer or solution' is missing"):
        build(path="ask.jsonl")


def test_messages(build, tmp_path):
    write(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": f"Say {i}."}]} for i in range(20)])
    task = build("chat", path="chat.jsonl")
    assert rewards(task, "abc", "") == [3.0, 0.0]
    assert task.problem("train", 0).prompt == task.problem("train", 0).data["prompt"][0]["content"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "^reward short returned 1 rewards for 2 completions; it must be a list of 2$"),
        ("nothing", "^reward nothing returned NoneType for 2 completions"),
        ("words", "^reward words returned 'good'; a reward is a finite number, or None$"),
        ("infinite", "^reward infinite returned inf; a reward is a finite number, or None$"),
        ("fails", "^reward fails fails: KeyError: 'trainer_state'$"),
        ("needs", "^task.rewards: needs needs 'target', and no column is called so"),
        ("lenght", r"^task\.rewards: .*rw\.py has no 'lenght' \(did you mean 'length'\?\)$"),
        ("CONSTANT", r"rw\.py:CONSTANT is no function$"),
        ("Strict", r"rw\.py:Strict is no function$"),
    ],
)
def test_a_bad_function_is_told_before_anything_runs(build, name, message):
    with pytest.raises(UserError, match=message) as told:
        build(name)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rewards": ["./nowhere.py:f"]}, r"^task\.rewards: nowhere\.py: no such file$"),
        ({"rewards": ["length"]}, r"^task\.rewards: 'length' is no '\./file\.py:function'$"),
        ({"rewards": [], "reward_weights": [1.0]}, "reward_weights has 1 weights for 0 rewards"),
        ({"rewards": [], "answer_weight": 0.5}, "answer_weight weighs the answer against 'rewards'"),
    ],
)
def test_bad_settings(build, settings, message):
    with pytest.raises(UserError, match=message):
        build(**settings)


def test_a_file_that_fails(tmp_path, build):
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UserError, match=r"^task\.rewards: .*broken\.py fails: ZeroDivisionError: division by zero$"):
        build(rewards=[f"{tmp_path / 'broken.py'}:f"])


def test_what_cannot_be_scored_enters_no_statistics(build):
    """Of four samples two get a reward and two get none: advantages and means are those of the two."""
    task, tokenizer = build("only_even", answer_weight=0.0), pico_tokenizer()
    texts = Texts(task, tokenizer)
    said = ["12", "123", "1234", "12345"]
    sampler = ScriptedSampler(tokenizer, lambda request, attempt: (said[attempt], "stop"))
    method = build_schedule("grpo", {"group_size": 4}).schedule.methods[0]
    forest = rollout(
        lambda: (0, task.problem("train", 0)),
        1,
        (fresh(4),),
        step=0,
        seed=0,
        texts=texts,
        sampler=sampler,
        grade=task.grade,
    )
    assert [str(s.grade.verdict) for s in forest.samples] == ["fail", "unscorable", "fail", "unscorable"]
    rows = assign(method, forest, texts, lambda *_: None, 16)
    assert [row.sample.text for row in rows] == ["12", "1234"]
    # Rewards 1 and 1: mean 1, so both advantages are 0. With the others taken for 0 they would be 1.
    assert [float(row.advantages[0]) for row in rows] == [0.0, 0.0]
    numbers = rollout_metrics(forest, rows)
    assert (numbers["rollout/reward"], numbers["rollout/unscorable"]) == (1.0, 2.0)


def test_a_group_that_nobody_can_score_is_no_none_pass(build):
    task, tokenizer = build("only_even", answer_weight=0.0), pico_tokenizer()

    def script(request, attempt):
        problem = request.problem
        right = f"\\boxed{{{problem.answer}}}"
        return (right + ";" * ((len(right) + problem.index) % 2 == 0), "stop")  # of odd length for the first alone

    forest = rollout(
        iter([(0, task.problem("train", 0)), (1, task.problem("train", 1))]).__next__,
        2,
        (fresh(2),),
        step=0,
        seed=0,
        texts=Texts(task, tokenizer),
        sampler=ScriptedSampler(tokenizer, script),
        grade=task.grade,
    )
    numbers = rollout_metrics(forest)
    # Of the one problem that has scored samples, and it is solved.
    assert (numbers["rollout/none_pass"], numbers["rollout/all_pass"]) == (0.0, 1.0)
    assert numbers["rollout/unscorable"] == 2.0


@pytest.mark.parametrize("method", ["grpo", "lte", "srpo"])
def test_methods_hold_the_contract_without_answers(build, tmp_path, method):
    write(tmp_path / "ask.jsonl", [{"prompt": f"{i}+1?"} for i in range(20)])
    task = build("length", path="ask.jsonl")
    problems = [task.problem("train", i) for i in range(2)]
    texts = Texts(task, byte_level_bpe())
    assert check_schedule(build_schedule(method, {}).schedule, task, texts, problems, max_new_tokens=32, loops=1)
