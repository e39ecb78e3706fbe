"""Attention over trees of tokens: rows that begin alike are one path of a tree until they part.

The tokens of all trees stand in one sequence, depth first, so that what hangs below a node is the stretch right behind
it. A token attends to its own node up to itself, and to all of its node's ancestors. Nothing is masked: each node is a
causal block of its own, and a node with others below it is one dense block from all of their queries. The parts of a
softmax are put together by their normalisers, which is exact (as in FlashAttention, arXiv 2205.14135, over the blocks
of one row, and in Hydragen, arXiv 2402.05099, over a shared prefix).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "mulligan"  # of this attention among transformers'

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Branches:
    """Which of N tokens attends to which.

    Example: a prompt of 5 tokens with two responses of 3, and a row of 4 that shares nothing, are
    ``runs=((0, 5, 1), (5, 3, 2), (11, 4, 1))`` and ``shared=((0, 5, 11),)``.
    """

    runs: tuple[tuple[int, int, int], ...]  # (start, length, count): nodes of one length, side by side
    shared: tuple[tuple[int, int, int], ...]  # (start, end, last): tokens end to last hang below tokens start to end

    def mask(self, device: torch.device) -> torch.Tensor:
        """What stands for this in a call's ``attention_mask``.

        It has four dimensions, which transformers passes on as it is, and no entries: an attention that does not know
        what it stands for fails instead of seeing too much.
        """
        out = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)
        out.branches = self  # pyright: ignore[reportAttributeAccessIssue]
        return out


def branches_of(mask: torch.Tensor | None) -> Branches | None:
    """What a mask stands for, if it is one of :meth:`Branches.mask`."""
    return getattr(mask, "branches", None)


class _TreeAttention(torch.autograd.Function):
    """Softmax attention of queries, keys and values [1, heads, N, head_dim]."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, branches: Branches, scale: float
    ) -> torch.Tensor:
        _, heads, length, size = q.shape
        out = q.new_empty(1, length, heads, size).transpose(1, 2)  # in the order in which the next projection reads it
        norm = q.new_empty(1, length, heads, dtype=_wide(q)).transpose(1, 2)  # log of each softmax' denominator
        for run in branches.runs:
            part, its_norm = _forward(_blocks(q, run), _blocks(k, run), _blocks(v, run), 0.0, True, scale=scale)
            _blocks(out, run).copy_(part)
            _blocks(norm, run).copy_(its_norm)
        for start, end, last in branches.shared:
            above, below = slice(start, end), slice(end, last)
            part, its_norm = _forward(q[:, :, below], k[:, :, above], v[:, :, above], 0.0, False, scale=scale)
            whole = torch.logaddexp(norm[:, :, below], its_norm)
            out[:, :, below].mul_((norm[:, :, below] - whole).exp_()[..., None])
            out[:, :, below].addcmul_(part, (its_norm - whole).exp_()[..., None].to(part.dtype))
            norm[:, :, below] = whole
        ctx.save_for_backward(q, k, v, out, norm)
        ctx.branches, ctx.scale = branches, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Given the whole softmax' denominator in place of a block's own, a block's gradient is its share of the whole.
        (grad,) = grads
        q, k, v, out, norm = ctx.saved_tensors
        by_q, by_k, by_v = (torch.empty_like(x) for x in (q, k, v))
        for run in ctx.branches.runs:
            given = [_blocks(x, run) for x in (grad, q, k, v, out, norm)]
            found = _backward(*given, 0.0, True, scale=ctx.scale)
            for whole, part in zip((by_q, by_k, by_v), found, strict=True):
                _blocks(whole, run).copy_(part)
        for start, end, last in ctx.branches.shared:
            above, below = slice(start, end), slice(end, last)
            given = (
                grad[:, :, below],
                q[:, :, below],
                k[:, :, above],
                v[:, :, above],
                out[:, :, below],
                norm[:, :, below],
            )
            part_q, part_k, part_v = _backward(*given, 0.0, False, scale=ctx.scale)
            by_q[:, :, below] += part_q
            by_k[:, :, above] += part_k
            by_v[:, :, above] += part_v
        return by_q, by_k, by_v, None, None


def _blocks(x: torch.Tensor, run: tuple[int, int, int]) -> torch.Tensor:
    """A view [count, heads, length, ...] of a run's tokens in [1, heads, N, ...]."""
    start, length, count = run
    return x[0, :, start : start + length * count].unflatten(1, (count, length)).transpose(0, 1)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def tree_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, branches: Branches, scale: float | None = None
) -> torch.Tensor:
    """Attention along the paths of trees, on the CPU.

    Args:
        q: [1, heads, N, head_dim].
        k: [1, key and value heads, N, head_dim], v as well; their heads divide the query heads.
        scale: of the scores; None: ``1 / sqrt(head_dim)``.

    Returns:
        [1, heads, N, head_dim].

    Raises:
        ValueError: shapes that these kernels do not know.
    """
    if q.shape[0] != 1 or k.shape != v.shape or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"no attention over trees for shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    found = _TreeAttention.apply(q, k, v, branches, q.shape[-1] ** -0.5 if scale is None else scale)
    assert isinstance(found, torch.Tensor)
    return found


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention, and the attention over trees where the mask stands for some."""
    branches = branches_of(attention_mask)
    if branches is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    unknown = sorted(n for n in ("softcap", "position_bias", "s_aux") if more.get(n) is not None)
    if unknown or dropout:
        raise ValueError(f"no attention over trees with {', '.join(unknown) or 'dropout'}")
    return tree_attention(query, key, value, branches, scaling).transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
