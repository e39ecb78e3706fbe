"""Pre-training of a pico base from nothing: next-token loss on the corpus, for every loop.

For a looped model the loss is that of Ouro (arXiv 2510.25741): ``sum_t p_t CE_t - beta H(p)``, p the exit
distribution of each token, t over loops. Resumable: everything but the weights and the optimizer is a pure
function of the recipe and the update's index.
"""

from __future__ import annotations

import json
import math
import time
import tomllib
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from mulligan.base.corpus import Corpus, Example, Rates
from mulligan.checkpoint import (
    load_checkpoint,
    load_model_tensors,
    model_tensors,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from mulligan.models.loading import bos_context, eos_id, output_head, save_model
from mulligan.models.tokenizer import pico_tokenizer
from mulligan.seeds import rng_of, seed_of

RECIPES = Path(__file__).parent / "recipes"


class Phase(BaseModel):
    """A stretch of the recipe: its length, its mixture of rows and its wrong procedures."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    updates: int
    mixture: dict[str, float]
    rates: Rates = Rates()
    learning_rate: float | None = None  # a cosine of its own from here on; None goes on with the one before


class Recipe(BaseModel):
    """A base's whole recipe; the file lies beside this module."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seed: int
    architecture: Literal["ouro", "qwen3"]
    model: dict[str, Any]
    rows: int  # rows of an update
    pool: int = 4  # updates whose rows are drawn together and sorted by length: less padding
    learning_rate: float
    floor: float = 0.05  # the last learning rate, as a share of the first
    warm_up: int = 100
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    exit_entropy: tuple[float, float] = (0.1, 0.05)  # beta, from the first update to the last
    phases: list[Phase]

    @property
    def updates(self) -> int:
        return sum(phase.updates for phase in self.phases)

    def span_at(self, update: int) -> tuple[float, float, bool]:
        """The peak learning rate of the cosine that update (0-based) is in, how far through it is (0 to 1), and
        whether it is the first one."""
        starts = [0]
        peaks = [self.learning_rate]
        begun = 0
        for k, phase in enumerate(self.phases):
            if k and phase.learning_rate is not None:
                starts.append(begun)
                peaks.append(phase.learning_rate)
            begun += phase.updates
        span = max(k for k, start in enumerate(starts) if start <= update)
        end = starts[span + 1] if span + 1 < len(starts) else self.updates
        return peaks[span], (update - starts[span]) / (end - starts[span]), span == 0

    def rate_at(self, update: int) -> float:
        """The learning rate of update (0-based): warm-up, then its cosine down to ``floor`` of the peak."""
        peak, share, _ = self.span_at(update)
        return peak * min(
            (update + 1) / self.warm_up, self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * share))
        )

    def phase_at(self, update: int) -> int:
        """Index of the phase that update (0-based) belongs to."""
        for k, phase in enumerate(self.phases):
            if update < phase.updates:
                return k
            update -= phase.updates
        return len(self.phases) - 1


def load_recipe(name: str) -> Recipe:
    """The recipe of a shipped base: ``pico`` or ``pico-qwen3``."""
    return Recipe.model_validate(tomllib.loads((RECIPES / f"{name}.toml").read_text()))


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A new model with weights from the recipe's seed."""
    torch.manual_seed(seed_of(recipe.seed, "init") % 2**32)
    config = AutoConfig.for_model(
        recipe.architecture,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **recipe.model,
    )
    return AutoModelForCausalLM.from_config(config)


def encode(tokenizer: PreTrainedTokenizerBase, example: Example) -> tuple[list[int], int]:
    """Token ids of a row (BOS and EOS included) and the index of the first response token."""
    context = [bos_context(tokenizer), *tokenizer.encode(example.context, add_special_tokens=False)]
    response = tokenizer.encode(example.response, add_special_tokens=False)
    return [*context, *response, eos_id(tokenizer)], len(context)


def pool_batches(
    recipe: Recipe, corpora: list[Corpus], tokenizer: PreTrainedTokenizerBase, first: int
) -> list[list[tuple[list[int], int]]]:
    """The batches of updates ``first .. first + pool - 1``, rows of like length together, in a drawn order."""
    corpus = corpora[recipe.phase_at(first)]
    start = first * recipe.rows
    rows = [encode(tokenizer, corpus.row(start + i)) for i in range(recipe.pool * recipe.rows)]
    rows.sort(key=lambda row: len(row[0]))
    batches = [rows[k * recipe.rows : (k + 1) * recipe.rows] for k in range(recipe.pool)]
    rng_of(recipe.seed, "pool", first).shuffle(batches)
    return batches


