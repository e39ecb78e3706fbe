"""pass@k, the bootstrap and the numbers of an evaluation, against cases that are known or can be counted."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest

from mulligan.errors import UserError
from mulligan.evaluate import Evaluation, bootstrap, evaluate, pass_at_k
from mulligan.sampling.scripted import ScriptedSampler
from mulligan.tasks.jsonl import Jsonl, JsonlSettings
from mulligan.texts import Texts
from mulligan.types import Completion, Grade, Problem, Request, Sample, Tree, Verdict
from tests.helpers import TASK, TEXTS, TOKENIZER

# --- pass@k ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "correct", "k", "expected"),
    [(1, 0, 1, 0.0), (1, 1, 1, 1.0), (4, 1, 2, 0.5), (10, 3, 1, 0.3), (5, 2, 3, 0.9), (8, 1, 8, 1.0), (8, 0, 8, 0.0)],
)
def test_pass_at_k_known(n, correct, k, expected):
    assert pass_at_k(n, correct, k) == pytest.approx(expected)


def test_pass_at_k_is_the_share_of_subsets_with_a_pass():
    for n in range(1, 7):
        for correct in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations(range(n), k))
                share = sum(min(s) < correct for s in subsets) / len(subsets)
                assert pass_at_k(n, correct, k) == pytest.approx(share)


@pytest.mark.parametrize("k", [0, 5, -1])
def test_pass_at_k_needs_enough_samples(k):
    with pytest.raises(UserError, match=f"pass@{k} needs"):
        pass_at_k(4, 2, k)


# --- bootstrap ------------------------------------------------------------------------------------------


def test_bootstrap_of_equal_values_is_a_point():
    assert bootstrap([0.25] * 7) == (0.25, 0.25)
    assert bootstrap([1.0]) == (1.0, 1.0)


def test_bootstrap_is_the_normal_interval_for_many_values():
    values = np.random.default_rng(0).random(2000)
    low, high = bootstrap(values.tolist())
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.002)
    assert high == pytest.approx(values.mean() + half, abs=0.002)


def test_bootstrap_of_a_few_coins_is_the_binomial():
    """Means of resamples of 3 passes in 10 are binomial: its 2.5 % and 97.5 % points are 0 or 0.1, and 0.6."""
    assert bootstrap([1.0] * 3 + [0.0] * 7) == (pytest.approx(0.05, abs=0.051), pytest.approx(0.6))


def test_bootstrap_is_reproducible_and_has_a_seed():
    values = [0.0, 0.3, 0.4, 0.9, 0.1, 0.77, 0.31]
    assert bootstrap(values) == bootstrap(values)
    assert bootstrap(values, resamples=50) != bootstrap(values, resamples=50, seed=1)


def test_bootstrap_covers_the_truth():
    """About 95 % of intervals over problems hold the true mean."""
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        low, high = bootstrap(rng.binomial(4, 0.3, size=100) / 4, resamples=400)
        hits += low <= 0.3 <= high
    assert 180 <= hits <= 199


# --- an evaluation --------------------------------------------------------------------------------------


def tree(
    index: int,
    *verdicts: Verdict,
    process: tuple[bool | None, ...] = (),
    tokens: int = 3,
    texts: tuple[str, ...] = (),
) -> Tree:
    problem = Problem(task="toy", split="dev", index=index, prompt="?", answer="1")
    request = Request(problem=problem, group=index, n=len(verdicts), context=(1,), seeds=(0,) * len(verdicts))
    completion = Completion(tokens=(5,) * tokens, behavior_logprobs=(-1.0,) * tokens, finish="stop")
    out = Tree(problem)
    for k, verdict in enumerate(verdicts):
        judged = (*process, *[None] * 99)[k]
        grade = Grade(verdict=verdict, reward=float(verdict is Verdict.PASS), process_correct=judged)
        out.samples.append(
            Sample(
                uid=k,
                request=request,
                attempt=k,
                tokens=completion.tokens,
                behavior_logprobs=completion.behavior_logprobs,
                finish="length" if k == 0 else "stop",
                text=(*texts, *[""] * 99)[k],
                grade=grade,
            )
        )
    return out


P, F, U = Verdict.PASS, Verdict.FAIL, Verdict.UNSCORABLE


def test_numbers():
    trees = [tree(0, P, P, F, F), tree(1, F, F, F, F, tokens=5), tree(2, P, F, F, F), tree(3, P, P, P, P)]
    found = Evaluation(trees, 4).numbers()
    assert found["pass@1"] == pytest.approx((0.5 + 0 + 0.25 + 1) / 4)
    assert found["pass@2"] == pytest.approx((5 / 6 + 0 + 0.5 + 1) / 4)
    assert found["pass@4"] == pytest.approx(3 / 4)
    assert "pass@8" not in found and "pass@3" not in found
    assert found["none_pass"] == 1 / 4
    assert found["pass@1_low"] <= found["pass@1"] <= found["pass@1_high"]
    assert (found["length"], found["truncated"]) == (3.5, 1 / 4)
    assert (found["problems"], found["samples"], found["unscorable"]) == (4, 4, 0)
    assert "process_correct" not in found and "luck" not in found


def test_none_pass_is_of_eight_samples_when_there_are_more():
    """One of 16 passes: half of all sets of 8 hold none."""
    assert Evaluation([tree(0, P, *[F] * 15)], 16).numbers()["none_pass"] == pytest.approx(0.5)


def test_process_and_luck():
    """Of three chains with a wrong step, one ends right by luck."""
    trees = [tree(0, P, F, process=(True, False)), tree(1, P, F, process=(False, False))]
    found = Evaluation(trees, 2).numbers()
    assert found["process_correct"] == pytest.approx(1 / 4)
    assert found["luck"] == pytest.approx(1 / 3)
    assert Evaluation([tree(0, P, process=(True,))], 1).numbers()["luck"] == 0


def test_unscorable_samples_count_apart():
    found = Evaluation([tree(0, P, U), tree(1, U, U), tree(2, F, P)], 2).numbers()
    assert (found["problems"], found["unscorable"]) == (2, 3)
    assert found["pass@1"] == pytest.approx((1 + 0.5) / 2)
    assert "pass@2" not in found  # one problem has a single scorable sample
    with pytest.raises(UserError, match="not one response could be scored"):
        Evaluation([tree(0, U)], 1).numbers()


# --- English responses ----------------------------------------------------------------------------------

WAIT, OR, SO = "Wait.", "Alternatively.", "So."


def test_thoughts_are_counted_a_response():
    """Four scorable responses with 3, 1, 0 and 2 thoughts: 6 / 4; the unscorable one's do not count."""
    trees = [
        tree(0, P, F, texts=("So.\n\nWait.\n\nWait.", "Alternatively.")),
        tree(1, F, P, U, texts=("", "So.\n\nWait.", "Wait.\n\nWait.")),
    ]
    found = Evaluation(trees, 3, english=True).numbers()
    assert (found["thoughts"], found["reflection"], found["transition"]) == (6 / 4, 3 / 4, 1 / 4)
    assert {"thoughts", "reflection", "transition"} & Evaluation(trees, 3).numbers().keys() == set()


