"""FlexAttention over trees: the blocks that CUDA's kernel goes by, and which models take it.

Outputs and gradients are compared in tests/learner/test_trees.py, for this kernel and for the CPU's own.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask

from mulligan.learner.packing import pack
from mulligan.learner.sharing import shares_prefixes
from mulligan.learner.trees import plant
from mulligan.models import flex
from mulligan.models.attention import Branches
from tests.helpers import Probe, tiny, tokens
from tests.learner.test_trees import families, items_of, reading_by

CPU = torch.device("cpu")
some = settings(max_examples=25, deadline=None, derandomize=True)


def test_ends_by_hand():
    """A prompt of 5 tokens with two responses of 3, a row of 4 that shares nothing, and 2 columns of padding."""
    branches = Branches(runs=((0, 5, 1), (5, 3, 2), (11, 4, 1)), shared=((0, 5, 11),))
    assert flex.subtree_ends(branches, 17).tolist() == [11] * 5 + [8] * 3 + [11] * 3 + [15] * 4 + [16, 17]


def test_columns_are_whole_blocks_and_two_at_least():
    assert [flex.padded(n) for n in (1, 128, 256, 257, 16384)] == [256, 256, 256, 384, 16384]


@some
@given(families(20), st.booleans(), st.sampled_from([8, 16, 128]))
def test_blocks_are_those_of_the_whole_table(rows, whole, block):
    """torch's own search through all N x N pairs, for lengths that are whole blocks and for others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "BLOCK", block)
        flex.block_mask.cache_clear()
        trees = plant(rows)
        length = flex.padded(len(trees.tokens)) if whole else len(trees.tokens)
        found = flex.block_mask(trees.branches(), length, CPU)
        flex.block_mask.cache_clear()
    right = create_block_mask(found.mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=block)
    for mine, its in zip(found.as_tuple()[:10], right.as_tuple()[:10], strict=True):
        if isinstance(its, torch.Tensor):
            assert isinstance(mine, torch.Tensor) and mine.dtype == its.dtype and torch.equal(mine, its)
        else:
            assert mine == its


def test_all_layers_share_one_mask():
    branches = plant([tokens(20)]).branches()
    assert flex.block_mask(branches, 256, CPU) is flex.block_mask(branches, 256, CPU)


def test_padding_is_behind_the_trees():
    rows = [(*tokens(40), *tokens(9, seed)) for seed in (1, 2)]
    trees, items = plant(rows), items_of(rows)
    plain = pack(items, 7, CPU, trees)
    with reading_by("flex"):
        batch = pack(items, 7, CPU, trees)
    assert plain.tokens.shape == (1, 58) and batch.tokens.shape == (1, 64)  # blocks of 16 in this test
    assert torch.equal(batch.tokens[:, :58], plain.tokens) and batch.tokens[0, 58:].tolist() == [7] * 6
    assert batch.layout["position_ids"].shape == (1, 64) and torch.equal(batch.at, plain.at)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen3", "looped"])
def test_the_trial_looks_at_gradients_too(kind, dtype, monkeypatch):
    """A kernel that is right forward, but fails or is wrong backward."""
    with reading_by("flex"):
        assert shares_prefixes(tiny(kind, dtype))
        right = flex.flex_tree_attention
        for backward in (refused, turned):
            monkeypatch.setattr(flex, "flex_tree_attention", lambda *given, hook=backward: hooked(right(*given), hook))
            assert not shares_prefixes(tiny(kind, dtype))


def hooked(out: torch.Tensor, hook: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    if out.requires_grad:
        out.register_hook(hook)
    return out


def refused(gradient: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("no such kernel")


def turned(gradient: torch.Tensor) -> torch.Tensor:
    return -gradient


def test_a_run_says_which_models_read_whole_rows(monkeypatch):
    """And nothing where rows share, or where that was not asked for."""
    assert Probe(tiny("qwen3"), share_prefixes=True).learner.notes() == []
    monkeypatch.setattr("mulligan.learner.update.shares_prefixes", lambda model: False)
    assert Probe(tiny("qwen3"), share_prefixes=False).learner.notes() == []
    assert Probe(tiny("looped"), reference=tiny("qwen3")).learner.notes() == [
        f"{name}: every row is computed in full, shared prefixes too (this {kind} on cpu does not read trees of rows)"
        for name, kind in (("policy", "ouro"), ("reference", "qwen3"))
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports
def test_one_compilation_serves_all_lengths():
    """Compiled for the CPU, forward: a kernel that goes by the blocks, which torch's reference does not look at."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for n in (12, 5, 9):
        trees = plant([tokens(100) + tokens(10 + 5 * i, i + 1) for i in range(n)])
        length = flex.padded(len(trees.tokens))
        generator = torch.Generator().manual_seed(n)
        q, k, v = (torch.randn(1, heads, length, 16, generator=generator) for heads in (4, 2, 2))
        mask = flex.block_mask(trees.branches(), length, CPU)
        found = flex._compiled()(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True)
        at, ends = torch.arange(length), flex.subtree_ends(trees.branches(), length)
        visible = (at[None] <= at[:, None]) & (at[:, None] < ends[None])
        scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~visible, -torch.inf)
        right = scores.softmax(-1) @ v.repeat_interleave(2, 1)
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("size", [16, 64, 80, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_kernel(size, dtype):
    """On the card itself: outputs and gradients against the whole table of scores in float32."""
    device = torch.device("cuda")
    trees = plant([tokens(100) + tokens(30 + 7 * i, i + 1) for i in range(9)])
    length = flex.padded(len(trees.tokens))
    generator = torch.Generator(device).manual_seed(0)
    q, k, v, slope = (
        torch.randn(1, heads, length, size, device=device, generator=generator).to(dtype) for heads in (4, 2, 2, 4)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    found = flex.flex_tree_attention(q, k, v, trees.branches(), size**-0.5)
    mine = (found, *torch.autograd.grad(found, inputs, slope))
    at, ends = torch.arange(length, device=device), flex.subtree_ends(trees.branches(), length).to(device)
    visible = (at[None] <= at[:, None]) & (at[:, None] < ends[None])
    wide = [x.detach().float().requires_grad_() for x in inputs]
    scores = (wide[0] @ wide[1].repeat_interleave(2, 1).mT * size**-0.5).masked_fill(~visible, -torch.inf)
    right = scores.softmax(-1) @ wide[2].repeat_interleave(2, 1)
    near = 1e-4 if dtype == torch.float32 else 0.03
    for ours, its in zip(mine, (right, *torch.autograd.grad(right, wide, slope.float())), strict=True):
        assert float((ours.float() - its).abs().max()) <= near * float(its.abs().max())
