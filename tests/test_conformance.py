"""The conformance suite: every shipped method keeps what is cheap to test, and every test of the suite catches a
method that is broken in its way. `pytest --pyargs mulligan.conformance` is the whole suite."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, ClassVar

import pytest
import torch

import pytest_mulligan
from mulligan.assign import assign
from mulligan.conformance import bench, plugin, test_declarations, test_determinism, test_invariance, test_masks
from mulligan.conformance.bench import PATTERNS, Case, cases_of, kinds_of
from mulligan.errors import ContractError
from mulligan.learner import update
from mulligan.learner.packing import pack
from mulligan.method import Method
from mulligan.methods import PRESETS
from mulligan.methods.grpo import grpo
from mulligan.methods.srpo import rrpo
from mulligan.objective import START, TokenView
from mulligan.types import FRESH, RESET, Row, Stream, Verdict

# The suite's functions by name; imported as modules, so that pytest does not collect them here too.
SUITE: dict[str, Callable[..., None]] = {
    name: function
    for module in (test_declarations, test_determinism, test_invariance, test_masks)
    for name, function in vars(module).items()
    if name.startswith("test_")
}
QUICK = ("test_the_contract_holds", "test_credit_has_no_hidden_randomness", "test_passes_have_no_hidden_randomness")


def run(name: str, case: Case) -> None:
    """One test of the suite."""
    more = {"budget": 150} if name == "test_micro_batches_change_nothing" else {}
    SUITE[name](case, **more)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the shipped methods -----------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_keeps_what_is_cheap(name):
    """On the last kind of model that it permits, in each phase."""
    cases = {case.method.name: case for case in cases_of(name)}
    for case in cases.values():
        for check in QUICK:
            SUITE[check](case)


def test_one_method_keeps_all_of_it():
    (case,) = cases_of("srpo(chains=2, resets=2)+rltt")
    for name in SUITE:
        run(name, case)


# ---- the forest that they stand on -------------------------------------------------------------


def test_the_script_holds_groups_of_every_kind():
    (case, *_) = cases_of("rrpo")
    first = [tree.of(FRESH) for tree in case.forest.trees]
    passed = [[s.passed for s in group[:4]] for group in first]
    assert len(first) == len(PATTERNS)
    assert passed[0] == [False] * 4 and not any(s.truncated for s in first[0])
    assert passed[1] == [True, False, True, False]
    assert passed[2] == [True] * 4
    assert passed[3] == [False] * 4 and all(s.truncated for s in first[3][:4])
    assert passed[4] == [False] * 4 and [s.truncated for s in first[4][:4]] == [True, False, True, False]
    assert passed[5] == [True, False, True, True]
    for tree in case.forest.trees:  # the grades are the task's own word, not the script's
        assert all(s.grade.verdict in (Verdict.PASS, Verdict.FAIL) for s in tree.samples)
        resets = tree.of(RESET)
        assert not resets or {s.passed for s in resets} == {True, False}
    assert any(s.branch for s in case.forest.samples)
    assert len({len(row.tokens) for row in case.some}) > 3
    signs = {float((row.advantages * row.mask).sum().sign()) for row in case.some}
    assert {row.sample.origin for row in case.some} == {FRESH, RESET} and signs == {-1.0, 0.0, 1.0}


def test_second_rounds_and_diagnoses_occur():
    (lte, *_), (srpo, *_) = cases_of("lte"), cases_of("srpo")
    assert {s.origin for s in lte.forest.samples} == {"fresh", "hinted"}
    assert {row.sample.origin for row in lte.some} == {"fresh", "hinted"}
    assert {s.origin for s in srpo.forest.samples} == {"fresh", "reset", "diagnosis"}


def test_a_method_gets_the_models_that_it_permits():
    assert kinds_of(grpo()) == [("qwen3", 1), ("looped", 3)]
    (case,) = cases_of("rltt")
    assert (case.kind, case.loops, case.label) == ("looped", 3, "rltt-looped")
    assert kinds_of(grpo().replace(credit=Reading(Stream(loop=4)))) == [("looped", 4)]
    assert [case.label for case in cases_of("dsrl")] == [
        "dsrl-phase1-qwen3",
        "dsrl-phase1-looped",
        "dsrl-phase2-qwen3",
        "dsrl-phase2-looped",
    ]


@dataclass(frozen=True)
class Reading:
    """A credit that needs one stream."""

    stream: Stream

    @property
    def reads(self) -> tuple[Stream, ...]:
        return (self.stream,)

    def __call__(self, rows, forest, max_new_tokens):
        return [row.streams[self.stream.name] for row in rows]


# ---- methods that are broken -------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """Any function of the view as a surrogate."""

    of: Callable[[TokenView], torch.Tensor]
    reads: tuple[Stream, ...] = ()

    def __call__(self, view: TokenView) -> torch.Tensor:
        return self.of(view)


@dataclass(frozen=True)
class Credit:
    """Any function of the rows as a credit."""

    of: Callable[[list[Row]], list]
    reads: tuple[Stream, ...] = ()

    def __call__(self, rows, forest, max_new_tokens):
        return self.of(rows)


@dataclass(frozen=True)
class Readout:
    """Any function of the view as the weight of the last loop."""

    of: Callable[[TokenView], float]
    loops: None = None
    exits: bool = False

    def weights(self, view: TokenView):
        return (self.of(view),)


def broken(**parts) -> Method:
    return grpo().replace(name="broken", **parts)


def weighed(weight: Callable[[TokenView], object]) -> Method:
    """REINFORCE times a weight that it should not have."""
    return broken(surrogate=Loss(lambda view: -view.advantages * view.policy_logprobs * weight(view)))


def by_problem(rows: list[Row]) -> list[float]:
    """A baseline that is a sum over all rows of a problem, however many groups it has."""
    totals: dict[str, float] = {}
    for row in rows:
        uid = row.sample.request.problem.uid
        totals[uid] = totals.get(uid, 0.0) + row.reward
    return [row.reward - totals[row.sample.request.problem.uid] / 8 for row in rows]


def by_position(rows: list[Row]) -> list[float]:
    return [row.reward - (0.5 if k < 8 else 0.25) for k, row in enumerate(rows)]


def tossing(problem, tree, ask):
    yield ask.samples(random.randint(4, 40))


COUNTER = count()


def counting(problem, tree, ask):
    """Knows how many problems came before."""
    yield ask.samples(4 + next(COUNTER) % len(PATTERNS))


def row_means(view: TokenView) -> torch.Tensor:
    """Each row's mean advantage, its masked tokens among them."""
    return torch.stack([row.advantages.mean() for row in view.rows])[view.row]


