"""What a step's numbers are, by hand: second rounds, resets and diagnoses."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from mulligan.assign import assign
from mulligan.errors import UserError
from mulligan.measures import mechanism_metrics, rollout_metrics
from mulligan.methods.lte import lte
from mulligan.objective import SAMPLED, START
from mulligan.types import DIAGNOSIS, EXTRA, FRESH, HINTED, RESET, Grade, Row, Sample, Verdict
from tests.helpers import TASK, TEXTS, TOKENIZER, Probe, make_forest, make_row, make_sample, tiny, tokens

PROBLEMS = [TASK.problem("train", i) for i in range(4)]


def of(slot: int, *given: tuple[float, str], origin: str = FRESH, group: int = 0, **more) -> list[Sample]:
    """Samples of a problem by (reward, finish), six tokens each."""
    return [
        make_sample(
            uid=100 * slot + 10 * group + k,
            problem=PROBLEMS[slot],
            context=TEXTS.prompt(PROBLEMS[slot]),
            response=tokens(6, seed=k),
            reward=reward,
            finish=finish,
            origin=origin,
            group=10 * slot + group,
            **more,
        )
        for k, (reward, finish) in enumerate(given)
    ]


STOP, CUT = "stop", "length"
FAIL, PASS, SHORT = (0.0, STOP), (1.0, STOP), (0.0, CUT)


# ---- all samples -------------------------------------------------------------------------------


def test_rollout_metrics():
    some, more = of(0, PASS, FAIL, SHORT), of(3, FAIL, PASS)
    none = [*of(1, FAIL, SHORT), *of(1, PASS, origin=HINTED, group=1)]
    every = [*of(2, PASS, PASS), make_sample(uid=250, group=20, verdict=Verdict.UNSCORABLE, problem=PROBLEMS[2])]
    found = rollout_metrics(make_forest(some, none, every, more))
    # Graded: 3 + 3 + 2 + 2 of 11 samples; passed: 1 + 1 + 2 + 1. Fresh groups: some, none, all, some.
    assert found["rollout/pass"] == found["rollout/reward"] == 5 / 10
    assert (found["rollout/none_pass"], found["rollout/some_pass"], found["rollout/all_pass"]) == (1 / 4, 2 / 4, 1 / 4)
    # Groups whose rewards differ: two of five.
    assert found["rollout/signal"] == 2 / 5
    assert found["rollout/truncated"] == 2 / 10
    assert (found["rollout/length"], found["rollout/entropy"]) == (6.0, 0.5)  # every log-prob is -0.5
    assert (found["rollout/samples"], found["rollout/unscorable"], found["rollout/filtered"]) == (11, 1, 0)
    assert "rollout/process_correct" not in found


def test_own_tokens_alone_are_counted():
    parent = of(0, FAIL)
    (reset,) = of(0, PASS, origin=RESET, group=1, prefix=parent[0].tokens[:4], parent=parent[0].uid)
    assert len(reset.tokens) == 10
    assert rollout_metrics(make_forest([*parent, reset]))["rollout/length"] == 6


def test_empty_responses_have_no_entropy():
    samples = [make_sample(uid=k, response=(), reward=float(k)) for k in range(2)]
    found = rollout_metrics(make_forest(samples))
    assert (found["rollout/length"], found["rollout/entropy"]) == (0.0, 0.0)


def test_process_correctness_is_of_those_that_were_judged():
    samples = of(0, PASS, PASS, FAIL)
    for sample, process in zip(samples, (True, False, None), strict=True):
        sample.grade = Grade(verdict=sample.grade.verdict, reward=sample.grade.reward, process_correct=process)
    assert rollout_metrics(make_forest(samples))["rollout/process_correct"] == 1 / 2


def test_nothing_that_could_be_scored_is_an_error():
    forest = make_forest([make_sample(verdict=Verdict.UNSCORABLE), make_sample(uid=1, verdict=Verdict.UNSCORABLE)])
    with pytest.raises(UserError, match="step 1: the verifier could score none of 2 responses"):
        rollout_metrics(forest)


def test_without_a_mechanism_there_are_no_numbers_of_one():
    assert mechanism_metrics(make_forest(of(0, PASS, FAIL)), [], TEXTS) == {}


# ---- second rounds -----------------------------------------------------------------------------


@pytest.mark.parametrize("origin", [HINTED, EXTRA])
def test_second_rounds(origin):
    forest = make_forest(
        [*of(0, FAIL, FAIL), *of(0, PASS, FAIL, origin=origin, group=1)],  # none truncated, rescued
        [*of(1, FAIL, SHORT), *of(1, FAIL, SHORT, origin=origin, group=1)],  # some, not rescued
        [*of(2, SHORT, SHORT), *of(2, PASS, PASS, origin=origin, group=1)],  # all, rescued
        of(3, FAIL, PASS),
    )
    mentioned = forest.trees[0].of(origin)[0]
    mentioned.grade = Grade(verdict=Verdict.PASS, reward=1.0, mentions_hint=True)
    rows = [make_row(s) for s in (forest.trees[0].samples[0], *forest.trees[2].of(origin))]
    found = mechanism_metrics(forest, rows, TEXTS)
    assert found == {
        "retry/share": 3 / 4,
        "retry/rescued": 2 / 3,
        "retry/pass": 3 / 6,
        "retry/mentions_hint": 1 / 6,
        "retry/trained": 2.0,
        "retry/rescued_none_truncated": 1.0,
        "retry/rescued_some_truncated": 0.0,
        "retry/rescued_all_truncated": 1.0,
    }


def test_the_branch_is_that_of_the_failures():
    unscorable = make_sample(uid=5, problem=PROBLEMS[0], finish=CUT, verdict=Verdict.UNSCORABLE)
    forest = make_forest([*of(0, FAIL), unscorable, *of(0, PASS, origin=HINTED, group=1)])
    found = mechanism_metrics(forest, [], TEXTS)
    assert [key for key in found if "truncated" in key] == ["retry/rescued_none_truncated"]


def test_a_branch_that_did_not_occur_has_no_number():
    forest = make_forest([*of(0, FAIL, FAIL), *of(0, FAIL, origin=HINTED, group=1)])
    found = mechanism_metrics(forest, [], TEXTS)
    assert [key for key in found if "truncated" in key] == ["retry/rescued_none_truncated"]


def with_streams(sample: Sample, start: list[float], sampled: list[float] | None) -> Row:
    row = make_row(sample, 1.0)
    row.streams[START.name] = torch.tensor(start)
    if sampled is not None:
        row.streams[SAMPLED.name] = torch.tensor(sampled)
    return row


def test_hint_reliance():
    """log pi(y|x) - log pi(y|x, hint) by token, then by response; masked tokens are not looked at."""
    forest = make_forest([*of(0, FAIL, FAIL), *of(0, PASS, PASS, origin=HINTED, group=1)])
    plain, _, first, second = forest.trees[0].samples
    rows = [
        with_streams(first, [-1.0] * 6, [-1.0, -1.0, -1.0, -1.0, -1.0 - log(2), -1.0 + log(4)]),
        with_streams(second, [-2.0, -1.0, -9.0, -9.0, -9.0, -9.0], [-1.0, -1.0, 0.0, 0.0, 0.0, 0.0]),
        with_streams(plain, [-5.0] * 6, None),  # without a hint there is nothing to rely on
    ]
    rows[1].mask[2:] = False
    found = mechanism_metrics(forest, rows, TEXTS)
    # Of the first: (log 2 - log 4) / 6; of the second (-1 + 0) / 2. Ratios: (4 + 2 + 1/4) / 6 and (1/e + 1) / 2.
    assert found["retry/hint_reliance"] == pytest.approx((-log(2) / 6 - 0.5) / 2)
    assert found["retry/ratio"] == pytest.approx(((6.25 / 6) + (exp(-1) + 1) / 2) / 2)
    assert found["retry/trained"] == 2


@pytest.mark.parametrize("updates", [1, 2])
def test_hint_reliance_of_a_real_step(updates):
    """From the learner's own streams: log-softmax behind the plain prompt less that behind the hint."""
    hint = TEXTS.hint(PROBLEMS[0], ["123"])
    fresh_ones = of(0, FAIL, FAIL, FAIL)
    (rescue,) = of(0, PASS, origin=HINTED, group=1)
    rescue.request = make_sample(context=hint, problem=PROBLEMS[0], origin=HINTED).request
    forest = make_forest([*fresh_ones, rescue])
    model = tiny("qwen3", torch.float32)
    probe = Probe(model, epochs=updates, rate=0.1)
    expected = []
    for context in (TEXTS.prompt(PROBLEMS[0]), hint):
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *rescue.tokens]])).logits[0]
        table = torch.log_softmax(logits, -1)[len(context) - 1 : -1]
        expected.append(table.gather(1, torch.tensor(rescue.tokens)[:, None])[:, 0])
    method = lte(3)
    rows = assign(method, forest, TEXTS, probe.learner.fill_streams, 10)
    probe.update(rows, method)
    found = mechanism_metrics(forest, rows, TEXTS)
    gap = expected[0] - expected[1]
    assert float(gap.abs().max()) > 0.01
    assert found["retry/hint_reliance"] == pytest.approx(float(gap.mean()), abs=1e-5)
    assert found["retry/ratio"] == pytest.approx(float(gap.exp().mean()), abs=1e-5)


