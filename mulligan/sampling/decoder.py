"""Decoding without the model's own code: its layers' matrix products, and compiled kernels between them.

A step of a small model is bound by its operations, not by their numbers: some forty a layer, most of them on a few
kilobytes. Here a layer is seven products and four calls. Rows see their own columns alone, wherever those begin, so
that rows which came late cost what they hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from mulligan.errors import UserError
from mulligan.models.forks import Forks
from mulligan.models.kernels import check_kernels
from mulligan.models.layers import epsilon_of, parameters_of
from mulligan.models.looped import LoopedForCausalLM
from mulligan.native.build import KEY
from mulligan.native.decode import DecodeKernels
from mulligan.sampling.batch import Next
from mulligan.sampling.cache import GrowingCache
from mulligan.sampling.forking import agrees


class Decoder:
    """Computes the next token's logits of rows that go on from shared prompts, for models of known layers on a CPU.

    Args:
        model: looped, or of transformers, in eval mode; it forks prompts (:mod:`mulligan.sampling.forking`). Its
            weights are read at every step and never copied.
        num_loops: of a looped model; None: the model's own number.
        exit_threshold: of a looped model, as :class:`mulligan.sampling.embedded.EmbeddedSampler` takes it.

    Raises:
        UserError: a model that this does not know or whose logits are others, or nothing to compile with.
    """

    def __init__(self, model: PreTrainedModel, num_loops: int | None = None, exit_threshold: float | None = None):
        self._model: Any = model
        self._base: Any = model.base_model
        self._layers = check_kernels(model)
        self._kernels = DecodeKernels(model.dtype)
        self._looped = isinstance(model, LoopedForCausalLM)
        config: Any = model.config.get_text_config()
        self._loops, self._threshold = config.total_ut_steps if self._looped else 1, 1.0
        self.update()
        if not agrees(model, self._logits):
            raise UserError(f"{KEY}: {model.config.model_type} does more between its layers than it knows")
        if self._looped:
            self._loops = self._loops if num_loops is None else num_loops
            self._threshold = config.early_exit_threshold if exit_threshold is None else exit_threshold

    def update(self) -> None:
        """Looks for the weights again, where a model's parameters may have become other objects."""
        self._parameters = [(*parameters_of(layer), epsilon_of(layer)) for layer in self._layers]
        norm = self._base.norm
        self._norm = norm.weight, norm.eps if self._looped else norm.variance_epsilon

    def step(self, token: Tensor, position: Tensor, forks: Forks, pads: Tensor, cache: GrowingCache) -> Next:
        """Feeds one token a row; what the next is drawn from.

        Args:
            token: int64 [R].
            position: int64 [R], of that token.
            forks: which row goes on from which prompt.
            pads: int64 [R]: columns in front of each row's own.
            cache: of the rows; it gains a column.
        """
        x = self._model.get_input_embeddings()(token)
        cos, sin = self._tables(x, position)
        of, kernels = (*forks.by_prompt, pads), self._kernels
        states: list[Tensor] = []
        slots: Any = iter(cache.layers)
        for _ in range(self._loops):
            h, h_norm = None, None  # what the layer before adds: left to the next norm, which reads it anyway
            for layer, (first, second, eps) in zip(self._layers, self._parameters, strict=True):
                norm, q, k, v, *norms = first
                o, between, gate, up, down, attention_norm, mlp_norm = second
                x, n = kernels.add_norm(x, h, h_norm, norm, eps)
                q, k, v = (functional.linear(n, *each) for each in (q, k, v))
                slot = next(slots)
                scale = cos.shape[-1] ** -0.5 if self._looped else layer.self_attn.scaling
                own, above = slot.extend(), slot.prompts.columns()
                attended = kernels.attend(q, k, v, tuple(norms), eps, cos, sin, own, above, of, scale)
                x, n = kernels.add_norm(x, functional.linear(attended, *o), attention_norm, between, eps)
                gated = kernels.gated(functional.linear(n, *gate), functional.linear(n, *up))
                h, h_norm = functional.linear(gated, *down), mlp_norm
            x = kernels.add_norm(x, h, h_norm, *self._norm)[1]
            states.append(x)
        loop = torch.zeros_like(token)
        if self._threshold < 1:
            x, loop = self._base.read_out(states, self._threshold)
        return Next(self._model.get_output_embeddings()(x).float(), loop)

    def _logits(self, _: PreTrainedModel, token: Tensor, position: Tensor, forks: Forks, cache: GrowingCache) -> Tensor:
        return self.step(token, position, forks, torch.zeros_like(token), cache).logits

    def _tables(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [R, head_dim] of the angles that positions [R] turn a head by."""
        if self._looped:
            return self._base.rotary_tables(position, x.dtype)
        cos, sin = self._base.rotary_emb(x[:, None], position[:, None])
        return cos[:, 0], sin[:, 0]
