"""The decoder layers that Mulligan can compute itself: pre-norm attention and SwiGLU, as in Llama and Qwen3.

The looped model's layers, with their sandwich norms, are of this kind too. Models are not believed by their names: a
layer of transformers is known if it has these parts and nothing else, and gives on a few tokens what they give.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from mulligan.errors import UserError
from mulligan.models import rotary
from mulligan.models.looped import LoopedLayer
from mulligan.models.norms import is_near, is_taken, wide

_NORMS = ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2")
Weights = tuple[Any, ...]  # of parameters, pairs of a weight and a bias, and None where a layer has no such part


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, computed in float32 or wider."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    x = x.to(wide(x))
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def halves(eps: float, size: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """A layer before its attention and behind it, for layers whose norms have this epsilon and whose heads are so wide.

    Both take x [tokens, hidden] first, and then what :func:`parameters_of` gives.
    """

    def before(x, cos, sin, input_norm, q, k, v, q_norm, k_norm):
        h = norm(x, input_norm, eps)
        q, k, v = (functional.linear(h, *each).view(x.shape[0], -1, size) for each in (q, k, v))
        if q_norm is not None:
            q, k = norm(q, q_norm, eps), norm(k, k_norm, eps)
        return _rotate(q, cos, sin), _rotate(k, cos, sin), v

    def after(x, attended, o, input_norm, gate, up, down, attention_norm, mlp_norm):
        h = functional.linear(attended, *o)
        x = x + (h if attention_norm is None else norm(h, attention_norm, eps))
        h = norm(x, input_norm, eps)
        h = functional.linear(functional.silu(functional.linear(h, *gate)) * functional.linear(h, *up), *down)
        return x + (h if mlp_norm is None else norm(h, mlp_norm, eps))

    return before, after


def parameters_of(layer: Any) -> tuple[Weights, Weights]:
    """What the two halves of a layer take: (norm, q, k, v, q_norm, k_norm) and (o, norm, gate, up, down, and the norms
    of what attention and SwiGLU add)."""
    attention, mlp = layer.self_attn, layer.mlp
    norms = [getattr(getattr(layer, name, None), "weight", None) for name in _NORMS]
    heads = [getattr(getattr(attention, name, None), "weight", None) for name in ("q_norm", "k_norm")]
    q, k, v, o = ((each.weight, each.bias) for each in (getattr(attention, f"{name}_proj") for name in "qkvo"))
    gate, up, down = ((each.weight, each.bias) for each in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return (norms[0], q, k, v, *heads), (o, norms[2], gate, up, down, norms[1], norms[3])


def epsilon_of(layer: Any) -> float:
    """Of the layer's norms."""
    own = layer.input_layernorm
    return own.eps if isinstance(layer, LoopedLayer) else own.variance_epsilon


def known_layers(model: PreTrainedModel, key: str) -> list[Any]:
    """The layers of a model, all of them of the kind that this module knows.

    Raises:
        UserError: some are not; ``key`` is the setting that asked for them.
    """
    layers = list(getattr(model.base_model, "layers", ()))
    strange = next((layer for layer in layers if not _is_known(layer)), None)
    if strange is not None or not layers:
        kind = type(model if strange is None else strange).__name__
        raise UserError(f"{key}: the layers of {model.config.model_type} ({kind}) are not of the kind it knows")
    return layers


def _is_known(layer: Any) -> bool:
    names = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    inside = dict(layer.named_modules())
    # No adapter, no quantised weights.
    if any(type(inside.get(name)) is not nn.Linear or inside[name]._forward_hooks for name in names):
        return False
    return isinstance(layer, LoopedLayer) or _is_llama(layer)


def _is_llama(layer: Any) -> bool:
    """Whether a decoder layer of transformers is pre-norm attention and SwiGLU, each added to its input."""
    names, replaced = {name for name, _ in layer.named_children()}, vars(layer).get("forward")
    if names != {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}:
        return False
    if replaced is not None and not getattr(replaced, "__module__", "").startswith("mulligan."):
        return False
    epsilon, attention = getattr(layer.input_layernorm, "variance_epsilon", None), layer.self_attn
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    return (
        rotary.is_own(attention)
        and all(is_taken(one) and one.variance_epsilon == epsilon for one in norms)
        and {name for name, _ in layer.mlp.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}
        and _agrees(layer)
    )


@torch.no_grad()
def _agrees(layer: Any) -> bool:
    """Whether a layer's own class gives what its two halves give."""
    weight, size = layer.self_attn.q_proj.weight, layer.self_attn.head_dim
    x = (torch.arange(3 * weight.shape[1], device=weight.device) * 0.7).sin().view(3, -1).to(weight.dtype)
    angles = torch.arange(3 * size, device=weight.device).view(3, -1).to(weight.dtype)
    tables = (angles.cos(), angles.sin())
    given = {"attention_mask": None, "position_embeddings": tuple(table[None] for table in tables)}
    (before, after), (first, second) = halves(epsilon_of(layer), size), parameters_of(layer)
    try:
        theirs = type(layer).forward(layer, x[None], **given)
        q, _, v = before(x[:1], *(table[:1] for table in tables), *first)
        # A first token attends to itself alone.
        ours = after(x[:1], v.repeat_interleave(q.shape[1] // v.shape[1], 1).flatten(1), *second)
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError):
        return False
    return is_near(ours, (theirs[0] if isinstance(theirs, tuple) else theirs)[0, :1])
