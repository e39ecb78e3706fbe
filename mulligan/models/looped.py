"""The looped language model (Ouro, arXiv 2510.25741), native to transformers.

N layers are applied L times with the same weights. After every loop the final norm is applied, and
its output feeds three readers: the next loop, the exit gate and the LM head. So every loop t has a
next-token distribution P^(t) of its own, and the gate gives the probability of stopping after it.

Parameter names and config keys are those of the published checkpoints (``model_type`` "ouro"), so
they load without remote code, and what is saved can be read by whatever reads those. Shapes: B
sequences, T tokens, width d, L loops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import ModelOutput

from mulligan.errors import UserError
from mulligan.models.attention import Branches, below_autocast, branches_of, no_autocast, tree_attention
from mulligan.models.forks import Forks, forked_attention, forks_of
from mulligan.models.norms import is_for, rms_norm, wide
from mulligan.models.rotary import rotate

_PUBLISHED_NAMES = {"LoopedForCausalLM": "OuroForCausalLM", "LoopedModel": "OuroModel"}


class LoopedConfig(PreTrainedConfig):
    """Sizes of a looped model; the keys of a published ``config.json``.

    Args:
        vocab_size: number of tokens.
        hidden_size: width d.
        intermediate_size: width of the SwiGLU.
        num_hidden_layers: N, the layers that are looped over.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads, a divisor of the query heads; None: as many.
        head_dim: None: ``hidden_size / num_attention_heads``.
        total_ut_steps: L, the loops that are run unless a call says otherwise.
        early_exit_threshold: q in [0, 1]: outside of training, a token's logits are those of the first loop
            after which the model stops with a probability of at least q. 1.0 (or None): of the last loop.
        rope_parameters: ``{"rope_type": "default", "rope_theta": ...}``; an older ``rope_theta`` key
            is read too.
        initializer_range: standard deviation of fresh weights; None: ``1/sqrt(fan_in)`` for the
            projections, which suits narrow models and is 0.022 at d = 2048, and 1 for untied embeddings.

    An ``auto_map`` to a checkpoint's own code is dropped: nothing here runs it, and a copy of the config
    in another directory would point at files that are not there.

    Raises:
        UserError: sizes that do not fit, or a setting whose meaning is not implemented.
    """

    model_type = "ouro"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 49152,
        hidden_size: int = 2048,
        intermediate_size: int = 5632,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        total_ut_steps: int = 4,
        early_exit_threshold: float | None = 1.0,
        hidden_act: str = "silu",
        max_position_embeddings: int = 65536,
        initializer_range: float | None = None,
        rms_norm_eps: float = 1e-6,
        rope_parameters: dict[str, Any] | None = None,
        attention_dropout: float = 0.0,
        use_cache: bool = True,
        tie_word_embeddings: bool = False,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.total_ut_steps = total_ut_steps
        self.early_exit_threshold = _checked_threshold("early_exit_threshold", early_exit_threshold)
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.attention_dropout = attention_dropout
        self.use_cache = use_cache
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.rope_parameters = rope_parameters
        kwargs.setdefault("rope_theta", 1e6)  # only read where rope_parameters does not say
        kwargs.pop("auto_map", None)
        self._check_sizes()  # before transformers' own checks, whose messages have several lines
        super().__init__(**kwargs)
        self._check_kinds()  # after the older keys in kwargs were translated

    def _check_sizes(self) -> None:
        if self.head_dim % 2 or self.head_dim * self.num_attention_heads < 1:
            raise UserError(f"looped model: head_dim must be even and positive, not {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"looped model: num_key_value_heads ({self.num_key_value_heads}) does not divide "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.total_ut_steps < 1:
            raise UserError(f"looped model: total_ut_steps must be at least 1, not {self.total_ut_steps}")

    def _check_kinds(self) -> None:
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind != "default":
            raise UserError(f"looped model: rope_type '{kind}' is not supported (only 'default')")
        # early_exit_step is the published code's way to read out one loop of all that it runs.
        only = {"hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False, "early_exit_step": None}
        for key, right in only.items():
            if getattr(self, key, right) != right:
                raise UserError(f"looped model: {key} must be {right!r}, not {getattr(self, key)!r}")
        others = {kind for kind in getattr(self, "layer_types", None) or () if kind != "full_attention"}
        if others:
            raise UserError(f"looped model: layer_types must all be 'full_attention', not '{min(others)}'")

    def to_dict(self) -> dict[str, Any]:
        """As transformers', with the published names of the architectures, by which other programs know them."""
        out = super().to_dict()
        if out.get("architectures"):
            out["architectures"] = [_PUBLISHED_NAMES.get(name, name) for name in out["architectures"]]
        return out


