"""Mutants of methods that the contract must refuse, each by the method's name and the field's."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace

import pytest
import torch

from mulligan.assign import assign
from mulligan.contract import check_schedule, fake_forest
from mulligan.credit import Centered
from mulligan.errors import ContractError, UserError
from mulligan.learner.update import require
from mulligan.method import Method, Term
from mulligan.methods import PRESETS, build_schedule
from mulligan.methods.grpo import grpo
from mulligan.methods.rloo import rloo
from mulligan.objective import KL, REFERENCE, START, Clipped, EntropyBonus, LastLoop, Reinforce, TokenView
from mulligan.schedule import Schedule, constant
from mulligan.select import everything
from mulligan.types import ORIGINS, Forest, Row, Stream, Verdict
from tests.helpers import TASK, TEXTS, Probe, make_forest, make_row, make_sample, tiny, tokens

PROBLEMS = [TASK.problem("train", i) for i in range(2)]


def check(method: Method | Schedule, loops: int = 1) -> list[str]:
    schedule = method if isinstance(method, Schedule) else constant(method)
    return check_schedule(schedule, TASK, TEXTS, PROBLEMS, max_new_tokens=40, loops=loops)


def mutant(**parts) -> Method:
    return grpo().replace(name="mutant", **parts)


# ---- what passes -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes(name):
    schedule = build_schedule(name, {}).schedule
    lines = check(schedule, loops=4)
    assert len(lines) == len(schedule.methods)
    assert all("rows; streams: policy_logprobs" in line for line in lines)


def test_the_fake_batch_holds_every_origin_and_verdict():
    forest = fake_forest(TASK, TEXTS, PROBLEMS)
    for tree in forest.trees:
        assert {s.origin for s in tree.samples} == set(ORIGINS)
        graded = [s for s in tree.samples if s.origin != "diagnosis"]
        assert {s.grade.verdict for s in graded} == {Verdict.PASS, Verdict.FAIL}
        assert any(s.truncated for s in graded) and any(s.branch for s in graded)
    assert len({s.uid for s in forest.samples}) == len(forest.samples)


def test_the_lines_name_what_is_read():
    assert check(grpo(kl=0.1)) == ["grpo: 18 rows; streams: policy_logprobs, reference_logprobs, start_logprobs"]


def test_a_readout_that_fits_passes():
    assert check(mutant(readout=Loops()), loops=3)
    assert check(mutant(readout=Loops(exits=True)), loops=3)


def test_every_phase_is_checked():
    with pytest.raises(ContractError, match=r"^late: "):
        check(Schedule(((3, grpo()), (None, mutant(surrogate=Undeclared()).replace(name="late")))))


# ---- mutants of the loss -----------------------------------------------------------------------


@dataclass(frozen=True)
class Undeclared:
    """PPO's ratio, but the start log-probs are not declared."""

    reads: tuple[Stream, ...] = ()

    def __call__(self, view: TokenView) -> torch.Tensor:
        return -(view.policy_logprobs - view[START]).exp() * view.advantages


@dataclass(frozen=True)
class Unread:
    """Declares the start log-probs, and forgets the ratio."""

    reads: tuple[Stream, ...] = (START,)

    def __call__(self, view: TokenView) -> torch.Tensor:
        return -view.advantages * view.policy_logprobs


@dataclass(frozen=True)
class Surrogate:
    """Any function of the view as a surrogate."""

    loss: object
    reads: tuple[Stream, ...] = ()

    def __call__(self, view: TokenView) -> torch.Tensor:
        return self.loss(view)


@dataclass(frozen=True)
class Regulariser(Surrogate):
    entropy: bool = False


def likelihood(view: TokenView) -> torch.Tensor:
    """What a published release trains: the advantages are computed, and never arrive."""
    return -view.policy_logprobs


