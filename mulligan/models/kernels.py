"""Which models compute with the compiled kernels of :mod:`mulligan.native`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from mulligan.errors import UserError
from mulligan.models.layers import known_layers
from mulligan.native.build import DTYPES, KEY, library


def check_kernels(model: PreTrainedModel) -> list[Any]:
    """The layers of a model that the kernels are for.

    Raises:
        UserError: they are not for this model, or there is nothing to compile them with.
    """
    kinds = {p.dtype for p in model.parameters()}
    if model.device.type != "cpu" or len(kinds) > 1 or not kinds.issubset(DTYPES):
        have = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        raise UserError(f"{KEY}: for float32 or bfloat16 on a CPU, but the model is {have} on {model.device.type}")
    layers = known_layers(model, KEY)
    library()
    return layers


def take_kernels(model: PreTrainedModel) -> None:
    """Has attention over trees computed by the kernels in every layer; a copy of the model has it too.

    Raises:
        UserError: as for :func:`check_kernels`.
    """
    for layer in check_kernels(model):
        layer.self_attn.kernels = True
