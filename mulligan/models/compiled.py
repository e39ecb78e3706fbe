"""Layers whose element-wise work is compiled: all of a layer before its attention, and all behind it.

A layer of a small model spends as long on norms, rotary embedding, activations and sums as on matrix products. Compiled
(``torch.compile``) they are a few passes over memory in place of some forty. Attention stays outside, with its trees,
forks and caches, so the two parts see a plain list of tokens whose number is the only size that varies.

The parts are compiled when a run begins, on as many tokens every time: what is compiled depends on the first sizes that
are seen, and a run that goes on must compute as it did before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mulligan.errors import UserError
from mulligan.models import rotary
from mulligan.models.layers import epsilon_of, halves, known_layers, parameters_of
from mulligan.models.looped import LoopedLayer
from mulligan.models.norms import computes_with

_TOKENS = (2048, 64)  # of the passes that compile: sums over many tokens are another program
_FORMS = 64  # of one part that may be compiled in one process: models, dtypes, with and without gradients
_warming = False  # whether a pass is there to compile


@cache
def _halves(eps: float, size: int, compiled: bool) -> tuple[Callable[..., Any], Callable[..., Any]]:
    before, after = halves(eps, size)
    if not compiled:
        return before, after
    return torch.compile(before, fullgraph=True), torch.compile(after, fullgraph=True)


def _flat(x: Tensor) -> Tensor:
    """[rows, tokens, size] as [rows * tokens, size]; no view, since a view is compiled for each kind of base."""
    return torch.ops.aten._unsafe_view(x.contiguous(), (x.shape[0] * x.shape[1], x.shape[2]))


def _run(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """A layer's output for x [rows, tokens, hidden].

    Args:
        cos: [rows or 1, tokens, head_dim]; sin as well.
        attend: from queries, keys and values [rows, tokens, heads, head_dim] to [rows, tokens, heads * head_dim].
    """
    shape, (first, second) = x.shape, layer.parts
    flat, cos, sin = _flat(x), _flat(cos.expand(*shape[:2], -1)), _flat(sin.expand(*shape[:2], -1))
    # One token is a size that compilers make another program of.
    before, after = _halves(layer.epsilon, cos.shape[-1], len(flat) > 1)
    _mark(flat, cos, sin)
    q, k, v = before(flat, cos, sin, *first)
    # Below autocast attention chooses its dtype by the length of the rows.
    attended = _flat(attend(*(each.view(*shape[:2], *each.shape[1:]) for each in (q, k, v)))).to(v.dtype)
    _mark(attended)
    return after(flat, attended, *second).view(shape)


def _mark(*tensors: Tensor) -> None:
    """While parts are compiled: the number of tokens varies."""
    for each in tensors if _warming else ():
        torch._dynamo.mark_dynamic(each, 0)


def _forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **more: Any,
) -> Tensor:
    """A decoder layer of transformers."""
    if _decodes(hidden_states, past_key_values):
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache, **more}
        given |= {"past_key_values": past_key_values, "position_embeddings": position_embeddings}
        return type(self).forward(self, hidden_states, **given)
    assert position_embeddings is not None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return rotary.attend(self.self_attn, q, k, v, attention_mask, past_key_values, more)[0]

    return _run(self, hidden_states, *position_embeddings, attend)


def _forward_looped(self: Any, x: Tensor, context: Any, past_key_values: Any = None, slot: int = 0) -> Tensor:
    if _decodes(x, past_key_values):
        return type(self).forward(self, x, context, past_key_values, slot)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.self_attn.attend(q, k, v, context, past_key_values, slot)

    return _run(self, x, context.cos[:, :, 0], context.sin[:, :, 0], attend)


def _decodes(x: Tensor, cache: Any) -> bool:
    """Whether a pass is better off as it is: a CPU decodes no faster, since each call of a part has to be checked."""
    return cache is not None and x.device.type == "cpu"


def compile_layers(model: PreTrainedModel, autocast: torch.dtype | None = None) -> None:
    """Has the layers of a model compiled, for passes with and without gradients.

    Args:
        model: as :func:`mulligan.models.loading.load_model` gives it, looped or of transformers.
        autocast: the dtype of the learner's passes, where it is another than the weights'.

    Raises:
        UserError: layers that are made otherwise, or nothing to compile with.
    """
    layers = known_layers(model, "model.compile")
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _FORMS)
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # it would go on without, and say so in a warning
    for layer in layers:
        layer.parts, layer.epsilon = parameters_of(layer), epsilon_of(layer)
        layer.forward = MethodType(_forward_looped if isinstance(layer, LoopedLayer) else _forward, layer)
    warm_up(model, autocast)


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether :func:`compile_layers` has seen this model, or the one that it was copied from."""
    layers = getattr(model.base_model, "layers", None) or ()
    return any(computes_with(layer, _forward, _forward_looped) for layer in layers)


def warm_up(model: PreTrainedModel, autocast: torch.dtype | None = None) -> None:
    """Compiles what a model needs: in its own dtype without gradients, and in that of the learner with and without.

    Raises:
        UserError: there is no compiler.
    """
    global _warming
    _warming = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own code
            for grad, dtype in _modes(any(p.requires_grad for p in model.parameters()), autocast):
                for count in _TOKENS:
                    _pass(model, count, grad, dtype)
    except Exception as error:  # a compiler raises anything at all
        if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
            raise
        cause = getattr(error, "inner_exception", error)
        line = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
        raise UserError(f"model.compile: it does not compile here: {type(cause).__name__}: {line}") from error
    finally:
        _warming = False
        model.zero_grad(set_to_none=True)


def _pass(model: PreTrainedModel, count: int, grad: bool, dtype: torch.dtype | None) -> None:
    """So many tokens forward, and with gradients backward."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # pyright: ignore
    # Rows of 16, since attention is not what this is for.
    tokens = torch.arange(count, device=model.device).view(-1, 16) % vocabulary
    with torch.set_grad_enabled(grad), torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        states = model.base_model(input_ids=tokens, use_cache=False)[0]
    if grad:
        states.float().sum().backward()


def _modes(learns: bool, autocast: torch.dtype | None) -> Iterator[tuple[bool, torch.dtype | None]]:
    yield False, None
    if autocast is not None:
        yield False, autocast
    if learns:
        yield True, autocast
