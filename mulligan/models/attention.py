"""Attention over trees of tokens: rows that begin alike are one path of a tree until they part.

The tokens of all trees stand in one sequence, depth first, so that what hangs below a node is the stretch right behind
it. A token attends to its own node up to itself, and to all of its node's ancestors. Nothing is masked: each node is a
causal block of its own, and a node with others below it is one dense block from all of their queries. The parts of a
softmax are put together by their normalisers, which is exact (as in FlashAttention, arXiv 2205.14135, over the blocks
of one row, and in Hydragen, arXiv 2402.05099, over a shared prefix).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mulligan.models import flex
from mulligan.models.forks import forked_attention, forks_of
from mulligan.models.norms import wide
from mulligan.native.trees import Layout, TreeAttention

NAME = "mulligan"  # of this attention among transformers'

# Width of a head times length of a row from which the CPU's kernels are faster in bfloat16, both passes together. For
# short rows their backward pass is the slower one in bfloat16, by 1.3 to 5 times.
_HALF_PAYS = 1 << 15

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Branches:
    """Which of N tokens attends to which.

    Example: a prompt of 5 tokens with two responses of 3, and a row of 4 that shares nothing, are
    ``runs=((0, 5, 1), (5, 3, 2), (11, 4, 1))`` and ``shared=((0, 5, 11),)``.
    """

    runs: tuple[tuple[int, int, int], ...]  # (start, length, count): nodes of one length, side by side
    shared: tuple[tuple[int, int, int], ...]  # (start, end, last): tokens end to last hang below tokens start to end

    @cached_property
    def layout(self) -> Layout:
        """The same for the compiled kernels."""
        return Layout(self.runs, self.shared)

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
        norm = q.new_empty(1, length, heads, dtype=wide(q)).transpose(1, 2)  # log of each softmax' denominator
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


def below_autocast(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, longest: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values as attention takes them: where autocast is on, in the dtype that is fastest.

    Args:
        q: [..., head_dim], k and v as well.
        longest: tokens of the longest row; None: whatever it is, its dtype is the fastest.
    """
    kind = q.device.type
    if not torch.is_autocast_enabled(kind):
        return q, k, v
    dtype = torch.get_autocast_dtype(kind)
    if kind == "cpu" and longest is not None and longest * q.shape[-1] < _HALF_PAYS:
        dtype = torch.float32
    return q.to(dtype), k.to(dtype), v.to(dtype)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, nothing is cast; costs nothing where nothing would be."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    branches: Branches,
    scale: float | None = None,
    kernels: bool = False,
) -> torch.Tensor:
    """Attention along the paths of trees: in blocks of its own on the CPU, through FlexAttention elsewhere.

    Args:
        q: [1, heads, N, head_dim].
        k: [1, key and value heads, N, head_dim], v as well; their heads divide the query heads.
        scale: of the scores; None: ``1 / sqrt(head_dim)``.
        kernels: through the compiled ones, on the CPU.

    Returns:
        [1, heads, N, head_dim].

    Raises:
        ValueError: shapes that these kernels do not know.
    """
    if q.shape[0] != 1 or k.shape != v.shape or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"no attention over trees for shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    by = float(q.shape[-1] ** -0.5) if scale is None else scale
    q, k, v = below_autocast(q, k, v, None if kernels else max(length for _, length, _ in branches.runs))
    if kernels:
        found = TreeAttention.apply(q, k, v, branches.layout, by)
        assert isinstance(found, torch.Tensor)
        return found
    if flex.is_for(q.device):
        return flex.flex_tree_attention(q, k, v, branches, by)
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    found = _TreeAttention.apply(q, k, v, branches, by)
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
    """transformers' SDPA attention, or what the mask stands for: attention over trees or to shared prompts."""
    branches, forks = branches_of(attention_mask), forks_of(attention_mask)
    if branches is None and forks is None:
        query, key, value = below_autocast(query, key, value, query.shape[2])
        with no_autocast(query.device):
            return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    unknown = sorted(n for n in ("softcap", "position_bias", "s_aux") if more.get(n) is not None)
    if unknown or dropout:
        raise ValueError(f"no attention over shared tokens with {', '.join(unknown) or 'dropout'}")
    if forks is not None:
        return forked_attention(query, key, value, forks, scaling).transpose(1, 2), None
    assert branches is not None
    return tree_attention(query, key, value, branches, scaling, getattr(module, "kernels", False)).transpose(1, 2), None


def with_own_attention(model: PreTrainedModel, agrees: Callable[[PreTrainedModel], bool]) -> bool:
    """Gives a model this attention in place of SDPA, if that changes nothing; whether it has it now.

    It can where every layer attends to everything before a token and positions are given with the call. It cannot with
    sliding windows, capped scores, state-space layers and a checkpoint's own code. A looped model has it always.

    Args:
        agrees: tries on a few tokens what the model is to do with it; a config alone is not believed.
    """
    config = model.config.get_text_config()
    if hasattr(config, "total_ut_steps"):
        return agrees(model)
    before = model.config._attn_implementation
    if not (
        type(model).__module__.startswith("transformers.")
        and "position_ids" in inspect.signature(model.base_model.forward).parameters
        and before in ("sdpa", NAME)
        and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
        and _sees_all(config)
        and getattr(config, "attn_logit_softcapping", None) is None
        and model._can_set_attn_implementation()
    ):
        return False
    model.set_attn_implementation(NAME)
    if agrees(model):
        return True
    model.set_attn_implementation(before)
    return False


def _sees_all(config: Any) -> bool:
    """No window, or none that is shorter than the longest sequence."""
    window = getattr(config, "sliding_window", None)
    # Where layers name their kinds, none of those that are left has the window.
    named = bool(getattr(config, "layer_types", None))
    return window is None or named or window >= getattr(config, "max_position_embeddings", math.inf)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