WRONG_LOSSES = {
    "undeclared": (Undeclared(), "mutant: reads 'start_logprobs' but does not declare it"),
    "unread": (Unread(), "mutant: declares 'start_logprobs' but never reads it"),
    "likelihood": (Surrogate(likelihood), "mutant: its advantages never reach the gradient"),
    "detached": (
        Surrogate(lambda v: -v.advantages * v.policy_logprobs.detach()),
        "mutant: its advantages never reach the gradient",
    ),
    "no-policy": (Surrogate(lambda v: -v.advantages), "mutant: its advantages never reach the gradient"),
    "half-likelihood": (
        Surrogate(lambda v: -(v.advantages + 0.1) * v.policy_logprobs),
        "mutant: its surrogate has a gradient where the advantage is 0",
    ),
    "mean": (
        Surrogate(lambda v: (-v.advantages * v.policy_logprobs).mean()),
        "mutant: a loss is not one finite number",
    ),
    "column": (
        Surrogate(lambda v: (-v.advantages * v.policy_logprobs)[:, None]),
        "mutant: a loss is not one finite number",
    ),
    "by-row": (
        Surrogate(lambda v: (-v.advantages * v.policy_logprobs)[: len(v.rows)]),
        "mutant: a loss is not one finite number",
    ),
    "nan": (Surrogate(lambda v: v.advantages * v.policy_logprobs.log()), "mutant: a loss is not one finite number"),
    "nan-slope": (
        # The square root of 0: the loss is 0, its slope infinite.
        Surrogate(lambda v: v.advantages * (v.policy_logprobs - v.policy_logprobs.detach()).abs().sqrt()),
        "mutant: the gradient of its surrogate is not finite",
    ),
}


@pytest.mark.parametrize("name", WRONG_LOSSES)
def test_wrong_surrogates_are_refused(name):
    surrogate, message = WRONG_LOSSES[name]
    with pytest.raises(ContractError, match=f"^{message}"):
        check(mutant(surrogate=surrogate))


WRONG_REGULARISERS = {
    "undeclared": (Regulariser(lambda v: v[REFERENCE]), "mutant: reads 'reference_logprobs' but does not declare it"),
    "unread": (
        Regulariser(lambda v: v.policy_logprobs**2, reads=(REFERENCE,)),
        "mutant: declares 'reference_logprobs' but never reads it",
    ),
    "undeclared-entropy": (
        Regulariser(lambda v: -v.entropy()),
        "mutant: reads 'policy_entropy' but does not declare it",
    ),
    "unread-entropy": (
        Regulariser(lambda v: v.policy_logprobs, entropy=True),
        "mutant: declares 'policy_entropy' but never reads it",
    ),
    "scalar": (Regulariser(lambda v: v.policy_logprobs.sum()), "mutant: a loss is not one finite number"),
}


@pytest.mark.parametrize("name", WRONG_REGULARISERS)
def test_wrong_regularisers_are_refused(name):
    regulariser, message = WRONG_REGULARISERS[name]
    with pytest.raises(ContractError, match=f"^{message}"):
        check(mutant(regularisers=(regulariser,)))


def test_right_regularisers_pass():
    assert check(mutant(regularisers=(KL(coefficient=0.1), EntropyBonus(coefficient=0.1))))


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(ContractError, match="mutant: aggregation returned 1 weights for 18 rows"):
        check(mutant(aggregation=lambda rows, n: [1.0]))


# ---- mutants of the readout --------------------------------------------------------------------


@dataclass(frozen=True)
class Loops:
    loops: tuple[int, ...] | None = (1, 2, 3)
    exits: bool = False
    given: object = None

    def weights(self, view: TokenView):
        if self.given is not None:
            return self.given(view)
        return [1 / 3] * 3


@pytest.mark.parametrize(
    ("readout", "loops", "message"),
    [
        (Loops(), 1, r"mutant: its readout reads loops, but the model runs 1 \(it has no loops\)"),
        (Loops((1,)), 1, r"mutant: its readout reads loops, but the model runs 1 \(it has no loops\)"),
        (Loops(None, exits=True), 1, r"mutant: its readout reads loops, but the model runs 1"),
        (Loops((1, 2, 4)), 3, "mutant: its readout reads loop 4, but the model runs 3"),
        (Loops((0, 1, 3)), 3, "mutant: its readout reads loop 0, but the model runs 3"),
        (Loops(), 4, "mutant: its readout reads loops .*, but the last one must be the model's last, 4"),
        (Loops((3, 2, 1)), 3, "mutant: its readout reads loops .*, but the last one must be the model's last, 3"),
        (Loops(()), 3, "mutant: its readout reads loops"),
        (Loops(given=lambda v: (0.5, 0.5)), 3, "mutant: the readout gives a different number of weights than loops"),
        (
            Loops(exits=True, given=lambda v: v.exit_probabilities.split(1, dim=1)),
            3,
            r"mutant: a weight of the readout has shape \(\d+, 1\)",
        ),
    ],
)
def test_wrong_readouts_are_refused(readout, loops, message):
    with pytest.raises(ContractError, match=message):
        check(mutant(readout=readout), loops)