# ---- resets ------------------------------------------------------------------------------------

CHAIN = "1x+y=3;2z*7=7;3x-y=2;" + r"\boxed{177}"  # four steps
TOKENS = (*TOKENIZER.encode(CHAIN), TOKENIZER.eos_token_id)
ENDS = TEXTS.step_ends(TOKENS)


def chain(slot: int, wrong: int | None) -> Sample:
    """A failed chain of four steps, whose first wrong one is known or not."""
    (sample,) = of(slot, FAIL)
    sample.tokens, sample.text = TOKENS, CHAIN
    sample.grade = Grade(verdict=Verdict.FAIL, reward=0.0, first_wrong_step=wrong, steps=4)
    return sample


def resets(parent: Sample, step: int, *rewards: float, group: int = 1) -> list[Sample]:
    """Continuations from before a step (from 1)."""
    slot = parent.uid // 100
    branch = ENDS[step - 2] if step > 1 else 0
    given = [(reward, STOP) for reward in rewards]
    return of(slot, *given, origin=RESET, group=group, prefix=TOKENS[:branch], parent=parent.uid)


def said(parent: Sample, text: str, group: int = 5) -> Sample:
    (sample,) = of(parent.uid // 100, FAIL, origin=DIAGNOSIS, group=group, parent=parent.uid, verdict=Verdict.UNGRADED)
    sample.text = text
    return sample


def test_resets():
    assert len(ENDS) == 4
    parents = [chain(0, 3), chain(1, 2), chain(2, None)]
    forest = make_forest(
        [parents[0], *resets(parents[0], 3, 1.0, 0.0)],
        [parents[1], *resets(parents[1], 1, 1.0)],
        [parents[2], *resets(parents[2], 1, 0.0, 0.0, 1.0)],
        of(3, PASS, PASS),
    )
    found = mechanism_metrics(forest, [], TEXTS)
    # Kept steps: 2, 0 and 0 of 4. Two of four is no longer early. Agreement: of the two that are known, the first.
    assert found == {
        "reset/share": 3 / 4,
        "reset/position": pytest.approx(2 / 4 / 3),
        "reset/to_first": pytest.approx(2 / 3),
        "reset/pass_early": 2 / 4,
        "reset/pass_late": 1 / 2,
        "reset/agreement": 1 / 2,
    }


def test_resets_of_one_kind_and_of_no_oracle():
    parent = chain(0, None)
    found = mechanism_metrics(make_forest([parent, *resets(parent, 4, 1.0)]), [], TEXTS)
    assert found == {"reset/share": 1.0, "reset/position": 3 / 4, "reset/to_first": 0.0, "reset/pass_late": 1.0}


def test_one_step_of_three_is_early():
    parent = chain(0, None)
    parent.tokens = TOKENS[: ENDS[2]]
    found = mechanism_metrics(make_forest([parent, *resets(parent, 2, 1.0)]), [], TEXTS)
    assert found["reset/position"] == pytest.approx(1 / 3) and found["reset/pass_early"] == 1.0


def test_a_parent_of_no_steps_is_reset_to_its_beginning():
    parent = chain(0, 1)
    parent.tokens = (TOKENIZER.eos_token_id,)
    found = mechanism_metrics(make_forest([parent, *resets(parent, 1, 1.0)]), [], TEXTS)
    assert (found["reset/position"], found["reset/to_first"], found["reset/agreement"]) == (0.0, 1.0, 1.0)


def test_two_resets_of_one_chain_are_two():
    parent = chain(0, 2)
    tree = [parent, *resets(parent, 2, 1.0), *resets(parent, 1, 0.0, group=2)]
    found = mechanism_metrics(make_forest(tree), [], TEXTS)
    assert (found["reset/share"], found["reset/position"], found["reset/agreement"]) == (1.0, 1 / 8, 1 / 2)


def test_diagnoses():
    parents = [chain(slot, 2) for slot in range(3)]
    words = [r"\boxed{2}", "", r"\boxed{7}"]  # the second names none, the third none in range
    trees = [[p, said(p, w), *resets(p, 2, 1.0)] for p, w in zip(parents, words, strict=True)]
    trees[0][:0] = of(0, PASS, group=3)  # another chain, of no steps, is not the parent
    found = mechanism_metrics(make_forest(*trees), [], TEXTS)
    assert found["diagnosis/parse_failures"] == pytest.approx(2 / 3)
    assert found["diagnosis/tokens"] == 6
    assert found["reset/agreement"] == 1.0


def test_a_diagnosis_is_in_no_number_of_the_samples():
    parent = chain(0, 2)
    (right,) = of(0, PASS)
    plain = rollout_metrics(make_forest([right, parent]))
    asked = rollout_metrics(make_forest([right, parent, said(parent, "")]))
    assert plain["rollout/signal"] == 1.0
    assert asked == plain | {"rollout/samples": 3.0}
