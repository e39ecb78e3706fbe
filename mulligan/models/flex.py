"""Attention over trees of tokens by FlexAttention (arXiv 2412.05496): one kernel that leaves out blocks nobody sees.

For CUDA. The tokens stand depth first, so what hangs below a token is the stretch from it to the end of its node's
subtree: a query q sees a key k if and only if ``k <= q < end[k]``. torch's kernel goes by blocks of 128 tokens, and
asks this rule within those blocks alone that are visible in part.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

if TYPE_CHECKING:
    from mulligan.models.attention import Branches

BLOCK = 128  # tokens of a block: the kernel's default


def is_for(device: torch.device) -> bool:
    """Whether trees on a device are read through here; for the CPU :mod:`mulligan.models.attention` has kernels."""
    return device.type != "cpu"


def padded(length: int) -> int:
    """The columns that a sequence of this many tokens gets: whole blocks, and at least two.

    A length of less than a block is another kernel (made for decoding), and a single block another shape to compile.
    """
    return max(2, -(-length // BLOCK)) * BLOCK


def subtree_ends(branches: Branches, length: int) -> torch.Tensor:
    """For each token, where the subtree of its node ends: int64 [length].

    Args:
        length: of the sequence. Columns behind the last tree are padding, each a tree of its own: it sees itself,
            because a softmax over nothing is NaN and would spread.
    """
    ends = torch.arange(1, length + 1)
    for start, size, count in branches.runs:
        to = start + size * torch.arange(1, count + 1)
        ends[start : start + size * count] = to.repeat_interleave(size)
    for start, end, last in branches.shared:
        ends[start:end] = last
    return ends


@functools.lru_cache(maxsize=2)  # all layers of a batch, forward and backward, ask for the same one
def block_mask(branches: Branches, length: int, device: torch.device) -> BlockMask:
    """What :func:`torch.nn.attention.flex_attention.create_block_mask` finds for the rule, without its [N, N] table.

    Args:
        length: N, of any size; the kernel masks what is missing from the last block.
    """
    ends = subtree_ends(branches, length).to(device)
    blocks = -(-length // BLOCK)
    by_block = torch.nn.functional.pad(ends, (0, blocks * BLOCK - length)).view(blocks, BLOCK)
    first = torch.arange(blocks, device=device) * BLOCK  # of each block's tokens
    # Of the keys in a block before the queries', one is seen by one of them if it reaches beyond the first of them, and
    # all are seen by all if all reach to the last of them. A block's own keys are seen in part.
    before = first[:, None] > first[None]
    seen = before & (by_block.amax(1)[None] > first[:, None])
    full = before & (by_block.amin(1)[None] >= first[:, None] + BLOCK)
    part = (seen & ~full) | torch.eye(blocks, dtype=torch.bool, device=device)

    def visible(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k <= q) & (q < ends[k])

    return BlockMask.from_kv_blocks(
        *_listed(part), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def _listed(table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks of keys each block of queries has, and which, those first: int32 [1, 1, blocks(, blocks)]."""
    order = table.int().argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


@functools.cache
def _compiled() -> Any:
    # Batches differ in length, so with fixed shapes every batch would be compiled anew; fullgraph, because what is not
    # compiled holds every score in memory.
    compiler: Any = torch.compile  # its overloads for types lack the limit
    return compiler(flex_attention, dynamic=True, fullgraph=True, recompile_limit=32)


def flex_tree_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, branches: Branches, scale: float
) -> torch.Tensor:
    """Attention along the paths of trees.

    Compiled on CUDA, where the kernel takes a head_dim of 16 or more. Elsewhere it is torch's reference, which holds
    every score, and which torch refuses to differentiate on the CPU.

    Args:
        q: [1, heads, N, head_dim].
        k: [1, key and value heads, N, head_dim], v as well; their heads divide the query heads.

    Returns:
        [1, heads, N, head_dim].
    """
    attend: Any = _compiled() if q.device.type == "cuda" else flex_attention
    mask = block_mask(branches, q.shape[2], q.device)
    with torch.autocast(q.device.type, enabled=False):  # what it casts was cast before
        return attend(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
