"""``mulligan eval``: which model, which task, which measurement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mulligan import probes
from mulligan.config import load_run
from mulligan.errors import UserError, nearest
from mulligan.evaluate import evaluate
from mulligan.learner.scoring import is_looped
from mulligan.models.loading import load_model
from mulligan.rundir import is_run, load_run_model
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.tasks import build_task
from mulligan.texts import Texts

PROBES = ("localisation", "hint", "alone")


def run_evaluation(
    model: str,
    overrides: Sequence[str],
    *,
    task: str | None,
    split: str,
    problems: int,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    loops: int | None,
    probe: str | None,
    console: Console,
) -> dict[str, Any]:
    """Everything that ``mulligan eval`` measures, with the settings it was measured under."""
    if split not in ("dev", "test"):
        raise UserError(f"--split: '{split}' is no held-out split (known: dev, test)")
    if probe is not None and probe not in PROBES:
        raise UserError(f"--probe: '{probe}' is unknown{nearest(probe, PROBES)}")
    foreign = [o for o in overrides if not o.startswith("task.")]
    if foreign:
        raise UserError(f"'{foreign[0]}': eval takes task.key=value alone")
    given = load_run(None, overrides).task
    if "name" in given.model_fields_set:
        if task not in (None, given.name):
            raise UserError(f"--task {task} and task.name={given.name} are two tasks")
        task = given.name
    settings: dict[str, Any] = {}
    if is_run(Path(model)):
        loaded, run = load_run_model(Path(model))
        if task is None or task == run["task"]["name"]:
            settings = dict(run["task"])
    else:
        loaded = load_model(model)
    name = task or settings.pop("name", "chain")
    settings.pop("name", None)
    chosen = build_task(name, {**settings, **given.settings})
    if loops is not None and not is_looped(loaded.model):
        raise UserError(f"--loops: {model} has no loops")
    texts = Texts(chosen, loaded.tokenizer)
    sampler = EmbeddedSampler(
        loaded.model.eval(),
        loaded.tokenizer,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        max_rows=512,
        num_loops=loops,
    )
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task(probe or "evaluating", total=problems)

        def progress(done: int, total: int) -> None:
            bar.update(line, completed=done, total=total)

        shared: dict[str, Any] = {
            "split": split,
            "problems": problems,
            "samples": samples,
            "seed": seed,
            "progress": progress,
        }
        if probe is None:
            numbers: dict[str, Any] = evaluate(chosen, texts, sampler, **shared).numbers()
        else:
            numbers = getattr(probes, probe)(chosen, texts, sampler, **shared)
    return {
        **numbers,
        "settings": {
            "model": model,
            "task": {"name": name, **chosen.settings.model_dump(mode="json")},
            "split": split,
            "problems": problems,
            "samples": samples,
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "loops": loops,
            "probe": probe,
        },
    }