def unheld(view: TokenView) -> torch.Tensor:
    """Pretends to have read a stream."""
    view.read.add(START.name)
    return -view.advantages * view.policy_logprobs


def remembering(value: object) -> Method:
    def remember(forest, memory):
        memory["seen"] = value

    return broken(remember=remember)


# What is broken -> the method, the test of the suite that catches it, and what it says.
BROKEN: dict[str, tuple[Method, str, str]] = {
    "divided by the micro-batch's rows": (
        weighed(lambda view: 20 / len(view.rows)),
        "test_micro_batches_change_nothing",
        "a budget of 150 changes the loss",
    ),
    "a baseline over the micro-batch": (
        broken(surrogate=Loss(lambda v: -v.advantages * v.policy_logprobs * v.policy_logprobs.detach().mean())),
        "test_micro_batches_change_nothing",
        "a budget of 150 changes the loss",
    ),
    "a readout that counts rows": (
        broken(readout=Readout(lambda view: len(view.rows) / 20)),
        "test_padding_changes_nothing",
        "how wide rows are padded changes the gradient",
    ),
    "the first row weighs more": (
        broken(aggregation=lambda rows, most: [(1.0 + (k == 0)) / len(rows) for k in range(len(rows))]),
        "test_the_order_of_rows_changes_nothing",
        "the order of rows changes the loss",
    ),
    "a sum in place of a mean": (
        broken(aggregation=lambda rows, most: [0.01] * len(rows)),
        "test_a_copy_of_every_group_changes_nothing",
        "a copy of every group changes the loss",
    ),
    "groups known by their problem": (
        broken(credit=Credit(by_problem)),
        "test_a_copy_of_every_group_changes_nothing",
        "a copy of every group changes the loss",
    ),
    "credit by position": (
        broken(credit=Credit(by_position)),
        "test_the_order_of_problems_changes_nothing",
        "the order of problems changes the loss",
    ),
    "credit that leaves nothing": (
        broken(credit=Credit(lambda rows: [0.0] * len(rows))),
        "test_padding_changes_nothing",
        "there is no gradient at all",
    ),
    "a gradient without any advantage": (
        broken(surrogate=Loss(lambda view: -(view.advantages + 0.1) * view.policy_logprobs)),
        "test_loss_and_gradient_are_those_of_plain_code",
        "the learner has the loss",
    ),
    "advantages of masked tokens": (
        broken(surrogate=Loss(lambda view: -row_means(view) * view.policy_logprobs)),
        "test_numbers_of_masked_tokens_are_never_read",
        "numbers of masked tokens reach the loss",
    ),
    "a stream that is never read": (
        broken(surrogate=Loss(lambda view: -view.advantages * view.policy_logprobs, (START,))),
        "test_the_contract_holds",
        "broken: declares 'start_logprobs' but never reads it",
    ),
    "advantages that never arrive": (
        broken(surrogate=Loss(lambda view: -view.policy_logprobs)),
        "test_the_contract_holds",
        "broken: its advantages never reach the gradient",
    ),
    "a declaration that nothing holds it to": (
        broken(surrogate=Loss(unheld, (START,))),
        "test_an_undeclared_stream_is_refused",
        "DID NOT RAISE",
    ),
    "random credit": (
        broken(credit=Credit(lambda rows: [row.reward - random.random() for row in rows])),
        "test_credit_has_no_hidden_randomness",
        "the credit gives another advantage",
    ),
    "a random loss": (
        weighed(lambda view: random.random()),
        "test_two_updates_from_one_state_are_equal",
        "two updates from one state differ",
    ),
    "a pass with a coin of its own": (
        broken(passes=(tossing,)),
        "test_passes_have_no_hidden_randomness",
        "two rollouts of one step differ",
    ),
    "a pass that counts problems": (
        broken(passes=(counting,)),
        "test_a_problem_does_not_depend_on_its_neighbours",
        "is sampled otherwise in another order",
    ),
    "memory with a tuple": (
        remembering((1, 2)),
        "test_what_it_remembers_survives_a_checkpoint",
        "is not what a resumed run would read",
    ),
    "memory with a number for a key": (
        remembering({3: 0.5}),
        "test_what_it_remembers_survives_a_checkpoint",
        "is not what a resumed run would read",
    ),
}
WHOLE = Case("whole", grpo(), "qwen3", 1)
CLIPPED = Case("whole", rrpo(3, 2, "clipped"), "qwen3", 1)
CAUGHT = (AssertionError, ContractError, pytest.fail.Exception)


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_method_is_caught(what):
    method, name, says = BROKEN[what]
    run(name, WHOLE)  # it is not the test that is broken
    with pytest.raises(CAUGHT, match=says):
        run(name, Case("broken", method, "qwen3", 1))


