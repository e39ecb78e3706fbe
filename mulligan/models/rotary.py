"""Rotary position embedding on the CPU in three operations, with the norm that some models have before it.

As transformers writes it (a product, a negation, a concatenation, another product, a sum) it takes a tenth of a small
model's time, and its gradient more. Element i of a head is paired with element i + head_dim / 2 (RoPE, arXiv
2104.09864, in the order of dimensions of GPT-NeoX).
"""

from __future__ import annotations

import sys
from types import MethodType
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mulligan.models.norms import computes_with, is_for, is_near, is_taken, normalised, through_norm, wide

_PROJECTIONS, _NORMS = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"q_norm", "k_norm"}


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _turn_back(grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The gradient of x from that of :func:`_turn`: the transposed matrix."""
    half = grad.shape[-1] // 2
    out = grad * cos
    out[..., :half].addcmul_(grad[..., half:], sin[..., half:])
    out[..., half:].addcmul_(grad[..., :half], sin[..., :half], value=-1)
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _turn_back(grads[0], *ctx.saved_tensors), None, None


class _NormAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        unit, scale = normalised(x, eps)
        ctx.save_for_backward(unit, scale, weight, cos, sin)
        # Into the tables, which are one head wide, go the weights of what they are multiplied with.
        return _turn(unit, cos * weight, sin * weight.roll(weight.shape[0] // 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        unit, scale, weight, cos, sin = ctx.saved_tensors
        return (*through_norm(_turn_back(grads[0], cos, sin), unit, scale, weight), None, None, None)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``x[i] cos[i] - x[i + d/2] sin[i]`` in the first half, ``x[i] cos[i] + x[i - d/2] sin[i]`` in the second.

    Args:
        x: [..., d], d even.
        cos: [..., d], in any shape that x takes; sin as well. No gradient goes to them.

    Returns:
        As x, in the wider dtype of x and cos.
    """
    if x.dtype != cos.dtype:
        x = x.to(torch.promote_types(x.dtype, cos.dtype))
    out = _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _turn(x, cos, sin)
    assert isinstance(out, torch.Tensor)
    return out


def norm_and_rotate(
    x: torch.Tensor, weight: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """:func:`rotate` of the RMS norm of x: ``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    Args:
        x: [..., d].
        weight: [d].
        cos: as for :func:`rotate`; sin as well.

    Returns:
        As x, in the widest dtype of x, weight and cos; computed in float32 or wider.
    """
    dtype, full = x.dtype, wide(x)
    if not x.dtype == weight.dtype == cos.dtype == full:
        dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), cos.dtype)
        x, weight, cos, sin = x.to(full), weight.to(full), cos.to(full), sin.to(full)
    if torch.is_grad_enabled():
        out = _NormAndRotate.apply(x, weight, eps, cos, sin)
        assert isinstance(out, torch.Tensor)
    else:
        out = _turn(normalised(x, eps)[0].mul_(weight), cos, sin)
    return out if dtype == full else out.to(dtype)


def take_rotary(model: PreTrainedModel) -> int:
    """Lets the attention layers of a transformers model compute with these functions; how many do.

    Those whose code is another by what they are made of or by what they give on a few tokens stay as they are (pairs of
    neighbouring elements, a part of a head rotated, sinks, gates). To be called behind
    :func:`mulligan.models.norms.take_norms`. Neither weights nor what is saved change.
    """
    embed, found = getattr(model.base_model, "rotary_emb", None), 0
    for module in model.modules() if embed is not None else ():
        if _is_alike(module) and _agrees(module, embed):
            module.forward = MethodType(_forward, module)
            found += 1
    return found


def _forward(
    self: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    past_key_values: Any = None,
    **more: Any,
) -> Any:
    if hidden_states.device.type != "cpu":
        return type(self).forward(
            self, hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **more
        )
    before = hidden_states.shape[:-1]
    cos, sin = (table.unsqueeze(-2) for table in position_embeddings)
    shape = (*before, -1, self.head_dim)
    q, k, v = (project(hidden_states).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
    if hasattr(self, "q_norm"):
        q = norm_and_rotate(q, self.q_norm.weight, self.q_norm.variance_epsilon, cos, sin)
        k = norm_and_rotate(k, self.k_norm.weight, self.k_norm.variance_epsilon, cos, sin)
    else:
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    out, weights = attend(self, q, k, v, attention_mask, past_key_values, more)
    return self.o_proj(out), weights


def attend(
    layer: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_key_values: Any,
    more: Any,
) -> tuple[torch.Tensor, Any]:
    """What is between an attention layer's projections, by the implementation that its config names.

    Args:
        q: [rows, tokens, heads, head_dim], rotated; k and v as well, with their own number of heads.
        more: keywords of the layer's call.

    Returns:
        [rows, tokens, heads * head_dim], and what the implementation gives beside it.
    """
    before = q.shape[:2]
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, layer.layer_idx)
    eager = sys.modules[type(layer).__module__].eager_attention_forward  # pyright: ignore[reportAttributeAccessIssue]
    function = ALL_ATTENTION_FUNCTIONS.get_interface(layer.config._attn_implementation, eager)
    if (window := getattr(layer, "sliding_window", None)) is not None:
        more = {**more, "sliding_window": window}
    dropout = layer.attention_dropout if layer.training else 0.0
    out, weights = function(layer, q, k, v, attention_mask, dropout=dropout, scaling=layer.scaling, **more)
    return out.reshape(*before, -1), weights


def is_own(attention: torch.nn.Module) -> bool:
    """Whether a layer computes with the functions of this module."""
    return computes_with(attention, _forward)


def _is_alike(module: Any) -> bool:
    """Whether an attention layer is made of what :func:`_forward` knows."""
    children = {name for name, _ in module.named_children()}
    return (
        type(module).__module__.startswith("transformers.")
        and type(module).__name__.endswith("Attention")
        and "forward" not in vars(module)
        and children in (_PROJECTIONS, _PROJECTIONS | _NORMS)
        and not [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        and all(hasattr(module, name) for name in ("head_dim", "layer_idx", "scaling", "attention_dropout", "config"))
        and hasattr(sys.modules[type(module).__module__], "eager_attention_forward")
        and all(
            is_taken(getattr(module, name)) and getattr(module, name).weight.shape == (module.head_dim,)
            for name in children & _NORMS
        )
    )


@torch.no_grad()
def _agrees(module: Any, embed: Any) -> bool:
    """Whether a layer gives what :func:`_forward` gives, with any weights in its norms."""
    weight = module.q_proj.weight
    if not is_for(weight, weight):
        return False
    x = (torch.arange(6 * weight.shape[1]) * 0.7).sin().view(2, 3, -1).to(weight.dtype)
    norms = [getattr(module, name) for name in ("q_norm", "k_norm") if hasattr(module, name)]
    kept, training = [norm.weight for norm in norms], module.training
    module.eval()
    for i, norm in enumerate(norms):
        other = 1.5 + (torch.arange(len(norm.weight)) + 5.0 * i).cos()
        norm.weight = torch.nn.Parameter(other.to(norm.weight.dtype), requires_grad=False)
    try:
        tables = embed(x, torch.tensor([[0, 1, 2], [5, 6, 9]]))
        if tables[0].shape[-1] != module.head_dim:
            return False
        theirs, ours = type(module).forward(module, x, tables, None)[0], _forward(module, x, tables)[0]
    except (ValueError, RuntimeError, TypeError, IndexError, AttributeError):  # a layer that is called otherwise
        return False
    finally:
        module.train(training)
        for norm, own in zip(norms, kept, strict=True):
            norm.weight = own
    return is_near(ours, theirs)
