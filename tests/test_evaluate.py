"""pass@k, maj@k, the bootstrap and the numbers of an evaluation, against cases that are known or can be counted."""

from __future__ import annotations

import json
from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.errors import UserError
from mulligan.evaluate import (
    Column,
    Evaluation,
    bootstrap,
    evaluate,
    macro_average,
    outcomes,
    pass_at_k,
    percentiles,
    resample,
)
from mulligan.majority import Tally, majority_at_k, tally
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


# --- maj@k ----------------------------------------------------------------------------------------------


def literal(left: str, right: str) -> bool:
    return left == right


def by_hand(samples: list[tuple[str | None, bool]], k: int) -> Fraction:
    """The vote in every subset of k; a tie counts as the share of right answers among those that lead."""
    total, subsets = Fraction(0), list(combinations(samples, k))
    for subset in subsets:
        votes: dict[str, list[bool]] = {}
        for answer, passed in subset:
            if answer is not None:
                votes.setdefault(answer, []).append(passed)
        leading = [v for v in votes.values() if len(v) == max(map(len, votes.values()))]
        total += sum((Fraction(v[0], len(leading)) for v in leading), Fraction(0))
    return total / len(subsets)


# Verdicts go with answers: "r" is right, others are wrong, a dot is no answer.
@pytest.mark.parametrize(
    ("said", "k", "expected"),
    [
        ("r", 1, 1.0),
        ("a", 1, 0.0),
        (".", 1, 0.0),
        ("ra", 2, 1 / 2),  # a tie by lot
        ("rab", 3, 1 / 3),
        ("rra", 3, 1.0),
        ("raa", 3, 0.0),
        ("r..", 3, 1.0),  # who has no answer has no vote
        ("r.", 1, 1 / 2),
        # 3 pairs: rr wins, ra twice is a tie: (1 + 1/2 + 1/2) / 3
        ("rra", 2, 2 / 3),
        # 4 triples of rraa: rra twice wins, raa twice loses
        ("rraa", 3, 1 / 2),
        # 4 triples of rrab: rra, rrb win; rab twice is a tie of three: (2 + 2/3) / 4
        ("rrab", 3, 2 / 3),
        # 6 pairs of rra.: rr and r. twice win, ra twice ties, a. loses: (3 + 1) / 6
        ("rra.", 2, 2 / 3),
        ("rrrab", 5, 1.0),
        ("rraab", 5, 1 / 2),
        ("raabb", 5, 0.0),
    ],
)
def test_majority_known(said, k, expected):
    samples = [(None if c == "." else c, c == "r") for c in said]
    assert majority_at_k(tally(samples, literal), k) == pytest.approx(expected)
    assert by_hand(samples, k) == Fraction(expected).limit_denominator(100)


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="rRabcd.", min_size=1, max_size=9), st.data())
def test_majority_is_the_mean_over_all_subsets(said, data):
    """Two answers may both be right, as of a problem that has several."""
    k = data.draw(st.integers(1, len(said)))
    samples = [(None if c == "." else c, c in "rR") for c in said]
    assert majority_at_k(tally(samples, literal), k) == pytest.approx(float(by_hand(samples, k)), abs=1e-12)


def test_majority_of_one_vote_is_pass_at_1():
    for right in range(1, 9):
        votes = Tally(((8 - right, 0), (right, right)), silent=2)
        assert majority_at_k(votes, 1) == pytest.approx(right / 10)


def test_majority_of_many_samples_needs_no_large_number():
    """600 of 1,000 votes are right, 400 alike: of 101 the right ones lead with 51 or more, a hypergeometric tail."""
    exact = sum(Fraction(comb(600, j) * comb(400, 101 - j), comb(1000, 101)) for j in range(51, 102))
    assert majority_at_k(Tally(((400, 0), (600, 600)), 0), 101) == pytest.approx(float(exact), rel=1e-9)


def test_answers_are_counted_by_what_they_mean():
    """2 and 2.0 are one answer; equal texts are compared once, whatever their number."""
    asked = []

    def same(left, right):
        asked.append((left, right))
        return float(left) == float(right)

    samples = [("2", True), ("3", False), ("2.0", True), ("2", True), (None, False), ("3", False)]
    assert tally(samples, same) == Tally(((2, 0), (3, 3)), silent=1)
    assert asked == [("2", "3"), ("2", "2.0")]


def test_an_answer_with_two_verdicts_is_right_in_part():
    """A verdict may see more than the answer; of two votes for the winner one passed."""
    assert majority_at_k(tally([("a", True), ("a", False)], literal), 2) == 0.5


@pytest.mark.parametrize("k", [0, 4])
def test_majority_needs_enough_samples(k):
    with pytest.raises(UserError, match=f"maj@{k} needs"):
        majority_at_k(Tally(((3, 3),), 0), k)


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