def batch_loss(
    model: PreTrainedModel, batch: list[tuple[list[int], int]], beta: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of a batch and the last loop's mean cross-entropy (nats per response token, detached)."""
    width = max(len(ids) for ids, _ in batch)
    tokens = torch.zeros(len(batch), width, dtype=torch.long)
    scored = torch.zeros(len(batch), width, dtype=torch.bool)  # positions whose *next* token is in the loss
    for i, (ids, start) in enumerate(batch):
        tokens[i, : len(ids)] = torch.tensor(ids)
        scored[i, start - 1 : len(ids) - 1] = True
    targets = tokens.roll(-1, 1)[scored]
    head = output_head(model)
    # Rows are padded on the right, so causal attention needs no mask.
    if model.config.model_type != "ouro":
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        loss = F.cross_entropy(head(hidden[scored]).float(), targets)
        return loss, loss.detach()
    out = model.base_model(input_ids=tokens, use_cache=False, output_loops=True)
    hidden = torch.stack([h[scored] for h in out.loop_hidden_states])  # [L, N, d]
    each = (
        -head(hidden).float().log_softmax(-1).gather(-1, targets.expand(len(hidden), -1)[..., None])[..., 0]
    )  # [L, N]
    exits = out.exit_probabilities[scored].T  # [L, N]
    entropy = -(exits * exits.clamp_min(1e-9).log()).sum(0)
    return ((exits * each).sum(0) - beta * entropy).mean(), each[-1].mean().detach()


def pretrain(recipe: Recipe, out: Path, *, every: int = 200, report: Any = print) -> PreTrainedModel:
    """Runs or resumes a recipe in ``out``; appends one line each 20 updates to ``out/log.jsonl``.

    Args:
        every: updates between checkpoints.
        report: called with each log record.
    """
    tokenizer = pico_tokenizer()
    model = build_model(recipe, tokenizer).train()
    named = list(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for _, p in named if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        fused=True,
    )
    out.mkdir(parents=True, exist_ok=True)
    done, spent, lines = 0, 0.0, []
    found = load_checkpoint(out / "checkpoints")
    if found is not None:
        load_model_tensors(model, found.tensors["model"])
        unpack_optimizer(optimizer, model, found.tensors["optimizer"], found.state["optimizer"])
        done, spent, lines = found.step, found.state["seconds"], found.state["log"]
    corpora = [Corpus(seed_of(recipe.seed, "phase", k), p.rates, p.mixture) for k, p in enumerate(recipe.phases)]
    begun, batches = time.monotonic(), []
    recent: list[torch.Tensor] = []
    for update in range(done, recipe.updates):
        if update % recipe.pool == 0 or not batches:
            batches = pool_batches(recipe, corpora, tokenizer, update - update % recipe.pool)
        _, share, opening = recipe.span_at(update)
        rate = recipe.rate_at(update)
        for group in optimizer.param_groups:
            group["lr"] = rate
        first, last = recipe.exit_entropy
        loss, ce = batch_loss(model, batches[update % recipe.pool], first + (last - first) * share if opening else last)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        recent.append(ce)
        if (update + 1) % 20 == 0:
            seconds = spent + time.monotonic() - begun
            record = {
                "update": update + 1,
                "phase": recipe.phase_at(update),
                "nats_per_token": round(float(torch.stack(recent).mean()), 4),
                "learning_rate": round(rate, 7),
                "seconds": round(seconds, 1),
            }
            lines.append(record)
            recent = []
            report(record)
        if (update + 1) % every == 0 or update + 1 == recipe.updates:
            packed, state = pack_optimizer(optimizer, model)
            save_checkpoint(
                out / "checkpoints",
                update + 1,
                {"model": model_tensors(model), "optimizer": packed},
                {"optimizer": state, "seconds": spent + time.monotonic() - begun, "log": lines},
            )
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model.eval()
    save_model(model, tokenizer, out / "model")
    return model
