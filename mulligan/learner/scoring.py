"""The scorer: every stream of every loop through one chunked head; never a [batch, tokens, vocabulary] tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from mulligan.errors import UserError
from mulligan.learner.packing import Batch, Item, pack
from mulligan.learner.tiles import tiled_logprobs
from mulligan.models.loading import output_head

CHUNK = 1 << 23  # logits alive at a time: 32 MiB of float32


@dataclass(frozen=True, slots=True)
class Scores:
    """What the scorer returns for the N scored tokens of a batch."""

    logprobs: torch.Tensor  # [loops asked for, N], nats
    entropy: torch.Tensor | None  # [N], of the last loop asked for
    exits: torch.Tensor | None  # [N, L] exit probabilities of a looped model


def is_looped(model: torch.nn.Module) -> bool:
    """Whether the model has loops to read out."""
    return hasattr(getattr(model, "config", None), "total_ut_steps")


def number_of_loops(model: torch.nn.Module) -> int:
    """How many loops the model runs by its own config; 1 for a model without loops."""
    return int(getattr(getattr(model, "config", None), "total_ut_steps", 1))


def score(
    model: PreTrainedModel,
    batch: Batch,
    *,
    loops: tuple[int, ...] | None = None,
    entropy: bool = False,
    exits: bool = False,
    num_loops: int | None = None,
) -> Scores:
    """Log-probs of the batch's scored tokens; differentiable when gradients are on.

    Args:
        loops: 1-based loops to read out; None is the last one.
        entropy: also the entropy of the last loop asked for.
        exits: also the exit probabilities (looped models only).
        num_loops: how many loops to run; None is the model's own setting.

    Raises:
        UserError: loops or exits of a model that has none, or a loop that is not run.
    """
    if not is_looped(model):
        if loops is not None or exits or num_loops is not None:
            raise UserError(f"{model.config.model_type} has no loops to read out")
        out = model.base_model(input_ids=batch.tokens, use_cache=False, **batch.layout)
        hidden = [_at(out.last_hidden_state, batch)]
        exit_probabilities = None
    else:
        several = loops is not None or exits
        run = number_of_loops(model) if num_loops is None else num_loops
        if loops is not None and not all(1 <= loop <= run for loop in loops):
            raise UserError(f"loops {loops} cannot be read: the model runs loops 1 to {run}")
        out = model.base_model(
            input_ids=batch.tokens, use_cache=False, output_loops=several, num_loops=num_loops, **batch.layout
        )
        if loops is None:
            hidden = [_at(out.last_hidden_state, batch)]
        else:
            hidden = [_at(out.loop_hidden_states[loop - 1], batch) for loop in loops]
        exit_probabilities = _at(out.exit_probabilities, batch) if exits else None
    head = output_head(model)
    # Loops whose logits are too many to keep go through the head together, so that its gradient adds up in one place;
    # the entropy is of the last alone.
    sets = [[h] for h in hidden]
    if in_tiles(head, len(hidden) * len(batch.targets)):
        sets = [hidden[:-1], hidden[-1:]] if entropy and len(hidden) > 1 else [hidden]
    parts = [head_logprobs(model, each, batch, entropy and each is sets[-1]) for each in sets]
    return Scores(torch.cat([p[0] for p in parts]), parts[-1][1], exit_probabilities)


def shape_logits(model: PreTrainedModel, logits: torch.Tensor) -> torch.Tensor:
    """What the model makes of its head's outputs, number by number: float32, or float64 where the model is."""
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    config = model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scale
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return softcap * torch.tanh(logits / softcap) if softcap else logits


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Holds the scorer's log-probs against those of the model's own logits, on a few tokens.

    Raises:
        UserError: they differ: the model does more before its trunk or behind its last hidden state than the scorer
            knows, and every log-prob would be another than the sampler's.
    """
    # Several ids, because the embedding of one (padding) may be zero, and so its logits.
    ids = [i % output_head(model).weight.shape[0] for i in range(9)]
    batch = pack([Item(tuple(ids[:1]), tuple(ids[1:]), torch.ones(8, dtype=torch.bool), 1.0)], ids[0], model.device)
    ours = score(model, batch).logprobs[-1]
    # The scorer reads the last loop, whatever threshold the config has; the run's sampler does so too.
    fixed = {"exit_threshold": 1.0} if is_looped(model) else {}
    logits = model(input_ids=batch.tokens, use_cache=False, **fixed).logits[0, :-1].to(ours.dtype)
    theirs = logits.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    # The model may cap and scale in its own dtype, where the scorer is in float32.
    near = max(4 * torch.finfo(model.dtype).eps, 1e-5) * max(1.0, float(logits.abs().nan_to_num().max()))
    if not torch.allclose(ours, theirs, rtol=0.0, atol=near, equal_nan=True):
        raise UserError(f"{model.config.model_type}: its logits are more than its head on its last hidden state")


def _at(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    return values[batch.at[:, 0], batch.at[:, 1]]


def is_plain(head: torch.nn.Module) -> bool:
    """Whether a head does nothing but multiply by its weight and add its bias: no adapter, no hook."""
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return type(head) is torch.nn.Linear and not any(hooks) and "forward" not in vars(head)


def in_tiles(head: torch.nn.Linear, count: int) -> bool:
    """Whether the logits of so many hidden states are made tile by tile."""
    # On a CPU, keeping more than the caches hold takes longer than computing it again: measured, from 2 to 3 million.
    kept = CHUNK if head.weight.is_cuda else CHUNK // 4
    return is_plain(head) and count * len(head.weight) > kept


def head_logprobs(
    model: PreTrainedModel, hidden: Sequence[torch.Tensor], batch: Batch, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probs [K, N], and entropies [N] where there is one set alone, from K sets of hidden states [N, d].

    Where the logits of all would be too many at a time, a plain head gives them tile by tile, and any other some tokens
    at a time. With gradients on, both compute them again in the backward pass.
    """
    head = output_head(model)
    states, several = torch.cat(list(hidden)), len(hidden)
    targets, temperature = batch.targets.repeat(several), batch.temperature.repeat(several)
    size = max(1, CHUNK // head.weight.shape[0])

    def chunk(h: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        logits = shape_logits(model, head(h))
        if batch.tempered:
            logits = logits / temperature[:, None]
        if not entropy:  # in one pass each way, where the parts below are some nine
            return -functional.cross_entropy(logits, targets, reduction="none")[None]
        norm = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - norm
        return torch.stack([logprobs, norm - ((logits - norm[:, None]).exp() * logits).sum(-1)])

    if in_tiles(head, len(states)):
        logprobs, entropies = tiled_logprobs(
            head,
            states,
            targets,
            temperature,
            shape=partial(shape_logits, model),
            numbers=CHUNK if states.is_cuda else CHUNK // 8,  # what the caches of a CPU hold
            entropy=entropy,
        )
        return logprobs.view(several, -1), entropies
    pieces = list(zip(states.split(size), targets.split(size), temperature.split(size), strict=True))
    again = len(pieces) > 1 and torch.is_grad_enabled()
    out = torch.cat([checkpoint(chunk, *p, use_reentrant=False) if again else chunk(*p) for p in pieces], dim=1)
    return out[0].view(several, -1), out[1] if entropy else None
