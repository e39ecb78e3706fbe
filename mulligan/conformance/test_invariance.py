"""What must not change loss or gradient: how a step is cut, ordered and padded, and how often every group is there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mulligan.conformance.bench import WIDE, Case, assert_equal_updates
from mulligan.conformance.reference import plain_update
from mulligan.types import Forest, Row, Sample, Tree


@pytest.mark.parametrize("budget", [150, 600])
def test_micro_batches_change_nothing(case: Case, budget: int) -> None:
    """Denominators are the step's, whatever the token budget cuts it into."""
    whole = case.bench.update(case.some, case.method)
    assert_equal_updates(whole, case.bench.update(case.some, case.method, budget), f"a budget of {budget} changes")


def test_the_order_of_rows_changes_nothing(case: Case) -> None:
    """Neither a loss nor a weight depends on which row comes first: one with an advantage, or one without."""
    rows = sorted(case.some, key=lambda row: -float((row.advantages * row.mask).abs().sum()))
    whole = case.bench.update(rows, case.method)
    assert_equal_updates(whole, case.bench.update(rows[::-1], case.method), "the order of rows changes")


def test_padding_changes_nothing(case: Case) -> None:
    """Neither how wide rows are padded (all to the longest, or not at all) nor with what."""
    padded = case.bench.update(case.some, case.method, WIDE, pad=0)
    assert_equal_updates(padded, case.bench.update(case.some, case.method, WIDE, pad=9), "what pads a batch changes")
    assert_equal_updates(padded, case.bench.update(case.some, case.method, 1), "how wide rows are padded changes")


def test_a_copy_of_every_group_changes_nothing(case: Case) -> None:
    """Loss and gradient are means: twice the batch is the same batch. So no denominator is forgotten, none is a
    constant of the batch's size, and no group is known by its problem or its text."""
    twice = Forest(case.forest.step, [*case.forest.trees, *(_copy(tree) for tree in case.forest.trees)])
    rows = case.assigned(twice)
    assert len(rows) == 2 * len(case.rows), f"{len(case.rows)} rows of the batch, {len(rows)} of the batch twice"
    whole = case.bench.update(case.rows, case.method)
    assert_equal_updates(whole, case.bench.update(rows, case.method), "a copy of every group changes")


def test_the_order_of_problems_changes_nothing(case: Case) -> None:
    """Credit and select go by group, not by position."""
    turned = Forest(case.forest.step, case.forest.trees[::-1])
    whole = case.bench.update(case.rows, case.method)
    other = case.bench.update(case.assigned(turned), case.method)
    assert_equal_updates(whole, other, "the order of problems changes")


def test_loss_and_gradient_are_those_of_plain_code(case: Case) -> None:
    """The learner's chunks, micro-batches and rows left out against a softmax over everything, row by row."""
    near = 1e-6 if case.kind == "qwen3" else 1e-9
    rows: list[Row] = case.some
    assert_equal_updates(plain_update(case, rows), case.bench.update(rows, case.method, 300), "the learner has", near)


def _copy(tree: Tree) -> Tree:
    """The same samples as other samples: with uids and group ids of their own."""
    shift = 1 << 40

    def copy(sample: Sample) -> Sample:
        request = sample.request
        parent = None if request.parent is None else request.parent + shift
        return replace(
            sample, uid=sample.uid + shift, request=replace(request, group=request.group + shift, parent=parent)
        )

    return Tree(tree.problem, [copy(sample) for sample in tree.samples])
