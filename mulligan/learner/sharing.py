"""Which models read rows as trees, so that what rows share is computed once."""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from transformers import PreTrainedModel

from mulligan.learner.packing import Item, pack
from mulligan.learner.scoring import is_looped
from mulligan.learner.trees import Costs, plant
from mulligan.models.attention import NAME
from mulligan.models.loading import output_head
from mulligan.types import Tokens

_OWN = ("sdpa", NAME)  # attention implementations that can be asked for trees


def shares_prefixes(model: PreTrainedModel) -> bool:
    """Whether a model gives trees of rows the same hidden states as the rows; if so, it reads trees from now on.

    It does where every layer attends to everything before a token, positions are given with the call, and attention is
    plain SDPA on the CPU. The rest (sliding windows, capped scores, state-space layers, a checkpoint's own code) reads
    flat batches. What should work is tried on a few tokens, so a config alone is not believed.
    """
    if model.device.type != "cpu":
        return False
    if is_looped(model):
        return _agrees(model)
    config = model.config.get_text_config()
    attention = model.config._attn_implementation
    if not (
        type(model).__module__.startswith("transformers.")
        and "position_ids" in inspect.signature(model.base_model.forward).parameters
        and attention in _OWN
        and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())
        and _sees_all(config)
        and getattr(config, "attn_logit_softcapping", None) is None
        and model._can_set_attn_implementation()
    ):
        return False
    model.set_attn_implementation(NAME)
    if _agrees(model):
        return True
    model.set_attn_implementation(attention)
    return False


def layer_costs(model: PreTrainedModel) -> Costs:
    """What a layer of a model costs, for :func:`mulligan.learner.packing.layouts`."""
    config = model.config.get_text_config()
    known = {id(model.get_input_embeddings().weight), id(output_head(model).weight)}
    weights = sum(p.numel() for p in model.base_model.parameters() if p.ndim > 1 and id(p) not in known)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Costs(token=2 * weights / config.num_hidden_layers, width=heads * size)


def _sees_all(config: Any) -> bool:
    """No window, or none that is shorter than the longest sequence."""
    window = getattr(config, "sliding_window", None)
    # Where layers name their kinds, none of those that are left has the window.
    named = bool(getattr(config, "layer_types", None))
    return window is None or named or window >= getattr(config, "max_position_embeddings", math.inf)


def _trial(size: int) -> list[Tokens]:
    """Rows that part twice, one that ends where others part, and a stranger; of a vocabulary, and all of them short."""
    stem, twig = tuple(7 * i % size for i in range(12)), tuple(5 * i % size for i in range(12))
    ends = [(1 % size, *stem[:3]), (2 % size, 3 % size), twig[:5]]
    return [stem, stem + stem[:6], *(stem + twig + end for end in ends), twig]


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    """Whether hidden states of a few rows are the same in both layouts, to the rounding of the weights' dtype."""
    rows = _trial(output_head(model).weight.shape[0])
    items = [Item(row[:1], row[1:], torch.ones(len(row) - 1, dtype=torch.bool), 1.0) for row in rows]
    found = []
    for trees in (None, plant(rows)):
        batch = pack(items, 0, model.device, trees)
        try:
            hidden = model.base_model(input_ids=batch.tokens, use_cache=False, **batch.layout).last_hidden_state
        except (ValueError, RuntimeError, TypeError, IndexError):  # an attention of its own, given a mask of no entries
            return False
        found.append(hidden[batch.at[:, 0], batch.at[:, 1]])
    flat, grown = found
    # Rounding is 2e-6 of the largest state in float32 and 0.03 in bfloat16; a layout that is ignored, 0.3 and more.
    near = max(16 * torch.finfo(model.dtype).eps, 1e-4) * float(flat.abs().max())
    return bool((flat - grown).abs().max() <= near)
