"""Which models read rows as trees, so that what rows share is computed once."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from mulligan.learner.packing import Item, pack
from mulligan.learner.trees import Costs, plant
from mulligan.models import flex
from mulligan.models.attention import with_own_attention
from mulligan.models.loading import output_head
from mulligan.types import Tokens


def shares_prefixes(model: PreTrainedModel) -> bool:
    """Whether a model gives trees of rows the same hidden states as the rows; if so, it reads trees from now on.

    It does where every layer attends to everything before a token, positions are given with the call, and attention is
    plain SDPA on the CPU or CUDA. The rest (sliding windows, capped scores, state-space layers, a checkpoint's own
    code) reads flat batches. What should work is tried on a few tokens: a config alone is not believed, and whether
    FlexAttention can be compiled for a GPU and a head_dim is only known then.
    """
    if model.device.type not in ("cpu", "cuda"):
        return False
    return with_own_attention(model, _agrees)


def layer_costs(model: PreTrainedModel) -> Costs:
    """What a layer of a model costs, for :func:`mulligan.learner.packing.layouts`."""
    config = model.config.get_text_config()
    known = {id(model.get_input_embeddings().weight), id(output_head(model).weight)}
    weights = sum(p.numel() for p in model.base_model.parameters() if p.ndim > 1 and id(p) not in known)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Costs(token=2 * weights / config.num_hidden_layers, width=heads * size)


def _trial(size: int) -> list[Tokens]:
    """Rows that part twice, one that ends where others part, and a stranger; of a vocabulary, and all of them short."""
    stem, twig = tuple(7 * i % size for i in range(12)), tuple(5 * i % size for i in range(12))
    ends = [(1 % size, *stem[:3]), (2 % size, 3 % size), twig[:5]]
    return [stem, stem + stem[:6], *(stem + twig + end for end in ends), twig]


def _agrees(model: PreTrainedModel) -> bool:
    """Whether hidden states of a few rows are the same in both layouts, to the rounding of the weights' dtype.

    Where the kernel is compiled, so are their gradients: what compiles forward need not compile backward.
    """
    rows = _trial(output_head(model).weight.shape[0])
    items = [Item(row[:1], row[1:], torch.ones(len(row) - 1, dtype=torch.bool), 1.0) for row in rows]
    # The first weight that is trained: all the layers' gradients are behind its own.
    trained = next((p for p in model.base_model.parameters() if p.requires_grad), None)
    if not flex.is_for(model.device):
        trained = None
    found = []
    for trees in (None, plant(rows)):
        batch = pack(items, 0, model.device, trees)
        try:
            with torch.set_grad_enabled(trained is not None):
                hidden = model.base_model(input_ids=batch.tokens, use_cache=False, **batch.layout).last_hidden_state
                states = hidden[batch.at[:, 0], batch.at[:, 1]]
            found.append([states.detach()])
            if trained is not None:
                # Not a sum of squares: the final norm makes that a constant.
                slope = torch.linspace(-1.0, 1.0, states.shape[-1], device=states.device)
                found[-1] += torch.autograd.grad((states.float() @ slope).mean(), [trained])
        except (ValueError, RuntimeError, TypeError, IndexError):  # an attention of its own, given a mask of no entries
            return False
    # Rounding is 2e-6 of the largest state in float32 and 0.03 in bfloat16; a layout that is ignored, 0.3 and more.
    share = max(16 * torch.finfo(model.dtype).eps, 1e-4)
    return all(
        bool((flat - grown).abs().max() <= share * float(flat.abs().max())) for flat, grown in zip(*found, strict=True)
    )
