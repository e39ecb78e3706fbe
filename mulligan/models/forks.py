"""Attention of rows that go on from shared prompts: one new token a row, prompts kept and read once for all their rows.

Decoding is bound by the keys and values that it reads. Where n rows have one prompt, its keys are read once and
multiplied with n queries, instead of n copies with one query each. The two parts of the softmax, over the prompt and
over what the row has added, are put together by their normalisers, which is exact (Hydragen, arXiv 2402.05099).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Forks:
    """Which row goes on from which prompt: R rows, P prompts of at most S tokens, each with at most M rows."""

    rows: torch.Tensor  # int64 [P * M]: the row at each place of each prompt; where none is, any row
    place: torch.Tensor  # int64 [R]: the place of each row
    # int64: the rows in the order of their prompts [R], the prompt of each row [R], the padding before each prompt [P]
    by_prompt: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    prompt_bias: torch.Tensor | None  # [P, 1, 1, S]: 0, and -inf at padding; None: no padding
    own_bias: torch.Tensor | None = None  # [R, 1, T]: the same for the columns that are the rows' own

    @classmethod
    def of(cls, prompt: torch.Tensor, pads: torch.Tensor, length: int) -> Forks:
        """From the prompt of each row (int64 [R]) and the padding on the left of each prompt (int64 [P])."""
        counts = torch.bincount(prompt, minlength=len(pads))
        order = prompt.argsort(stable=True)
        most, first = int(counts.max()), counts.cumsum(0) - counts
        among = torch.arange(len(prompt), device=prompt.device) - first[prompt[order]]  # its place within its prompt
        places = prompt[order] * most + among
        rows = prompt.new_zeros(len(pads) * most).index_copy_(0, places, order)
        place = torch.empty_like(prompt).index_copy_(0, order, places)
        bias = hidden(pads, length)[:, None, None] if bool(pads.any()) else None
        return cls(rows, place, (order, prompt, pads), bias)

    def mask(self) -> torch.Tensor:
        """What stands for this in a call's ``attention_mask``: four dimensions, which a model passes on, no entries."""
        out = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=self.rows.device)
        out.forks = self  # pyright: ignore[reportAttributeAccessIssue]
        return out


def forks_of(mask: torch.Tensor | None) -> Forks | None:
    """What a mask stands for, if it is one of :meth:`Forks.mask`."""
    return getattr(mask, "forks", None)


def hidden(pads: torch.Tensor, length: int) -> torch.Tensor:
    """float32 [rows, length]: -inf in the first ``pads`` (int64 [rows]) columns, else 0."""
    columns = torch.arange(length, device=pads.device)
    return torch.zeros(len(pads), length, device=pads.device).masked_fill_(columns < pads[:, None], -torch.inf)


def forked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forks: Forks, scale: float | None = None
) -> torch.Tensor:
    """Attention of one token a row to its prompt and to the row's own columns.

    Args:
        q: [R, heads, 1, head_dim].
        k: [R, key and value heads, T, head_dim], the rows' own; its attribute ``prompts`` holds the prompts' keys and
            values [P, key and value heads, S, head_dim].
        v: as k, without the attribute.
        scale: of the scores; None: ``1 / sqrt(head_dim)``.

    Returns:
        [R, heads, 1, head_dim].

    Raises:
        ValueError: keys that have lost their prompts on the way, or more than one token a row.
    """
    prompts = getattr(k, "prompts", None)
    if prompts is None or q.shape[2] != 1:
        raise ValueError("no attention to shared prompts: the keys are not those of the cache, or tokens are several")
    keys, values = prompts
    (rows, heads, _, size), (number, shared) = q.shape, keys.shape[:2]
    groups, wide = heads // shared, torch.promote_types(q.dtype, torch.float32)
    q = (q * (size**-0.5 if scale is None else scale)).reshape(rows, heads * size)

    # The prompts: all queries of a prompt's rows at once.
    there = q.index_select(0, forks.rows).view(number, -1, shared, groups, size).transpose(1, 2)
    scores = torch.bmm(there.reshape(number * shared, -1, size), keys.flatten(0, 1).transpose(1, 2)).to(wide)
    if forks.prompt_bias is not None:
        scores.view(number, shared, -1, keys.shape[2]).add_(forks.prompt_bias)
    top = scores.amax(-1, keepdim=True)
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    out = torch.bmm(scores.to(values.dtype), values.flatten(0, 1)).div_(total)
    norm = top.add_(total.log_())  # log of the softmax' denominator
    by_row = (number, shared, -1, groups)
    out = out.view(*by_row, size).transpose(1, 2).reshape(-1, heads, size).index_select(0, forks.place)
    norm = norm.view(by_row).transpose(1, 2).reshape(-1, heads, 1).index_select(0, forks.place)

    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        # Whose bmm first copies keys that do not lie side by side in memory, as rows of a cache with room do not.
        bias = None if forks.own_bias is None else forks.own_bias[:, None]
        part, its_norm = _flash(q.view(rows, shared, groups, size), k, v, 0.0, False, attn_mask=bias, scale=1.0)
        share = torch.sigmoid(its_norm.reshape(rows, heads, 1) - norm).to(q.dtype)  # of the row's own columns
        return torch.lerp(out, part.reshape(rows, heads, size), share)[:, :, None]
    # The rows' own columns, and the prompt as one more column, whose score is its norm.
    own = torch.bmm(q.view(rows * shared, groups, size), k.flatten(0, 1).transpose(1, 2)).view(rows, heads, -1)
    if forks.own_bias is not None:
        own = own + forks.own_bias
    weights = torch.cat((norm, own.to(wide)), -1).softmax(-1).to(q.dtype)
    mine = torch.bmm(weights[..., 1:].view(rows * shared, groups, -1), v.flatten(0, 1)).view(rows, heads, size)
    return mine.addcmul_(out, weights[..., :1])[:, :, None]
