"""A run made ready: everything built and checked, nothing trained yet. ``--dry-run`` ends here."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from mulligan.config import Run, flatten, resolve, with_defaults
from mulligan.contract import check_schedule
from mulligan.errors import UserError
from mulligan.learner.optimizer import build_optimizer, learning_rate, optimizer_settings
from mulligan.learner.scoring import is_looped, number_of_loops
from mulligan.learner.update import Learner, Plan
from mulligan.memory import Memory
from mulligan.methods import build_schedule
from mulligan.models.chat import open_chat
from mulligan.models.loading import LoadedModel, context_length
from mulligan.policy import autocast_of, choose_precision, frozen_of, load_policy, micro_batch_tokens
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.sampling.precision import PAYS, RoundedSampler, speedup
from mulligan.schedule import Schedule
from mulligan.seeds import seed_of
from mulligan.tasks import build_task
from mulligan.tasks.base import Task
from mulligan.texts import Texts
from mulligan.types import Metrics, Problem


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
    precision: list[str] = field(default_factory=list)  # what was measured of it, a line
    step: int = 0  # steps done
    evaluated: int = -1  # the last step that was evaluated


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
    prompts: list[tuple[str, Problem]] = []
    for split, limit in limits.items():
        for part in task.parts():
            size = part.size(split)
            end = 8 if size is None else size if limit is None else min(size, limit)
            prompts += [(part.prompt(p), p) for p in (part.problem(split, index) for index in range(end))]
    prompts.sort(key=lambda found: len(found[0]), reverse=True)
    return max(((len(texts.context(text)), p) for text, p in prompts[:32]), key=lambda found: found[0])


def prepare(run: Run) -> Session:
    """Builds and checks everything a run needs.

    Raises:
        UserError: the first thing that cannot work, in one line.
    """
    built = build_schedule(run.method.name, run.method.settings, flatten(run.model_dump(exclude_unset=True)))
    run, schedule = with_defaults(run, built.run), built.schedule
    task = build_task(run.task.name, run.task.settings)
    numbers = optimizer_settings(run.optimizer)
    run = choose_precision(run)
    seed_everything(run.seed)
    loaded = load_policy(run)
    model, chat = loaded.model, open_chat(loaded, run.model)
    tokens = micro_batch_tokens(run, model.device)
    run = run.model_copy(update={"optimizer": run.optimizer.model_copy(update={"tokens_per_micro_batch": tokens})})
    run = run.model_copy(update={"model": run.model.model_copy(update={"chat": "on" if chat else "off"})})
    resolved = resolve(run, built.settings, task.settings.model_dump(mode="json"))
    resolved["optimizer"] |= json.loads(json.dumps(numbers))
    texts = Texts(task, loaded.tokenizer, chat)
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
    learner = Learner(
        model,
        loaded.tokenizer,
        build_optimizer(o, model.parameters()),
        Plan(
            temperature=s.temperature,
            max_new_tokens=s.max_new_tokens,
            updates_per_batch=o.updates_per_batch,
            epochs=o.epochs,
            tokens_per_micro_batch=tokens,
            share_prefixes=o.share_prefixes,
            autocast=autocast_of(run.model),
            clip_norm=o.clip_norm,
            seed=run.seed,
        ),
        rate=learning_rate(o, run.steps),
        frozen=frozen_of(schedule.methods, loaded, run.model),
    )

    rounded = s.dtype == "bfloat16" and run.model.dtype == "float32"
    kind = RoundedSampler if rounded else EmbeddedSampler
    return Session(
        run=run,
        resolved=resolved,
        task=task,
        schedule=schedule,
        loaded=loaded,
        texts=texts,
        sampler=kind(model, loaded.tokenizer, **_sampler_settings(run, model, s.max_rows)),
        # Always of the weights themselves: what is evaluated is what is saved and exported.
        eval_sampler=EmbeddedSampler(model, loaded.tokenizer, **_sampler_settings(run, model, run.eval.max_rows)),
        learner=learner,
        memory=Memory(),
        notes=notes,
    )


def _sampler_settings(run: Run, model: PreTrainedModel, rows: int) -> dict[str, Any]:
    return {
        "temperature": run.sampling.temperature,
        "max_new_tokens": run.sampling.max_new_tokens,
        "stop": tuple(run.sampling.stop),
        "max_rows": rows,
        # The learner scores one loop for all tokens, so the policy that samples reads out that loop too, whatever
        # threshold the config has.
        "exit_threshold": 1.0 if is_looped(model) else None,
        "kernels": run.model.kernels,
    }


def settle_dtype(session: Session, found: str | None = None) -> Metrics:
    """Puts what is faster here in the place of ``sampling.dtype="measured"``; does nothing for another dtype.

    Args:
        found: what the run chose when it began, if it is resumed: nothing is measured again, so that it goes on as it
            was, whatever the machine does meanwhile.

    Returns:
        What was measured, for the log.
    """
    run, loaded = session.run, session.loaded
    if run.sampling.dtype != "measured":
        return {}
    measured: Metrics = {}
    settings = _sampler_settings(run, loaded.model, run.sampling.max_rows)
    if found is None:
        size = session.task.size("train")
        some = range(run.sampling.prompts if size is None else min(size, run.sampling.prompts))
        problems = [session.task.problem("train", index) for index in some]
        prompts = [(p, session.texts.prompt(p)) for p in problems]
        ratio = speedup(loaded.model, loaded.tokenizer, prompts, settings)
        found = "bfloat16" if ratio >= PAYS else "float32"
        measured = {"time/bfloat16_sampling_speedup": ratio}
        told = f"sampling.dtype={found!r}: bfloat16 samples {ratio:.2f} times as fast ({PAYS:g} pays)"
        session.precision.append(told)
    session.run = run.model_copy(update={"sampling": run.sampling.model_copy(update={"dtype": found})})
    session.resolved["sampling"]["dtype"] = found
    if found == "bfloat16":
        session.sampler = RoundedSampler(loaded.model, loaded.tokenizer, **settings)
    return measured
