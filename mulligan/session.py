"""A run made ready: everything built and checked, nothing trained yet. ``--dry-run`` ends here."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch

from mulligan.config import OptimizerSection, Run, resolve
from mulligan.contract import check_schedule
from mulligan.errors import UserError
from mulligan.learner.scoring import number_of_loops
from mulligan.learner.update import Learner, Plan, needs_reference
from mulligan.memory import Memory
from mulligan.methods import build_schedule
from mulligan.models.loading import LoadedModel, context_length, load_model
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.schedule import Schedule
from mulligan.seeds import seed_of
from mulligan.tasks import build_task
from mulligan.tasks.base import Task
from mulligan.texts import Texts


@dataclass(slots=True)
class Session:
    """All parts of a run."""

    run: Run
    resolved: dict[str, Any]
    task: Task
    schedule: Schedule
    loaded: LoadedModel
    texts: Texts
    sampler: EmbeddedSampler
    eval_sampler: EmbeddedSampler
    learner: Learner
    memory: Memory
    notes: list[str]  # what the contract's check found, a line a phase
    step: int = 0  # steps done
    evaluated: int = -1  # the last step that was evaluated


def learning_rate(settings: OptimizerSection, steps: int) -> Any:
    """The rate as a function of the optimizer step (from 0)."""
    total = steps * settings.epochs * settings.updates_per_batch

    def rate(update: int) -> float:
        share = min(update / max(total, 1), 1.0)
        down = {"constant": 1.0, "linear": 1 - 0.9 * share, "cosine": 0.1 + 0.45 * (1 + math.cos(math.pi * share))}
        up = min((update + 1) / settings.warm_up, 1.0) if settings.warm_up else 1.0
        return settings.learning_rate * up * down[settings.decay]

    return rate


def prepare(run: Run) -> Session:
    """Builds and checks everything a run needs.

    Raises:
        UserError: the first thing that cannot work, in one line.
    """
    schedule, method_settings = build_schedule(run.method.name, run.method.settings)
    task = build_task(run.task.name, run.task.settings)
    resolved = resolve(run, method_settings, task.settings.model_dump(mode="json"))
    torch.manual_seed(seed_of(run.seed, "torch") % 2**63)
    loaded = load_model(
        run.model.name, dtype=run.model.dtype, device=run.model.device, trust_remote_code=run.model.trust_remote_code
    )
    model = loaded.model.eval()
    texts = Texts(task, loaded.tokenizer)
    size = task.size("train")
    if size == 0:
        raise UserError(f"task '{task.name}' has no training problems")
    problems = [task.problem("train", i) for i in range(min(8, size or 8))]
    room = context_length(model)
    longest = max(len(texts.prompt(p)) for p in problems)
    if longest + 1 > room:
        raise UserError(f"a prompt of task '{task.name}' has {longest} tokens; the model's context holds {room}")
    notes = check_schedule(
        schedule, task, texts, problems[:2], max_new_tokens=run.sampling.max_new_tokens, loops=number_of_loops(model)
    )
    s, o = run.sampling, run.optimizer
    reference = copy.deepcopy(model).requires_grad_(False) if needs_reference(schedule.methods) else None
    learner = Learner(
        model,
        loaded.tokenizer,
        torch.optim.AdamW(
            model.parameters(), lr=o.learning_rate, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay
        ),
        Plan(
            temperature=s.temperature,
            max_new_tokens=s.max_new_tokens,
            updates_per_batch=o.updates_per_batch,
            epochs=o.epochs,
            tokens_per_micro_batch=o.tokens_per_micro_batch,
            clip_norm=o.clip_norm,
            seed=run.seed,
        ),
        rate=learning_rate(o, run.steps),
        reference=reference,
    )

    def sampler(rows: int) -> EmbeddedSampler:
        return EmbeddedSampler(
            model,
            loaded.tokenizer,
            temperature=s.temperature,
            max_new_tokens=s.max_new_tokens,
            stop=tuple(s.stop),
            max_rows=rows,
        )

    return Session(
        run=run,
        resolved=resolved,
        task=task,
        schedule=schedule,
        loaded=loaded,
        texts=texts,
        sampler=sampler(s.max_rows),
        eval_sampler=sampler(run.eval.max_rows),
        learner=learner,
        memory=Memory(),
        notes=notes,
    )
