"""The kernels of attention over trees against the whole table of scores, and against themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.learner.trees import plant
from mulligan.models.attention import Branches, tree_attention
from mulligan.native.trees import Layout
from tests.helpers import needs_compiler
from tests.learner.test_trees import families, visible

pytestmark = needs_compiler

several = settings(max_examples=60, deadline=None, derandomize=True)


def table(q, k, v, branches, scale):
    """Attention in float64, taken literally."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * scale).masked_fill(~visible(branches, q.shape[2]), -torch.inf)
    return scores.softmax(-1) @ v


def near(found, right, off):
    """As a part of the largest."""
    found, right = found.detach().double(), right.detach()
    assert (found - right).abs().max() <= off * max(float(right.abs().max()), 1.0)


@several
@given(
    rows=families(),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    size=st.sampled_from([2, 8, 16, 24, 32, 64, 80]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    apart=st.booleans(),
)
def test_attention_is_a_softmax_over_what_is_visible(rows, heads, size, dtype, apart):
    """Outputs and gradients; heads side by side in memory, as projections write them, or one after the other."""
    branches, length = plant(rows).branches(), len(plant(rows).tokens)
    random = torch.Generator().manual_seed(length)

    def states(count):
        if apart:
            return torch.randn(1, length, count, size, generator=random).to(dtype).transpose(1, 2)
        return torch.randn(1, count, length, size, generator=random).to(dtype)

    given_ = [states(count).requires_grad_() for count in (heads[0], heads[1], heads[1])]
    exact = [x.detach().double().requires_grad_() for x in given_]
    found, right = tree_attention(*given_, branches, 0.3, kernels=True), table(*exact, branches, 0.3)
    slope = states(heads[0])
    off = 1e-5 if dtype == torch.float32 else 0.03
    near(found, right, off)
    gradients = torch.autograd.grad(found, given_, slope)
    for mine, its in zip(gradients, torch.autograd.grad(right, exact, slope.double()), strict=True):
        assert mine.dtype == dtype
        near(mine, its, off)


@pytest.mark.parametrize("length", [63, 64, 65, 200])
def test_nodes_of_several_blocks_of_queries(length):
    """A node of that length below one of 70, beside a short one."""
    branches = Branches(((0, 70, 1), (70, length, 1), (70 + length, 5, 1)), ((0, 70, 75 + length),))
    random = torch.Generator().manual_seed(length)
    given_ = [torch.randn(1, 2, 75 + length, 32, generator=random, requires_grad=True) for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in given_]
    found, right = tree_attention(*given_, branches, kernels=True), table(*exact, branches, 32**-0.5)
    near(found, right, 1e-5)
    for mine, its in zip(
        torch.autograd.grad(found.square().sum(), given_),
        torch.autograd.grad(right.square().sum(), exact),
        strict=True,
    ):
        near(mine, its, 1e-5)


def test_threads_change_nothing():
    """Bit for bit: the keys of one tree and one head add up in one thread."""
    branches = Branches(((0, 9, 1), (9, 20, 3), (69, 30, 2)), ((0, 9, 69),))
    random = torch.Generator().manual_seed(0)
    given_ = [torch.randn(1, 4, 129, 16, generator=random, requires_grad=True) for _ in range(3)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = tree_attention(*given_, branches, kernels=True)
            results.append([out, *torch.autograd.grad(out.square().sum(), given_)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_layout_by_hand():
    """A prompt of 3, two responses of 2, of which the second parts again; and a stranger."""
    layout = Layout(((0, 3, 1), (3, 2, 2), (7, 1, 2), (9, 4, 1)), ((0, 3, 9), (5, 7, 9)))
    node, above, ancestors, tree = (array.tolist() for array in layout._arrays)
    assert node == [[0, 3], [3, 5], [5, 7], [7, 8], [8, 9], [9, 13]]
    assert above == [0, 0, 1, 2, 4, 6, 6]
    assert ancestors == [[0, 3], [0, 3], [0, 3], [5, 7], [0, 3], [5, 7]]
    assert tree == [0, 5, 6]
    assert (layout.nodes, layout.trees, layout.longest) == (6, 2, 6)


def test_scores_that_are_no_numbers_stay_so():
    branches = Branches(((0, 3, 1),), ())
    q = torch.zeros(1, 1, 3, 8)
    k = torch.tensor([0.0, torch.nan, 0.0])[None, None, :, None].expand(1, 1, 3, 8)
    found = tree_attention(q, k, torch.ones_like(q), branches, kernels=True)[0, 0, :, 0]
    assert found.isnan().tolist() == [False, True, True]
