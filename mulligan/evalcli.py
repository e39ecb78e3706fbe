"""``mulligan eval``: which model, which task, which measurement."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from mulligan import probes
from mulligan.config import load_run
from mulligan.errors import UserError, nearest
from mulligan.evaluate import evaluate
from mulligan.learner.scoring import is_looped, number_of_loops
from mulligan.models.loading import LoadedModel, load_model
from mulligan.rundir import is_run, load_run_model
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.tasks import build_task
from mulligan.texts import Texts

PROBES = ("localisation", "hint", "alone")
# What an entry of a grid tells; null where the task cannot say.
ENTRY = ("pass@1", "pass@1_low", "pass@1_high", "process_correct", "length", "truncated")


def run_evaluation(
    model: str,
    overrides: Sequence[str],
    *,
    task: str | None,
    split: str,
    problems: int,
    samples: int,
    temperature: float,
    max_new_tokens: str,
    seed: int,
    loops: str | None,
    probe: str | None,
    relative_to: str | None = None,
    console: Console,
) -> dict[str, Any]:
    """Everything that ``mulligan eval`` measures, with the settings it was measured under.

    Args:
        max_new_tokens: a number, or several: ``"64,128"``.
        loops: the same for a looped model, or ``"all"`` from 1 to its own number; None is its own number.
        relative_to: another model, evaluated on the same problems with the same settings.

    Returns:
        The numbers; with several loops or token limits a ``grid`` of them, one entry for each pair.
    """
    if split not in ("dev", "test"):
        raise UserError(f"--split: '{split}' is no held-out split (known: dev, test)")
    if probe is not None and probe not in PROBES:
        raise UserError(f"--probe: '{probe}' is unknown{nearest(probe, PROBES)}")
    if probe is not None and relative_to is not None:
        raise UserError("--relative-to: compares accuracy, and --probe measures something else; leave one out")
    limits = _counts("--max-new-tokens", max_new_tokens)
    wanted = None if loops in (None, "all") else _counts("--loops", loops, or_else=", or 'all'")
    foreign = [o for o in overrides if not o.startswith("task.")]
    if foreign:
        raise UserError(f"'{foreign[0]}': eval takes task.key=value alone")
    given = load_run(None, overrides).task
    if "name" in given.model_fields_set:
        if task not in (None, given.name):
            raise UserError(f"--task {task} and task.name={given.name} are two tasks")
        task = given.name
    loaded, settings = _load(model)
    if task not in (None, settings.get("name")):
        settings = {}
    name = task or settings.get("name", "chain")
    chosen = build_task(name, {**{k: v for k, v in settings.items() if k != "name"}, **given.settings})
    if loops is not None and not is_looped(loaded.model):
        raise UserError(f"--loops: {model} has no loops")
    if loops == "all":
        wanted = list(range(1, number_of_loops(loaded.model) + 1))
    cells = list(product(wanted or [None], limits))
    if probe is not None and len(cells) > 1:
        raise UserError(f"--probe {probe}: needs a single --loops and a single --max-new-tokens")
    base = None if relative_to is None else _load_base(relative_to, loops)

    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        line = bar.add_task("", total=problems)

        def measure(which: LoadedModel, cell: tuple[int | None, int], what: str) -> Any:
            bar.reset(line, description=what if len(cells) == 1 else f"{what}, {_described(cell)}")
            sampler = EmbeddedSampler(
                which.model.eval(),
                which.tokenizer,
                temperature=temperature,
                max_new_tokens=cell[1],
                max_rows=512,
                num_loops=cell[0],
            )
            return (evaluate if probe is None else getattr(probes, probe))(
                chosen,
                Texts(chosen, which.tokenizer),
                sampler,
                split=split,
                problems=problems,
                samples=samples,
                seed=seed,
                progress=lambda done, total: bar.update(line, completed=done, total=total),
            )

        found: list[dict[str, Any]] = []
        for cell in cells:
            own = measure(loaded, cell, probe or "evaluating")
            numbers = own if probe is not None else own.numbers()
            if base is not None:
                numbers |= own.relative_to(measure(base, cell, "evaluating the other model"))
            found.append(numbers)
    if len(cells) == 1:
        report = found[0]
    else:
        report = {"grid": [_entry(cell, numbers) for cell, numbers in zip(cells, found, strict=True)]}
    return {
        **report,
        "settings": {
            "model": model,
            "task": {"name": name, **chosen.settings.model_dump(mode="json")},
            "split": split,
            "problems": problems,
            "samples": samples,
            "temperature": temperature,
            "max_new_tokens": limits[0] if len(limits) == 1 else limits,
            "seed": seed,
            "loops": wanted[0] if wanted and len(wanted) == 1 else wanted,
            "probe": probe,
            **({"relative_to": relative_to} if relative_to is not None else {}),
        },
    }


def _counts(option: str, text: str, or_else: str = "") -> list[int]:
    """``"1,2,4"`` as numbers; a number that comes twice is taken for a slip of the pen."""
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"0*[1-9][0-9]{0,8}", word) for word in words):
        raise UserError(f"{option}: '{text}' must be a number from 1, or several such as 1,2,4{or_else}")
    numbers = [int(word) for word in words]
    twice = sorted(n for n in set(numbers) if numbers.count(n) > 1)
    if twice:
        raise UserError(f"{option}: {twice[0]} is named twice")
    return numbers


def _load(model: str) -> tuple[LoadedModel, dict[str, Any]]:
    """A model, and the task's settings where it is a run's."""
    if not is_run(Path(model)):
        return load_model(model), {}
    loaded, run = load_run_model(Path(model))
    return loaded, dict(run["task"])


def _load_base(name: str, loops: str | None) -> LoadedModel:
    try:
        base, _ = _load(name)
    except UserError as error:
        raise UserError(f"--relative-to: {error}") from None
    if loops is not None and not is_looped(base.model):
        raise UserError(f"--relative-to: {name} has no loops, so --loops cannot hold for both models")
    return base


def _described(cell: tuple[int | None, int]) -> str:
    return f"{cell[1]} tokens" if cell[0] is None else f"loops {cell[0]}, {cell[1]} tokens"


def _entry(cell: tuple[int | None, int], numbers: dict[str, Any]) -> dict[str, Any]:
    compared = [key for key in numbers if key.startswith("pass@1_difference") or key.endswith("_ratio")]
    place = {"loops": cell[0], "max_new_tokens": cell[1]}
    return place | {key: numbers.get(key) for key in (*ENTRY, *compared)}
