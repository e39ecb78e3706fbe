"""The same state gives the same step, bit for bit: no hidden randomness, no hidden state, no neighbours."""

from __future__ import annotations

import copy
import json

import torch

from mulligan.conformance.bench import MOST, PATTERNS, TOKENIZER, Case, copied, problem_of
from mulligan.learner.update import Learner, Plan
from mulligan.types import Row, Tree


def test_passes_have_no_hidden_randomness(case: Case) -> None:
    """Seeds and the pass's own choices are pure functions of what they are for (``ask.draw_seed``)."""
    again = case.grow()[0]
    assert [_facts(t) for t in again.trees] == [_facts(t) for t in case.forest.trees], "two rollouts of one step differ"


def test_a_problem_does_not_depend_on_its_neighbours(case: Case) -> None:
    """Alone, or last instead of first, a problem is sampled as it was: how rollouts interleave must not matter."""
    cursors = range(len(PATTERNS))
    together, turned = case.grow(cursors)[0].trees, case.grow(cursors[::-1])[0].trees[::-1]
    for tree, other in zip(together, turned, strict=True):
        assert tree.problem == other.problem and problem_of(tree.problem.index) == tree.problem
        assert _facts(tree) == _facts(other), f"{tree.problem.uid} is sampled otherwise in another order"


def test_credit_has_no_hidden_randomness(case: Case) -> None:
    """Select and credit of one forest, twice."""
    again = case.assigned(case.forest)
    assert [row.sample.uid for row in again] == [row.sample.uid for row in case.rows], "other samples are selected"
    for row, other in zip(case.rows, again, strict=True):
        where = f"sample {row.sample.uid}"
        assert torch.equal(row.advantages, other.advantages), f"{where}: the credit gives another advantage"
        assert torch.equal(row.mask, other.mask) and row.group == other.group, f"{where}: another mask or group"


def test_two_updates_from_one_state_are_equal(case: Case) -> None:
    """Weights, bit for bit, after two optimizer steps with AdamW."""
    left, right = (_trained(case, [copied(row) for row in case.some]) for _ in range(2))
    before = case.bench.model.state_dict()
    assert any(not torch.equal(left[name], before[name]) for name in left), "the update changes nothing"
    assert all(torch.equal(left[name], right[name]) for name in left), "two updates from one state differ"


def test_what_it_remembers_survives_a_checkpoint(case: Case) -> None:
    """Memory is written as JSON: a tuple would come back as a list, a number as a key as a string."""
    state = case.grow()[1].state()
    back = json.loads(json.dumps(state))
    assert back == state and repr(back) == repr(state), "what it remembers is not what a resumed run would read"


def _facts(tree: Tree) -> list[tuple[object, ...]]:
    return [(s.uid, s.request, s.attempt, s.tokens, s.finish, s.grade) for s in tree.samples]


def _trained(case: Case, rows: list[Row]) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(case.bench.model)
    plan = Plan(temperature=0.5, max_new_tokens=MOST, updates_per_batch=2, tokens_per_micro_batch=600)
    frozen = case.bench.learner.frozen
    optimizer = torch.optim.AdamW(model.parameters())
    learner = Learner(model, TOKENIZER, optimizer, plan, rate=lambda _: 1e-3, frozen=frozen)
    learner.update(rows, case.method, 0)
    return model.state_dict()