@pytest.mark.parametrize(
    ("stream", "loops", "message"),
    [
        (Stream(loop=4), 3, "mutant: reads 'start_logprobs#4', but the model runs 3"),
        (Stream(loop=1), 1, r"mutant: reads 'start_logprobs#1', but the model runs 1 \(it has no loops\)"),
        (Stream(quantity="exit_probability"), 1, "mutant: reads 'start_exit_probability', but the model runs 1"),
        (Stream(context="hinted"), 1, "mutant: a stream's context 'hinted' is unknown"),
    ],
)
def test_streams_that_the_model_cannot_give_are_refused(stream, loops, message):
    with pytest.raises(ContractError, match=message):
        check(mutant(credit=Reads((stream,), (stream,))), loops)


# ---- mutants of select and credit --------------------------------------------------------------


@dataclass(frozen=True)
class Reads:
    """A credit that declares some streams and reads others."""

    reads: tuple[Stream, ...] = ()
    wants: tuple[Stream, ...] = ()

    def __call__(self, rows, forest, max_new_tokens):
        return [1.0 + sum(float(row.streams[s.name].mean()) for s in self.wants) for row in rows]


@dataclass(frozen=True)
class Gives:
    """A credit that is any function of the rows."""

    give: object
    reads: tuple[Stream, ...] = field(default=())

    def __call__(self, rows, forest, max_new_tokens):
        return self.give(rows)


def test_the_credits_streams_are_checked_like_the_losss():
    hinted = Stream(context="sampling")
    assert check(mutant(credit=Reads((hinted,), (hinted,))))
    with pytest.raises(ContractError, match="mutant: its credit declares 'start_logprobs@sampling' but never reads it"):
        check(mutant(credit=Reads((hinted,))))
    with pytest.raises(
        ContractError, match="mutant: its credit reads 'start_logprobs@sampling' but does not declare it"
    ):
        check(mutant(credit=Reads((), (hinted,))))


def test_one_terms_streams_do_not_serve_another():
    hinted = Stream(context="sampling")
    terms = (Term(credit=Reads((hinted,), (hinted,))), Term(credit=Reads((), (hinted,))))
    with pytest.raises(ContractError, match="mutant: its credit reads 'start_logprobs@sampling'"):
        check(Method(name="mutant", terms=terms))


def ones(row: Row) -> torch.Tensor:
    return torch.ones(len(row.tokens))


WRONG_CREDITS = {
    "too-few": (lambda rows: [0.0] * (len(rows) - 1), "mutant: credit returned 17 advantages for 18 rows"),
    "too-many": (lambda rows: [0.0] * (len(rows) + 1), "mutant: credit returned 19 advantages for 18 rows"),
    "short": (lambda rows: [ones(r)[1:] for r in rows], r"mutant: an advantage has shape \(\d+,\), not \(\d+,\)"),
    "column": (lambda rows: [ones(r)[:, None] for r in rows], r"mutant: an advantage has shape \(\d+, 1\)"),
    "scalar-tensor": (lambda rows: [torch.ones(()) for r in rows], r"mutant: an advantage has shape \(\)"),
    "nan": (lambda rows: [math.nan] * len(rows), "mutant: an advantage of chain/train/0 is not finite"),
    "inf": (lambda rows: [math.inf] * len(rows), "mutant: an advantage of chain/train/0 is not finite"),
    "nan-token": (
        lambda rows: [torch.where(torch.arange(len(r.tokens)) == 2, math.nan, 1.0) for r in rows],
        "mutant: an advantage of chain/train/0 is not finite",
    ),
    "all-dropped": (lambda rows: [None] * len(rows), "mutant: its select, credit and mask leave no token"),
}


@pytest.mark.parametrize("name", WRONG_CREDITS)
def test_wrong_credits_are_refused(name):
    give, message = WRONG_CREDITS[name]
    with pytest.raises(ContractError, match=message):
        check(mutant(credit=Gives(give)))


