"""A run made ready: everything built and checked, nothing trained yet. ``--dry-run`` ends here."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from mulligan.config import ModelSection, OptimizerSection, Run, flatten, resolve, with_defaults
from mulligan.contract import check_schedule
from mulligan.errors import UserError
from mulligan.learner.scoring import number_of_loops
from mulligan.learner.update import Learner, Plan, frozen_models
from mulligan.memory import Memory
from mulligan.methods import build_schedule
from mulligan.models.loading import LoadedModel, context_length, load_model
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.schedule import Schedule
from mulligan.seeds import seed_of
from mulligan.tasks import build_task
from mulligan.tasks.base import Task
from mulligan.texts import Texts
from mulligan.types import Problem


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


def seed_everything(seed: int) -> None:
    """Seeds the global generators. Mulligan draws from none of them; a user's task or method may."""
    torch.manual_seed(seed_of(seed, "torch"))
    random.seed(seed_of(seed, "python"))
    np.random.seed(seed_of(seed, "numpy") % 2**32)  # noqa: NPY002


def longest_prompt(task: Task, texts: Texts, limits: Mapping[str, int | None]) -> tuple[int, Problem]:
    """The number of tokens of the longest prompt, and its problem.

    Args:
        limits: how many problems of each split are ever read; None: all. Of a split without an end 8 are looked
            at. Only the longest texts are tokenised, since a data set may be large.
    """
    problems = []
    for split, limit in limits.items():
        size = task.size(split)
        end = 8 if size is None else size if limit is None else min(size, limit)
        problems += [task.problem(split, index) for index in range(end)]
    problems.sort(key=lambda problem: len(task.prompt(problem)), reverse=True)
    return max(((len(texts.prompt(p)), p) for p in problems[:32]), key=lambda found: found[0])


def _teacher(name: str, path: str, policy: LoadedModel, settings: ModelSection) -> PreTrainedModel:
    """A frozen model that a method brings, on the policy's device.

    Raises:
        UserError: it reads other tokens than the policy.
    """
    found = load_model(path, dtype=settings.dtype, device=settings.device, trust_remote_code=settings.trust_remote_code)
    if found.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(f"{name} ({path}) has another vocabulary than {policy.name}: its log-probs would be of others")
    return found.model.eval().requires_grad_(False)


def prepare(run: Run) -> Session:
    """Builds and checks everything a run needs.

    Raises:
        UserError: the first thing that cannot work, in one line.
    """
    built = build_schedule(run.method.name, run.method.settings, flatten(run.model_dump(exclude_unset=True)))
    run, schedule = with_defaults(run, built.run), built.schedule
    task = build_task(run.task.name, run.task.settings)
    resolved = resolve(run, built.settings, task.settings.model_dump(mode="json"))
    seed_everything(run.seed)
    loaded = load_model(
        run.model.name, dtype=run.model.dtype, device=run.model.device, trust_remote_code=run.model.trust_remote_code
    )
    model = loaded.model.eval()
    texts = Texts(task, loaded.tokenizer)
    for split in ("train", run.eval.split):
        if task.size(split) == 0:
            raise UserError(f"task '{task.name}' has no problems in its {split} split")
    room = context_length(model)
    longest, problem = longest_prompt(task, texts, {"train": None, run.eval.split: run.eval.problems})
    if longest + 1 > room:
        raise UserError(
            f"the prompt of {problem.uid} ({' '.join(task.prompt(problem)[:40].split())!r}...) has {longest} tokens; "
            f"the model's context holds {room}"
        )
    if run.diagnose.alignment:
        texts.nothing()  # P(y) needs a BOS; better now than at the first cosine
    notes = check_schedule(
        schedule,
        task,
        texts,
        [task.problem("train", index) for index in range(2)],
        max_new_tokens=run.sampling.max_new_tokens,
        loops=number_of_loops(model),
    )
    s, o = run.sampling, run.optimizer
    frozen = {
        name: copy.deepcopy(model).requires_grad_(False) if path is None else _teacher(name, path, loaded, run.model)
        for name, path in frozen_models(schedule.methods).items()
    }
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
        frozen=frozen,
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