def test_a_mean_over_samples_is_resampled_by_problem():
    """Totals 3 of 1 and 0 of 3 samples: resamples of two problems are 3/1, 3/4 (twice as likely) and 0/3."""
    means = resample(np.array([3.0, 0.0]), np.array([1.0, 3.0]), resamples=4000)
    values, counts = np.unique(means, return_counts=True)
    assert values.tolist() == [0.0, 0.75, 3.0]
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert Column(np.array([3.0, 0.0]), np.array([1.0, 3.0])).mean == 0.75
    alike = resample(np.array([3.0, 0.0]), np.array([1.0, 1.0]))
    assert alike.tolist() == resample(np.array([3.0, 0.0]), None).tolist()


def test_blocks_are_one_stream():
    """More resamples begin with fewer."""
    values = np.random.default_rng(0).random(37)
    assert resample(values, None, resamples=600)[:500].tolist() == resample(values, None, resamples=500).tolist()


# --- an evaluation --------------------------------------------------------------------------------------


def tree(
    index: int,
    *verdicts: Verdict,
    process: tuple[bool | None, ...] = (),
    tokens: int = 3,
    texts: tuple[str, ...] = (),
    answers: tuple[str | None, ...] = (),
) -> Tree:
    problem = Problem(task="toy", split="dev", index=index, prompt="?", answer="1")
    request = Request(problem=problem, group=index, n=len(verdicts), context=(1,), seeds=(0,) * len(verdicts))
    completion = Completion(tokens=(5,) * tokens, behavior_logprobs=(-1.0,) * tokens, finish="stop")
    out = Tree(problem)
    for k, verdict in enumerate(verdicts):
        judged = (*process, *[None] * 99)[k]
        grade = Grade(
            verdict=verdict,
            reward=float(verdict is Verdict.PASS),
            process_correct=judged,
            answer=(*answers, *[None] * 99)[k],
        )
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


def evaluation(trees: list[Tree], samples: int, english: bool = False) -> Evaluation:
    return Evaluation([outcomes(t) for t in trees], samples, english)


P, F, U = Verdict.PASS, Verdict.FAIL, Verdict.UNSCORABLE


def test_numbers():
    trees = [tree(0, P, P, F, F), tree(1, F, F, F, F, tokens=5), tree(2, P, F, F, F), tree(3, P, P, P, P)]
    found = evaluation(trees, 4).numbers()
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
    assert evaluation([tree(0, P, *[F] * 15)], 16).numbers()["none_pass"] == pytest.approx(0.5)


def test_process_and_luck():
    """Of three chains with a wrong step, one ends right by luck."""
    trees = [tree(0, P, F, process=(True, False)), tree(1, P, F, process=(False, False))]
    found = evaluation(trees, 2).numbers()
    assert found["process_correct"] == pytest.approx(1 / 4)
    assert found["luck"] == pytest.approx(1 / 3)
    assert evaluation([tree(0, P, process=(True,))], 1).numbers()["luck"] == 0


def test_unscorable_samples_count_apart():
    found = evaluation([tree(0, P, U), tree(1, U, U), tree(2, F, P)], 2).numbers()
    assert (found["problems"], found["unscorable"]) == (2, 3)
    assert found["pass@1"] == pytest.approx((1 + 0.5) / 2)
    # One problem has a single scorable sample: pass@2 is of the other one, and says so.
    assert (found["pass@2"], found["pass@2_problems"]) == (1.0, 1)
    assert "pass@1_problems" not in found
    with pytest.raises(UserError, match="not one response could be scored"):
        evaluation([tree(0, U)], 1).numbers()


def same(problem, left, right):
    return left == right


def test_everything_is_told_when_answers_can_be_compared():
    """maj@2 of the first: pairs rr, ra, ra give (1 + 1/2 + 1/2) / 3; of the second: ab and a., b. give 0."""
    trees = [tree(0, P, P, F, answers=("1", "1", "2")), tree(1, F, F, F, answers=("7", "8"))]
    found = evaluation(trees, 3).numbers(same)
    assert found["maj@2"] == pytest.approx((2 / 3 + 0) / 2)
    assert found["maj@3"] == pytest.approx((1 + 0) / 2)
    assert found["pass@3"] == 0.5
    assert found["avg@3"] == found["pass@1"] == pytest.approx((2 / 3 + 0) / 2)
    plain = evaluation(trees, 3).numbers()
    assert {"maj@2", "avg@3", "length_low"}.isdisjoint(plain)
    assert plain == {key: found[key] for key in plain}
    for name in ("pass@1", "avg@3", "pass@2", "pass@3", "maj@2", "maj@3", "none_pass", "length", "truncated"):
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    assert (found["maj@3_low"], found["maj@3_high"]) == bootstrap([1.0, 0.0])


def test_there_is_no_vote_where_nothing_is_an_answer():
    assert not [key for key in evaluation([tree(0, P, F)], 2).numbers(same) if key.startswith("maj")]


def test_unscorable_responses_have_no_vote():
    """Of P U P only two votes are left: maj@2 is of them, and nobody has three."""
    found = evaluation([tree(0, P, U, P, answers=("1", "9", "1")), tree(1, F, F, F, answers=("2", "2", "2"))], 3)
    numbers = found.numbers(same)
    assert (numbers["maj@2"], numbers["maj@3"], numbers["maj@3_problems"]) == (0.5, 0.0, 1)
    assert numbers["unscorable"] == 1