def with_mask(make):
    def select(forest: Forest) -> list[Row]:
        rows = everything(forest)
        for row in rows:
            row.mask = make(row)
        return rows

    return select


WRONG_SELECTS = {
    "nothing": (lambda forest: [], "mutant: its select, credit and mask leave no token"),
    "mask-empty": (with_mask(lambda r: ones(r) < 0), "mutant: its select, credit and mask leave no token"),
    "mask-short": (with_mask(lambda r: ones(r)[1:] > 0), r"mutant: a mask is torch.bool \(\d+,\), not torch.bool"),
    "mask-one": (with_mask(lambda r: torch.ones(1) > 0), r"mutant: a mask is torch.bool \(1,\), not torch.bool"),
    "mask-float": (with_mask(ones), r"mutant: a mask is torch.float32 \(\d+,\), not torch.bool"),
}


@pytest.mark.parametrize("name", WRONG_SELECTS)
def test_wrong_selects_are_refused(name):
    select, message = WRONG_SELECTS[name]
    with pytest.raises(ContractError, match=message):
        check(mutant(select=select))


def test_a_mask_never_opens_the_prefix():
    samples = [make_sample(uid=i, prefix=(5, 6), response=(7, 8, 9), reward=float(i)) for i in range(2)]
    method = mutant(select=with_mask(lambda r: ones(r) > 0))
    rows = assign(method, make_forest(samples), TEXTS, lambda *_: None, 10)
    assert [row.mask.tolist() for row in rows] == [[False, False, True, True, True]] * 2
    assert [row.advantages[:2].tolist() for row in rows] == [[0, 0]] * 2


def test_a_select_may_mask_spans():
    samples = [make_sample(uid=i, response=(7, 8, 9), reward=float(i)) for i in range(2)]
    method = mutant(select=with_mask(lambda r: torch.tensor([True, False, True])))
    rows = assign(method, make_forest(samples), TEXTS, lambda *_: None, 10)
    assert [row.mask.tolist() for row in rows] == [[True, False, True]] * 2


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_refused(reward):
    samples = [make_sample(uid=0), make_sample(uid=1, reward=reward, verdict=Verdict.FAIL)]
    with pytest.raises(ContractError, match=r"^mutant: the reward of toy/train/1 is (nan|inf)"):
        assign(mutant(), make_forest(samples), TEXTS, lambda *_: None, 10)


# ---- the learner -------------------------------------------------------------------------------


def rows_for_update(reads: Stream = START) -> list[Row]:
    rows = [make_row(make_sample(uid=i, response=tokens(4 + i, seed=i)), 1.0 - 2 * i) for i in range(2)]
    for row in rows:
        row.streams[reads.name] = torch.full((len(row.tokens),), -1.0)
    return rows


def spoil(value):
    def change(row: Row) -> None:
        row.streams[REFERENCE.name] = value(row)

    return change


MISSING = {
    "missing": (lambda row: row.streams.pop(REFERENCE.name), "'reference_logprobs' is missing in the row of sample 1"),
    "none": (spoil(lambda row: None), "'reference_logprobs' is missing in the row of sample 1"),
    "short": (spoil(lambda row: torch.ones(4)), r"'reference_logprobs' has shape \(4,\), not \(5,\)"),
    "column": (spoil(lambda row: torch.ones(5, 1)), r"'reference_logprobs' has shape \(5, 1\), not \(5,\)"),
    "nan": (
        spoil(lambda row: torch.tensor([0.0, math.nan, 0.0, 0.0, 0.0])),
        "'reference_logprobs' is not finite in the row of sample 1",
    ),
    "infinite": (
        spoil(lambda row: torch.full((5,), -math.inf)),
        "'reference_logprobs' is not finite in the row of sample 1",
    ),
}


@pytest.mark.parametrize("name", MISSING)
def test_the_learner_requires_every_declared_stream(name):
    change, message = MISSING[name]
    model = tiny("qwen3")
    before = copy.deepcopy(model.state_dict())
    rows = rows_for_update(REFERENCE)
    change(rows[1])
    with pytest.raises(ContractError, match=f"^mutant: {message}"):
        require(rows[1], REFERENCE, "mutant")
    probe = Probe(model, rate=0.1)
    with pytest.raises(ContractError, match=f"^mutant: {message}"):
        probe.update(rows, mutant(regularisers=(KL(coefficient=0.1),)))
    assert_unchanged(probe, before)