@dataclass
class LoopedModelOutput(ModelOutput):
    """What :class:`LoopedModel` returns.

    Attributes:
        last_hidden_state: [B, T, d], after the final norm of the last loop that was run; of each
            token's exit loop with an ``exit_threshold`` below 1.
        past_key_values: the cache, or None.
        hidden_states: with ``output_hidden_states``: the embeddings, then each loop's output.
        loop_hidden_states: with ``output_loops``: one [B, T, d] a loop, each after the final norm.
        exit_probabilities: with ``output_loops``: [B, T, loops], float32 or wider; the probability
            of stopping after each loop, the last one taking the rest. Sums to 1.
        exit_loops: with an ``exit_threshold`` below 1: int64 [B, T], the loop that is read out, from 1.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    loop_hidden_states: tuple[torch.Tensor, ...] | None = None
    exit_probabilities: torch.Tensor | None = None
    exit_loops: torch.Tensor | None = None


@dataclass
class LoopedCausalLMOutput(ModelOutput):
    """What :class:`LoopedForCausalLM` returns: :class:`LoopedModelOutput`'s fields, and:

    Attributes:
        loss: mean cross-entropy of the logits in nats, when labels were given.
        logits: [B, kept, vocabulary], the head on ``last_hidden_state``.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    last_hidden_state: torch.Tensor | None = None
    loop_hidden_states: tuple[torch.Tensor, ...] | None = None
    exit_probabilities: torch.Tensor | None = None
    exit_loops: torch.Tensor | None = None


def exit_distribution(gates: torch.Tensor) -> torch.Tensor:
    """Exit probabilities from gate logits: ``p_t = s(g_t) prod_{j<t} (1 - s(g_j))``, p_L the rest.

    Args:
        gates: [..., L-1], logits of stopping after each loop but the last.

    Returns:
        [..., L], summing to 1; computed from logarithms, so that a shut gate has a finite gradient.
    """
    stay = F.pad(F.logsigmoid(-gates).cumsum(-1), (1, 0))  # log prod_{j<t} (1 - s(g_j)), t = 1..L
    stop = F.pad(F.logsigmoid(gates), (0, 1))  # the last loop always stops
    return (stay + stop).exp()


def exit_loops(gates: torch.Tensor, threshold: float) -> torch.Tensor:
    """The first loop whose cumulative exit probability reaches the threshold, else the last.

    Args:
        gates: [..., L-1], logits of stopping after each loop but the last; float32 or wider.
        threshold: q in [0, 1]; 1 is the last loop whatever the gates say, also where a probability rounds to 1.

    Returns:
        int64 [...], from 1 to L.
    """
    if threshold >= 1.0:
        return torch.full(gates.shape[:-1], gates.shape[-1] + 1, device=gates.device)
    # CDF_t = 1 - prod_{j<=t} (1 - s(g_j)). The product is compared, because near 1 a CDF has few digits; and it is a
    # product, not a sum of logarithms, so that round numbers stay round: (1/2)(1/2) reaches 0.75 exactly.
    stay = torch.sigmoid(-gates).cumprod(-1)
    return 1 + (stay > 1.0 - threshold).sum(-1)


def _checked_threshold(who: str, threshold: float | None) -> float:
    """An exit threshold; None is 1.0, the last loop."""
    if threshold is None:
        return 1.0
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0.0 <= threshold <= 1.0:
        raise UserError(f"looped model: {who} must be a number from 0 to 1 (1: the last loop), not {threshold!r}")
    return float(threshold)


class LoopedRMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.size, self.eps = (size,), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.weight.dtype)  # below autocast x may be bfloat16; norms and the residual stream are not
        if is_for(x, self.weight):
            return rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.size, self.weight, self.eps)


class LoopedMLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass(slots=True)
class _Context:
    """What all layers of all loops share in one forward pass; computed once."""

    cos: torch.Tensor  # [1 or B, T, 1, head_dim]
    sin: torch.Tensor  # the same
    mask: torch.Tensor | None  # what SDPA takes; None: causal (T > 1) or everything (T = 1)
    causal: bool
    branches: Branches | None = None  # in place of a mask: the tokens are trees
    forks: Forks | None = None  # in place of a mask: the rows go on from shared prompts


class LoopedAttention(nn.Module):
    """Causal attention; always through torch's SDPA."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        self.kernels = False  # mulligan.models.kernels
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, context: _Context, cache: Cache | None, slot: int) -> torch.Tensor:
        shape = (*x.shape[:2], -1, self.head_dim)
        q = rotate(self.q_proj(x).view(shape), context.cos, context.sin)
        k = rotate(self.k_proj(x).view(shape), context.cos, context.sin)
        return self.o_proj(self.attend(q, k, self.v_proj(x).view(shape), context, cache, slot))

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: _Context, cache: Cache | None, slot: int
    ) -> torch.Tensor:
        """From queries, keys and values [B, T, heads, head_dim], rotated, to [B, T, heads * head_dim]."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, slot)
        if context.forks is not None:
            return forked_attention(q, k, v, context.forks).transpose(1, 2).flatten(2)
        if context.branches is not None:
            return tree_attention(q, k, v, context.branches, kernels=self.kernels).transpose(1, 2).flatten(2)
        grouped = self.groups > 1
        if grouped and context.mask is not None:
            # Given a mask, SDPA's grouped mode falls back to a kernel that stores every score.
            k, v, grouped = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1), False
        q, k, v = below_autocast(q, k, v, q.shape[2])
        with no_autocast(q.device):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=context.mask, is_causal=context.causal, enable_gqa=grouped
            )
        return out.transpose(1, 2).flatten(2)