def test_the_average_counts_each_task_alike():
    """pass@1 of 1 on one problem and of 1/4 on four: 5/8, where all five problems together have 2/5."""
    one = evaluation([tree(0, P, P)], 2).columns()
    four = evaluation([tree(0, P, P), *(tree(i, F, F, tokens=7) for i in range(1, 4))], 2).columns(same)
    found = macro_average([one, four])
    assert found["pass@1"] == 5 / 8
    assert found["length"] == (3 + (3 + 21) / 4) / 2
    assert "avg@2" not in found  # of one alone
    quarter = resample(np.array([1.0, 0, 0, 0]), None, seed=1)
    assert (found["pass@1_low"], found["pass@1_high"]) == pytest.approx(percentiles((1 + quarter) / 2))


def test_tasks_of_one_size_are_resampled_apart():
    """With the same draws for both the interval would be wider: errors of both would always go together."""
    column = {"pass@1": Column(np.array([0.0, 1.0] * 50))}
    both = macro_average([column, column])
    alone = bootstrap([0.0, 1.0] * 50)
    width = both["pass@1_high"] - both["pass@1_low"]
    assert width / (alone[1] - alone[0]) == pytest.approx(2**-0.5, abs=0.05)


# --- English responses ----------------------------------------------------------------------------------

WAIT, OR, SO = "Wait.", "Alternatively.", "So."


def test_thoughts_are_counted_a_response():
    """Four scorable responses with 3, 1, 0 and 2 thoughts: 6 / 4; the unscorable one's do not count."""
    trees = [
        tree(0, P, F, texts=("So.\n\nWait.\n\nWait.", "Alternatively.")),
        tree(1, F, P, U, texts=("", "So.\n\nWait.", "Wait.\n\nWait.")),
    ]
    found = evaluation(trees, 3, english=True).numbers()
    assert (found["thoughts"], found["reflection"], found["transition"]) == (6 / 4, 3 / 4, 1 / 4)
    assert {"thoughts", "reflection", "transition"} & evaluation(trees, 3).numbers().keys() == set()


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
    own = evaluation([tree(0, P, P), tree(1, P, F), tree(2, F, F)], 2)
    base = evaluation([tree(i, F, P) for i in range(3)], 2)
    found = own.relative_to(base)
    low, high = bootstrap([0.5, 0.0, -0.5])
    assert found == {"pass@1_difference": 0, "pass@1_difference_low": low, "pass@1_difference_high": high}
    assert low < 0 < high
    assert base.relative_to(own)["pass@1_difference_low"] == pytest.approx(-high)


def test_the_difference_of_alike_models_is_a_point_however_hard_the_problems_differ():
    """A tenth more on every problem; the shares themselves run from 0 to 0.9, so each mean alone is uncertain."""
    own = evaluation([tree(i, *[P] * (i + 1), *[F] * (9 - i)) for i in range(10)], 10)
    base = evaluation([tree(i, *[P] * i, *[F] * (10 - i)) for i in range(10)], 10)
    found = own.relative_to(base)
    for end in ("", "_low", "_high"):
        assert found[f"pass@1_difference{end}"] == pytest.approx(0.1)
    assert own.numbers()["pass@1_high"] - own.numbers()["pass@1_low"] > 0.2


def test_the_difference_leaves_out_what_one_model_could_not_be_scored_on():
    own = evaluation([tree(0, P, F), tree(1, U, U), tree(2, F, F)], 2)
    base = evaluation([tree(0, F, F), tree(1, F, F), tree(2, U, P)], 2)
    assert own.relative_to(base)["pass@1_difference"] == pytest.approx((0.5 - 1.0) / 2)
    with pytest.raises(UserError, match="of both models"):
        evaluation([tree(0, U)], 1).relative_to(evaluation([tree(0, P)], 1))


def test_thoughts_relative_to_a_base():
    """Reflection 3/2 a response against 1/2, transition 0 against 0; the base's second problem has no pair."""
    own = evaluation([tree(0, P, F, texts=(f"{WAIT}\n\n{WAIT}\n\n{SO}", WAIT)), tree(1, U, U)], 2, english=True)
    base = evaluation([tree(0, P, F, texts=(WAIT, SO)), tree(1, F, F, texts=(WAIT, OR))], 2, english=True)
    found = own.relative_to(base)
    assert (found["reflection_ratio"], found["transition_ratio"]) == (3.0, None)
    found = base.relative_to(own)
    assert (found["reflection_ratio"], found["transition_ratio"]) == (pytest.approx(1 / 3), None)
    own = evaluation([tree(0, P, F, texts=(f"{WAIT}\n\n{WAIT}\n\n{SO}", OR)), tree(1, U, U)], 2, english=True)
    assert own.relative_to(base)["transition_ratio"] is None
    assert base.relative_to(own)["transition_ratio"] == 0.0


def test_only_the_same_problems_are_compared():
    with pytest.raises(AssertionError):
        evaluation([tree(0, P)], 1).relative_to(evaluation([tree(1, P)], 1))
