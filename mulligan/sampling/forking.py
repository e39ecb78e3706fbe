"""Which models decode rows that go on from prompts kept apart: each prompt is stored and read once for all its rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from mulligan.models.attention import with_own_attention
from mulligan.models.forks import Forks
from mulligan.sampling.cache import GrowingCache

# From a model, tokens [R], their positions [R], which row goes on from which prompt, and the cache, to logits [R, V].
Step = Callable[[PreTrainedModel, torch.Tensor, torch.Tensor, Forks, GrowingCache], torch.Tensor]


def forks_prompts(model: PreTrainedModel) -> bool:
    """Whether a model gives the same logits to rows that go on from shared prompts as to rows by themselves.

    The model is in eval mode. If so, its attention is Mulligan's own from now on
    (:func:`mulligan.models.attention.with_own_attention`). Any other model decodes rows that each have a copy of
    their prompt.
    """
    return with_own_attention(model, agrees)


def _step(model: PreTrainedModel, token: torch.Tensor, position: torch.Tensor, forks: Forks, cache: Any) -> Any:
    """The logits of a step by the model's own code."""
    fixed = _fixed(model)
    given = {"position_ids": position[:, None], "past_key_values": cache, "use_cache": True}
    return model(token[:, None], attention_mask=forks.mask(), **given, **fixed).logits[:, -1]


def _fixed(model: PreTrainedModel) -> dict[str, Any]:
    # Rounding must not choose the loop that a token is read out of.
    return {"exit_threshold": 1.0} if hasattr(model.config, "total_ut_steps") else {}


@torch.no_grad()
def agrees(model: PreTrainedModel, step: Step = _step) -> bool:
    """Whether two steps of three rows from two prompts have the last logits of the rows alone."""
    device, size = model.device, int(model.config.get_text_config().vocab_size)
    tokens = torch.arange(30, device=device) * 7 % size
    prompts, of = (tokens[:9], tokens[9:14]), (0, 1, 0)
    ends = (tokens[14:16], tokens[16:18], tokens[20:22])
    rows = [torch.cat([prompts[i], end])[None] for i, end in zip(of, ends, strict=True)]
    ids, pads = tokens.new_zeros(2, 9), torch.tensor([0, 4], device=device)
    ids[0], ids[1, 4:] = prompts
    column = torch.arange(9, device=device) - pads[:, None]
    found = []
    try:
        alone = [model(row, use_cache=False, **_fixed(model)).logits[0, -1] for row in rows]
        shared, cache = GrowingCache(room=0), GrowingCache()
        model(
            ids,
            attention_mask=(column >= 0).long(),
            position_ids=column.clamp(min=0),
            past_key_values=shared,
            use_cache=True,
        )
        cache.fork(shared, 3)
        forks = Forks.of(torch.tensor(of, device=device), pads, 9)
        for number, new in enumerate(torch.stack(ends).T):
            position = torch.tensor([9, 5, 9], device=device) + number
            found.append(step(model, new, position, forks, cache).float())
    except (ValueError, RuntimeError, TypeError, IndexError):  # an attention of its own, given a mask of no entries
        return False
    expected = torch.stack(alone).float()
    # Rounding is 2e-6 of the largest logit in float32 and 0.03 in bfloat16; a prompt that is not seen, 0.3 and more.
    near = max(16 * torch.finfo(model.dtype).eps, 1e-4) * float(expected.abs().max())
    return bool((found[-1] - expected).abs().max() <= near)