# ---- a learner that is broken: what no method can do by itself ---------------------------------


def shifted(items, pad, device, trees):
    """Scores each token where the next one is predicted."""
    batch = pack(items, pad, device, trees)
    last = batch.tokens.shape[1] - 1
    return replace(batch, at=torch.stack([batch.at[:, 0], (batch.at[:, 1] + 1).clamp(max=last)], dim=1))


def forgiving(row, stream, owner):
    """Zeros where a stream is missing, and where it is not finite."""
    return row.streams.setdefault(stream.name, torch.zeros(len(row.tokens))).nan_to_num()


def opened(*given):
    """Trains the prefix too."""
    rows = assign(*given)
    for row in rows:
        row.mask = torch.ones_like(row.mask)
    return rows


@dataclass(frozen=True)
class Clean:
    """A credit whose numbers are made finite."""

    of: Any
    reads: tuple[Stream, ...] = ()

    def __call__(self, *given):
        return [None if a is None else float(torch.as_tensor(a).nan_to_num()) for a in self.of(*given)]


def cleaned(method, *given):
    """Takes an advantage that is not a number for 0."""
    terms = tuple(replace(term, credit=Clean(term.credit)) for term in method.terms)
    return assign(replace(method, terms=terms), *given)


@pytest.mark.parametrize(
    ("module", "name", "mutant", "test"),
    [
        (update, "pack", shifted, "test_masked_tokens_have_no_gradient"),
        (update, "pack", shifted, "test_loss_and_gradient_are_those_of_plain_code"),
        (update, "require", forgiving, "test_a_missing_stream_is_refused"),
        (update, "require", forgiving, "test_a_stream_that_is_not_finite_is_refused"),
        (bench, "assign", opened, "test_a_reentered_prefix_is_never_trained"),
        (bench, "assign", cleaned, "test_an_advantage_that_is_not_finite_is_refused"),
    ],
)
def test_a_broken_learner_is_caught(module, name, mutant, test, monkeypatch):
    run(test, CLIPPED)
    monkeypatch.setattr(module, name, mutant)
    with pytest.raises(CAUGHT):
        run(test, Case("broken", CLIPPED.method, "qwen3", 1))