def assert_unchanged(probe: Probe, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(before[k], v) for k, v in probe.model.state_dict().items())
    assert probe.learner.updates == 0 and not probe.gradients
    assert not probe.model.training  # left as it came


def test_start_logprobs_that_one_row_lacks_are_missed():
    rows = rows_for_update()
    del rows[1].streams[START.name]
    with pytest.raises(ContractError, match=r"mutant: 'start_logprobs' is missing in the row of sample 1"):
        Probe(tiny("qwen3")).update(rows, mutant())


@pytest.mark.parametrize("name", ["mean", "column", "by-row"])
def test_the_learner_refuses_a_loss_of_another_shape(name):
    surrogate, _ = WRONG_LOSSES[name]
    with pytest.raises(ContractError, match=r"^mutant: a loss has shape .*, not \(9,\): one number a token"):
        Probe(tiny("qwen3")).update(rows_for_update(), mutant(surrogate=surrogate))


NOT_FINITE = {
    "loss": (Surrogate(lambda v: v.advantages * v.policy_logprobs * math.nan), "loss"),
    "infinite-loss": (Surrogate(lambda v: v.policy_logprobs * math.inf), "loss"),
    "gradient": (WRONG_LOSSES["nan-slope"][0], "gradient"),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_a_loss_or_gradient_that_is_not_finite_leaves_the_weights(name):
    surrogate, what = NOT_FINITE[name]
    model = tiny("qwen3")
    before = copy.deepcopy(model.state_dict())
    probe = Probe(model, rate=0.1, clip_norm=1.0)
    with pytest.raises(UserError, match=rf"^step 8: mutant's {what} is not finite"):
        probe.learner.update(rows_for_update(), mutant(surrogate=surrogate), 7)
    assert_unchanged(probe, before)
    # And the next update is as if nothing had been.
    fresh = Probe(tiny("qwen3"), rate=0.1, clip_norm=1.0)
    for learner in (probe, fresh):
        learner.learner.update(rows_for_update(), rloo(), 8)
    assert all(torch.equal(v, fresh.model.state_dict()[k]) for k, v in model.state_dict().items())


def test_a_second_update_that_fails_leaves_the_first():
    calls = []

    def once(view: TokenView) -> torch.Tensor:
        calls.append(1)
        return -view.advantages * view.policy_logprobs * (1.0 if len(calls) == 1 else math.nan)

    model = tiny("qwen3")
    probe = Probe(model, rate=0.1, epochs=2)
    with pytest.raises(UserError, match="weights are those of the update before"):
        probe.update(rows_for_update(), mutant(surrogate=Surrogate(once)))
    assert probe.learner.updates == 1
    one = Probe(tiny("qwen3"), rate=0.1)
    one.update(rows_for_update(), mutant(surrogate=Reinforce()))
    assert all(torch.equal(v, one.model.state_dict()[k]) for k, v in model.state_dict().items())


def test_snapshots_put_weights_and_optimizer_back():
    probe = Probe(tiny("qwen3"), rate=0.1)
    before = copy.deepcopy(probe.model.state_dict())
    restore = probe.learner.snapshot()
    probe.update(rows_for_update(), rloo())
    assert probe.learner.updates == 1
    restore()
    assert probe.learner.updates == 0
    assert all(torch.equal(before[k], v) for k, v in probe.model.state_dict().items())


# ---- composition -------------------------------------------------------------------------------


def test_replace_names_what_it_cannot_change():
    with pytest.raises(ValueError, match="a method has no part 'surogate'"):
        grpo().replace(surogate=Reinforce())
    two = Method(name="two", terms=(Term(), Term(weight=0.5)))
    with pytest.raises(ValueError, match="two has 2 terms"):
        two.replace(credit=Centered())
    changed = grpo().replace(name="mine", surrogate=Clipped(high=0.28), terms=(Term(weight=2.0),))
    assert changed.name == "mine"
    assert changed.terms == (replace(Term(weight=2.0), surrogate=Clipped(high=0.28)),)
    assert grpo().terms[0].readout == LastLoop()