def test_an_evaluation_knows_whether_its_task_is_english(tmp_path):
    """Two problems of two scripted responses: 1, 2, 3 and 1 thoughts, one of them reflection, two transition."""
    rows = tmp_path / "test.jsonl"
    rows.write_text("".join(json.dumps({"question": f"{i}+1", "answer": str(i + 1)}) + "\n" for i in range(2)))
    task = Jsonl(JsonlSettings(path=str(tmp_path)))
    said = {
        "jsonl/test/0": ["\\boxed{1}", "wait, no.\n\n\\boxed{3}"],
        "jsonl/test/1": ["1+1\n\nanother way\n\nalternatively \\boxed{2}", "\\boxed{2}"],
    }
    found = evaluate(
        task, Texts(task, TOKENIZER), ScriptedSampler(TOKENIZER, said), split="test", problems=9, samples=2
    ).numbers()
    assert (found["thoughts"], found["reflection"], found["transition"]) == (7 / 4, 1 / 4, 2 / 4)
    assert found["pass@1"] == 3 / 4
    sampler = ScriptedSampler(TOKENIZER, lambda request, attempt: "wait")
    assert "thoughts" not in evaluate(TASK, TEXTS, sampler, split="test", problems=1, samples=1).numbers()


# --- two models -----------------------------------------------------------------------------------------


def test_the_difference_is_paired_by_problem():
    """Shares 1, 1/2, 0 against 1/2, 1/2, 1/2: gains of 1/2, 0 and -1/2."""
    own = Evaluation([tree(0, P, P), tree(1, P, F), tree(2, F, F)], 2)
    base = Evaluation([tree(i, F, P) for i in range(3)], 2)
    found = own.relative_to(base)
    low, high = bootstrap([0.5, 0.0, -0.5])
    assert found == {"pass@1_difference": 0, "pass@1_difference_low": low, "pass@1_difference_high": high}
    assert low < 0 < high
    assert base.relative_to(own)["pass@1_difference_low"] == pytest.approx(-high)


def test_the_difference_of_alike_models_is_a_point_however_hard_the_problems_differ():
    """A tenth more on every problem; the shares themselves run from 0 to 0.9, so each mean alone is uncertain."""
    own = Evaluation([tree(i, *[P] * (i + 1), *[F] * (9 - i)) for i in range(10)], 10)
    base = Evaluation([tree(i, *[P] * i, *[F] * (10 - i)) for i in range(10)], 10)
    found = own.relative_to(base)
    for end in ("", "_low", "_high"):
        assert found[f"pass@1_difference{end}"] == pytest.approx(0.1)
    assert own.numbers()["pass@1_high"] - own.numbers()["pass@1_low"] > 0.2


def test_the_difference_leaves_out_what_one_model_could_not_be_scored_on():
    own = Evaluation([tree(0, P, F), tree(1, U, U), tree(2, F, F)], 2)
    base = Evaluation([tree(0, F, F), tree(1, F, F), tree(2, U, P)], 2)
    assert own.relative_to(base)["pass@1_difference"] == pytest.approx((0.5 - 1.0) / 2)
    with pytest.raises(UserError, match="of both models"):
        Evaluation([tree(0, U)], 1).relative_to(Evaluation([tree(0, P)], 1))


def test_thoughts_relative_to_a_base():
    """Reflection 3/2 a response against 1/2, transition 0 against 0; the base's second problem has no pair."""
    own = Evaluation([tree(0, P, F, texts=(f"{WAIT}\n\n{WAIT}\n\n{SO}", WAIT)), tree(1, U, U)], 2, english=True)
    base = Evaluation([tree(0, P, F, texts=(WAIT, SO)), tree(1, F, F, texts=(WAIT, OR))], 2, english=True)
    found = own.relative_to(base)
    assert (found["reflection_ratio"], found["transition_ratio"]) == (3.0, None)
    found = base.relative_to(own)
    assert (found["reflection_ratio"], found["transition_ratio"]) == (pytest.approx(1 / 3), None)
    own.trees[0].samples[1].text = OR
    assert own.relative_to(base)["transition_ratio"] is None
    assert base.relative_to(own)["transition_ratio"] == 0.0


def test_only_the_same_problems_are_compared():
    with pytest.raises(AssertionError):
        Evaluation([tree(0, P)], 1).relative_to(Evaluation([tree(1, P)], 1))