def test_every_test_of_the_suite_catches_something():
    caught = {name for _, name, _ in BROKEN.values()}
    learner = next(mark for mark in test_a_broken_learner_is_caught.pytestmark if mark.name == "parametrize")
    assert caught | {entry[3] for entry in learner.args[1]} == set(SUITE)


# ---- the command -------------------------------------------------------------------------------

MINE = """
import random

from mulligan.methods.grpo import grpo

right = grpo(group_size=4).replace(name="right")


class Coin:
    reads = ()

    def __call__(self, rows, forest, max_new_tokens):
        return [random.random() for _ in rows]


def wrong(group_size: int = 4):
    return grpo(group_size).replace(name="wrong", credit=Coin())
"""


def test_the_command_runs_from_anywhere_on_a_users_file(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    command = [sys.executable, "-m", "pytest", "--pyargs", "mulligan.conformance", "-q", "-p", "no:cacheprovider"]
    methods = ["--method", "./mine.py:right", "--method", "mine.py:wrong"]
    only = ["-k", "qwen3 and (contract or credit_has)"]
    done = subprocess.run([*command, *methods, *only], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 failed, 3 passed" in done.stdout
    assert "test_credit_has_no_hidden_randomness[mine.py:wrong-qwen3]" in done.stdout


def test_a_session_without_the_suite_never_sees_its_option():
    """The module that every pytest imports loads nothing, and acts on the suite's name alone."""

    class Manager:
        imported: ClassVar[list[str]] = []

        def import_plugin(self, name: str) -> None:
            self.imported.append(name)

    class Config:
        pluginmanager = Manager()

    for args in (["tests"], ["--pyargs", "mulligan"], []):
        pytest_mulligan.pytest_load_initial_conftests(Config(), args)
        assert Manager.imported == []
    for args in (["--pyargs", "mulligan.conformance"], ["site/mulligan/conformance/test_masks.py", "-q"]):
        pytest_mulligan.pytest_load_initial_conftests(Config(), args)
        assert Manager.imported.pop() == "mulligan.conformance.plugin"
    code = "import sys, pytest_mulligan; print([m for m in ('torch', 'mulligan') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_what_cannot_be_built_is_one_line():
    class Config:
        stash = pytest.Stash()

        def getoption(self, name: str) -> list[str]:
            return ["grpo+gprs"]

    with pytest.raises(pytest.UsageError, match=r"^mulligan: method.name: 'gprs' is unknown"):
        plugin.pytest_configure(Config())