class LoopedLayer(GradientCheckpointingLayer):
    """One layer with sandwich norms: ``x += N2(Attn(N1 x)); x += N4(MLP(N3 x))``."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__()
        self.self_attn = LoopedAttention(config)
        self.mlp = LoopedMLP(config)
        self.input_layernorm = LoopedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm_2 = LoopedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LoopedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm_2 = LoopedRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, context: _Context, past_key_values: Cache | None = None, slot: int = 0
    ) -> torch.Tensor:
        x = x + self.input_layernorm_2(self.self_attn(self.input_layernorm(x), context, past_key_values, slot))
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


class LoopedPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: LoopedConfig
    config_class = LoopedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LoopedLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # transformers' `init` skips what a checkpoint has filled.
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, 0.0, module.in_features**-0.5 if std is None else std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            # Sublayer outputs have unit rms (sandwich norms), so embeddings do too, unless they are the head as well.
            wide = self.config.hidden_size**-0.5 if self.config.tie_word_embeddings else 1.0
            init.normal_(module.weight, 0.0, wide if std is None else std)
        elif isinstance(module, LoopedRMSNorm):
            init.ones_(module.weight)


class LoopedModel(LoopedPreTrainedModel):
    """The looped trunk, without the LM head: hidden states only."""

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LoopedLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = LoopedRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)
        self.gradient_checkpointing = False
        self.rope_theta = float((config.rope_parameters or {})["rope_theta"])
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        exit_threshold: float | None = None,
        output_loops: bool = False,
        output_hidden_states: bool | None = None,
    ) -> LoopedModelOutput:
        """Run the loops.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, cached + T], nonzero at real tokens; or what SDPA takes, with four
                dimensions; or a :meth:`Branches.mask`, without a cache; or a :meth:`Forks.mask`. None
                when nothing is padded (also right padding whose outputs are ignored): then no mask is
                built and the fast causal kernel runs.
            position_ids: int64 [B or 1, T]; None: counted from the mask, so that left padding does
                not shift a sequence.
            past_key_values: a cache; it grows by T in ``num_loops * N`` slots (slot = loop * N + layer).
            inputs_embeds: [B, T, d], in place of ``input_ids``.
            use_cache: None: only when ``past_key_values`` is given. Ignored under checkpointing.
            num_loops: how many loops to run; None: the config's ``total_ut_steps``. More are possible; nothing
                says that a model is better with more than it was trained with.
            exit_threshold: q: each token is read out after the first loop whose cumulative exit probability is
                at least q. All loops run all the same, since later tokens attend to the keys of each of them.
                None, as 1: the last loop; the config's threshold is the causal model's business.
            output_loops: return every loop's hidden state and the exit probabilities.
            output_hidden_states: return the embeddings and each loop's output.

        Raises:
            UserError: a number of loops or a threshold out of range, the inputs are missing or doubled, or the
                cache was filled with fewer loops, cannot grow or is given under activation checkpointing.
        """
        config = self.config
        loops = config.total_ut_steps if num_loops is None else num_loops
        if loops < 1:
            raise UserError(f"num_loops must be at least 1, not {loops}")
        threshold = _checked_threshold("exit_threshold", exit_threshold)
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        cache = self._open_cache(past_key_values, use_cache, loops)
        context = self._context(x, attention_mask, position_ids, 0 if cache is None else cache.get_seq_length())
        embeddings, states = x, []
        for loop in range(loops):
            for i, layer in enumerate(self.layers):
                x = layer(x, context, past_key_values=cache, slot=loop * len(self.layers) + i)
            x = self.norm(x)
            states.append(x)

        output = LoopedModelOutput(last_hidden_state=x, past_key_values=cache)
        if threshold < 1.0:
            output.last_hidden_state, output.exit_loops = self.read_out(states, threshold)
        if output_hidden_states:
            output.hidden_states = (embeddings, *states)
        if output_loops:
            output.loop_hidden_states = tuple(states)
            output.exit_probabilities = exit_distribution(self._gates(states))
        return output

    def read_out(self, states: list[torch.Tensor], threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Each token's state [..., d] of its exit loop, and that loop, int64 [...] from 1.

        Args:
            states: of every loop, each [..., d], after the final norm.
            threshold: q, as for :meth:`forward`, below 1.
        """
        found, x = exit_loops(self._gates(states), threshold), states[-1]
        for loop, state in enumerate(states[:-1], start=1):
            x = torch.where((found == loop)[..., None], state, x)
        return x, found

    def rotary_tables(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [..., head_dim] of the angles that positions [...] turn a head by."""
        full = torch.promote_types(dtype, torch.float32)  # angles are never computed in half precision
        size = self.config.head_dim
        exponents = torch.arange(0, size, 2, device=positions.device, dtype=full) / -size
        angles = positions[..., None].to(full) * self.rope_theta**exponents
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)  # [..., head_dim / 2]
        return torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)

    def _gates(self, states: list[torch.Tensor]) -> torch.Tensor:
        """Gate logits [..., loops - 1] after each loop but the last, float32 or wider."""
        none = states[0].new_empty((*states[0].shape[:-1], 0))
        with no_autocast(none.device):  # probabilities are never computed in half precision
            gates = torch.cat([none, *(self.early_exit_gate(h) for h in states[:-1])], dim=-1)
        return gates.to(wide(gates))

    def _open_cache(self, cache: Cache | None, use_cache: bool | None, loops: int) -> Cache | None:
        """The cache to use, with a slot for each layer of each loop."""
        if self.gradient_checkpointing and self.training:
            if cache is not None:
                raise UserError("a cache cannot be used under activation checkpointing; call eval() first")
            return None  # the recomputation would write every key twice
        if cache is None:
            return DynamicCache() if use_cache else None
        slots = loops * len(self.layers)
        if cache.is_compileable:
            raise UserError(f"a looped model needs a cache that grows, not a {type(cache).__name__}")
        if cache.layer_class_to_replicate is None and len(cache.layers) < slots:
            # `generate` makes one slot a layer; it cannot know that the layers are looped.
            if not isinstance(cache, DynamicCache):
                raise UserError(f"a {type(cache).__name__} of {len(cache.layers)} slots; {loops} loops need {slots}")
            cache.layers.extend(DynamicLayer() for _ in range(slots - len(cache.layers)))
        if cache.get_seq_length() != cache.get_seq_length(slots - 1):
            raise UserError(f"this cache was not filled with {loops} loops; use one num_loops per cache")
        return cache

    def _context(
        self, x: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None, past: int
    ) -> _Context:
        """Rotary tables and attention mask of one forward pass."""
        length = x.shape[1]
        if mask is not None and mask.ndim == 2:
            mask = mask.bool()
            if mask.all():
                mask = None
            elif positions is None:
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -length:]
        if positions is None:
            positions = torch.arange(past, past + length, device=x.device)[None]

        cos, sin = (table[:, :, None] for table in self.rotary_tables(positions, x.dtype))

        if mask is None:
            if past == 0 or length == 1:
                return _Context(cos, sin, None, causal=length > 1)
            # SDPA's own causal flag counts from the first key, not from the last.
            mask = torch.ones(length, past + length, dtype=torch.bool, device=x.device).tril(past)
        elif mask.ndim == 2:
            mask = _causal_mask(mask, length)
        elif (branches := branches_of(mask)) is not None:
            return _Context(cos, sin, None, causal=False, branches=branches)
        elif (forks := forks_of(mask)) is not None:
            return _Context(cos, sin, None, causal=False, forks=forks)
        return _Context(cos, sin, mask, causal=False)


def _causal_mask(real: torch.Tensor, length: int) -> torch.Tensor:
    """What each of the last ``length`` tokens sees: bool [B, 1, length, S], from the real tokens [B, S].

    A padding token sees itself, because a softmax over nothing is NaN and would spread.
    """
    size = real.shape[1]
    causal = torch.ones(length, size, dtype=torch.bool, device=real.device).tril(size - length)
    return (causal & real[:, None, None, :]) | causal.triu(size - length)


class LoopedForCausalLM(LoopedPreTrainedModel, GenerationMixin):
    """The looped model with its LM head; ``generate`` works, and takes ``num_loops`` and ``exit_threshold``."""

    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "model.embed_tokens.weight"
    }

    def __init__(self, config: LoopedConfig) -> None:
        super().__init__(config)
        self.model = LoopedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_loops: int | None = None,
        exit_threshold: float | None = None,
        output_loops: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache_position: torch.Tensor | None = None,
        **loss_kwargs: Any,
    ) -> LoopedCausalLMOutput:
        """As :meth:`LoopedModel.forward`, and the logits of each token's last or exit loop.

        Args:
            exit_threshold: None: the config's ``early_exit_threshold`` in evaluation mode, and 1 in training mode,
                where every token is read out after the same number of loops.
            labels: int64 [B, T], -100 where ignored; shifted here, as transformers does.
            logits_to_keep: the last n tokens only (0: all), or the indices of the tokens.
            return_dict: accepted for transformers; the output is always a dataclass.
            cache_position: accepted for older releases of transformers; the cache knows its length.
            loss_kwargs: passed on to transformers' causal loss.
        """
        if exit_threshold is None and not self.training:
            exit_threshold = self.config.early_exit_threshold
        output = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_loops=num_loops,
            exit_threshold=exit_threshold,
            output_loops=output_loops,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if loss_kwargs and labels is None:
            raise TypeError(f"unexpected arguments: {', '.join(sorted(loss_kwargs))}")
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **loss_kwargs)
        return LoopedCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            last_hidden_state=output.last_hidden_state,
            loop_hidden_states=output.loop_hidden_states,
            exit_probabilities=output.exit_probabilities,
            exit_loops=output.exit_loops,
        )


def set_loops(model: PreTrainedModel, loops: int) -> None:
    """Makes this the number of loops that a model runs unless a call says otherwise; it is saved with the model.

    Raises:
        UserError: the model has no loops.
    """
    if not isinstance(model.config, LoopedConfig):
        raise UserError(f"model.loops is {loops}, but a {model.config.model_type} model has no loops")
    model.config.total_ut_steps = loops


def register() -> None:
    """Make transformers' Auto classes know ``model_type`` "ouro"; harmless when called again.

    A class that is registered goes before one of transformers' own, and before a checkpoint's own code.
    """
    AutoConfig.register(LoopedConfig.model_type, LoopedConfig, exist_ok=True)
    AutoModel.register(LoopedConfig, LoopedModel, exist_ok=True)
    AutoModelForCausalLM.register(LoopedConfig, LoopedForCausalLM, exist_ok=True)
