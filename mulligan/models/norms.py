"""RMS norms on the CPU with fewer passes over memory, which is what a small model spends a good part of its time on."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

_FULL = (torch.float32, torch.float64)


def normalised(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """``x * s`` and ``s = 1 / sqrt(mean(x^2) + eps)`` over the last dimension; x in full precision."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = torch.addcmul(_number(eps, x.dtype), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return x * scale, scale


@cache
def _number(value: float, dtype: torch.dtype) -> torch.Tensor:
    # Made once, because an operation on one token costs as much as making it.
    return torch.tensor(value, dtype=dtype)


def through_norm(
    grad: torch.Tensor, unit: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of what was normalised and of the weight, from that of ``unit * weight``."""
    by_unit = grad * unit
    along = (by_unit @ weight).unsqueeze(-1) / -weight.shape[0]  # the part of the gradient along x, removed
    return torch.addcmul(grad * weight, unit, along).mul_(scale), by_unit.reshape(-1, weight.shape[0]).sum(0)


class _RMSNorm(torch.autograd.Function):
    """RMS norm for the CPU, where torch's own is a chain of operations whose backward is 5 times slower."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        unit, scale = normalised(x.to(wide(x)), eps)
        ctx.save_for_backward(unit, scale, weight)
        ctx.dtype = x.dtype
        return (unit * weight.to(unit.dtype)).to(torch.promote_types(x.dtype, weight.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        unit, scale, weight = ctx.saved_tensors
        by_x, by_weight = through_norm(grad.to(unit.dtype), unit, scale, weight.to(unit.dtype))
        return by_x.to(ctx.dtype), by_weight.to(weight.dtype), None


def wide(x: torch.Tensor) -> torch.dtype:
    """The full precision for what is computed of a tensor: float32, or float64 where it is."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_for(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether :func:`rms_norm` is the faster one for such a tensor."""
    same = x.dtype == weight.dtype or (x.dtype not in _FULL and weight.dtype == torch.float32)
    return same and x.device.type == "cpu" and x.is_floating_point()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension; x [..., size], weight [size].

    It is computed in float32 or wider, and has the wider dtype of the two.
    """
    if not torch.is_grad_enabled():
        unit, _ = normalised(x.to(wide(x)), eps)
        return unit.mul_(weight).to(torch.promote_types(x.dtype, weight.dtype))
    out = _RMSNorm.apply(x, weight, eps)
    assert isinstance(out, torch.Tensor)
    return out


def take_norms(model: PreTrainedModel) -> int:
    """Lets the RMS norms of a transformers model compute with :func:`rms_norm` where that is faster; how many do.

    Norms that are something else by their name or by what they give (such as Gemma's, with 1 + weight) stay as they
    are. Neither weights nor what is saved change.
    """
    found = 0
    for module in model.modules():
        kind = type(module)
        if kind.__module__.startswith("transformers.") and kind.__name__.endswith("RMSNorm") and _is_plain(module):
            module.forward = MethodType(_forward, module)
            found += 1
    return found


def is_taken(norm: torch.nn.Module) -> bool:
    """Whether a norm computes with :func:`rms_norm`, its ``weight`` and its ``variance_epsilon``."""
    return computes_with(norm, _forward)


def computes_with(module: torch.nn.Module, *functions: Callable[..., Any]) -> bool:
    """Whether one of these functions stands in for the forward pass of a module's class."""
    return getattr(vars(module).get("forward"), "__func__", None) in functions


def is_near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether a trial of our code gave what theirs gave, up to the rounding of theirs' dtype."""
    near = (1e-5 if theirs.dtype in _FULL else 0.05) * float(theirs.abs().max())
    return bool((theirs - ours).abs().max() <= near)


def _forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    if is_for(hidden_states, self.weight):
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)
    return type(self).forward(self, hidden_states)


@torch.no_grad()
def _is_plain(module: Any) -> bool:
    """Whether a norm gives what :func:`rms_norm` gives, for numbers of any size and with any weight."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if "forward" in vars(module) or eps is None or weight is None or weight.ndim != 1 or not is_for(weight, weight):
        return False
    dtype = wide(weight)
    steps = torch.arange(1, 2 * len(weight) + 1, dtype=dtype).view(2, -1)
    x = steps.sin() * torch.tensor([[3.0], [eps**0.5]], dtype=dtype)  # the second is as small as eps can be seen
    kept, module.weight = module.weight, torch.nn.Parameter(1.5 + steps[0].cos(), requires_grad=False)
    try:
        return torch.allclose(module(x), rms_norm(x, module.weight, eps), rtol=1e-5, atol=1e-7)
    finally:
        module.weight = kept
