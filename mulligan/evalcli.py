"""``mulligan eval``: which model, which tasks, which measurement."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

import mulligan
from mulligan import probes
from mulligan.checkpoint import list_checkpoints
from mulligan.config import ModelSection, read_toml, validate
from mulligan.errors import UserError, nearest
from mulligan.evalrun import EvaluationRun, check_directory
from mulligan.evalsuite import Cell, Measure, Part, parts_of_line, parts_of_suite
from mulligan.evaluate import Columns, Evaluation, evaluate, macro_average, split_size
from mulligan.learner.scoring import is_looped, number_of_loops
from mulligan.models.chat import Chat, open_chat
from mulligan.models.loading import LoadedModel, choose_device, context_length, load_model
from mulligan.rundir import CHECKPOINTS, RUN, is_run, load_run_model
from mulligan.sampling.embedded import EmbeddedSampler
from mulligan.session import longest_prompt
from mulligan.tasks import build_task
from mulligan.tasks.base import Task
from mulligan.tasks.overlap import shared
from mulligan.texts import Texts

PROBES = ("localisation", "hint", "alone")
UNSCORABLE = 0.01  # share of the samples above which the report says so


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is evaluated."""

    name: str
    loaded: LoadedModel
    chat: Chat | None
    section: ModelSection
    run: dict[str, Any] | None  # the settings of a run
    step: int | None  # of a run: the steps that its newest checkpoint has seen


@dataclass(frozen=True, slots=True)
class Job:
    """One part, ready to be measured."""

    part: Part
    task: Task
    texts: Texts
    base_texts: Texts | None  # of the model that is compared with
    problems: int  # that there are, and are asked for
    overlap: int | None  # of them with a question that the run was trained on; None where that cannot be


def run_evaluation(
    model: str,
    arguments: Sequence[str] = (),
    *,
    tasks: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    model_flags: Mapping[str, Any] | None = None,
    max_rows: int = 512,
    probe: str | None = None,
    relative_to: str | None = None,
    directory: Path | None = None,
    resume: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Everything that ``mulligan eval`` measures, with the settings it was measured under.

    Args:
        arguments: a suite's file, if one is named first, and settings of tasks, ``task.key=value``.
        tasks: ``NAME`` or ``LABEL=NAME`` each.
        flags: settings of :class:`mulligan.evalsuite.Measure` that hold for all parts.
        model_flags: settings of :class:`mulligan.config.ModelSection`, over those of a run.
        max_rows: samples that decode at a time.
        probe: what to measure in place of accuracy.
        relative_to: another model, evaluated on the same problems with the same settings.
        directory: where to keep every sample and the report; None keeps nothing.
        resume: go on with what is in ``directory``.

    Returns:
        The numbers; with several tasks, loops, thresholds or token limits a ``grid`` of them, one entry each, and with
        several tasks their ``average``. ``notes`` are lines for the reader; ``settings`` is all that the numbers
        depend on.
    """
    flags = dict(flags or {})
    _check_options(flags, probe, relative_to, directory, resume, len(tasks))
    if directory is not None:
        check_directory(directory, resume=resume)  # before a model is loaded
    suite = Path(arguments[0]) if arguments and "=" not in arguments[0] else None
    if suite is not None and suite.suffix != ".toml":
        raise UserError(f"'{suite}' is neither a suite's .toml file nor task.key=value")
    if suite is not None:
        if tasks:
            raise UserError(f"--task: the tasks are those of {suite}; leave one out")
        parts = parts_of_suite(suite, flags, arguments[1:])
    else:
        run = read_toml(Path(model) / RUN) if is_run(Path(model)) else {}
        parts = parts_of_line(tasks, flags, arguments, run)
    if probe is not None and len(parts) > 1:
        raise UserError(f"--probe {probe}: needs a single task")
    built = [_build(part, len(parts) > 1) for part in parts]
    sizes = [split_size(task, part.how.split, part.how.problems) for part, task in zip(parts, built, strict=True)]
    subject = _load(model, dict(model_flags or {}))
    parts = [_with_cells(part, subject, suite) for part in parts]
    if probe is not None and len(parts[0].cells) > 1:
        raise UserError(f"--probe {probe}: needs a single --loops, --exit-threshold and --max-new-tokens")
    base = None if relative_to is None else _load_base(relative_to, subject, parts)
    overlap = _Overlap(subject.run)
    jobs = [
        Job(
            part,
            task,
            Texts(task, subject.loaded.tokenizer, subject.chat),
            None if base is None else Texts(task, base.loaded.tokenizer, base.chat),
            problems,
            overlap.count(task, part.how.split, problems),
        )
        for part, task, problems in zip(parts, built, sizes, strict=True)
    ]
    notes = [*overlap.notes, *(note for job in jobs for note in _notes(job, subject))]
    settings = _settings(subject, base, jobs, max_rows, probe)
    with (
        Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
        nullcontext() if directory is None else EvaluationRun(directory, settings, resume=resume) as kept,
    ):
        measure = _Measurement(subject, base, max_rows, bar, kept)
        if probe is not None:
            report = measure.probe(jobs[0], probe)
        else:
            report = _report([(job, *measure.accuracy(job, cell)) for job in jobs for cell in job.part.cells], notes)
        report = {**report, "notes": notes, "settings": settings}
        if kept is not None:
            kept.report(report)
    return report


# --- measuring ------------------------------------------------------------------------------------------


class _Measurement:
    """One model's parts, one after the other."""

    def __init__(
        self, subject: Subject, base: Subject | None, max_rows: int, bar: Progress, kept: EvaluationRun | None
    ) -> None:
        self.subject, self.base, self.max_rows, self.bar, self.kept = subject, base, max_rows, bar, kept
        self.line = bar.add_task("", total=None)

    def _sampler(self, subject: Subject, job: Job, cell: Cell) -> EmbeddedSampler:
        model = subject.loaded.model.eval()
        return EmbeddedSampler(
            model,
            subject.loaded.tokenizer,
            temperature=job.part.how.temperature,
            max_new_tokens=cell.max_new_tokens,
            stop=job.part.how.stop,
            max_rows=self.max_rows,
            kernels=subject.section.kernels,
            num_loops=cell.loops,
            # Leaving early is asked for; the model's config does not decide it, neither here nor in training.
            exit_threshold=1.0 if cell.exit_threshold is None and is_looped(model) else cell.exit_threshold,
        )

    def _progress(self, job: Job, cell: Cell, what: str) -> Callable[[int, int], None]:
        several = _described(cell) if len(job.part.cells) > 1 else ""
        description = ", ".join(word for word in (what, several) if word)
        self.bar.reset(self.line, description=description, total=job.problems)
        return lambda done, total: self.bar.update(self.line, completed=done, total=total)

    def probe(self, job: Job, name: str) -> dict[str, Any]:
        how, (cell,) = job.part.how, job.part.cells
        return getattr(probes, name)(
            job.task,
            job.texts,
            self._sampler(self.subject, job, cell),
            split=how.split,
            problems=how.problems,
            samples=how.samples,
            seed=how.seed,
            progress=self._progress(job, cell, name),
        )

    def accuracy(self, job: Job, cell: Cell) -> tuple[Cell, dict[str, Any], Columns]:
        """The numbers of one row, and what they are means of."""
        own, exit_loop = self._evaluate(job, cell, self.subject, job.texts, "model")
        columns = own.columns(job.task.equivalent)
        numbers: dict[str, Any] = dict(own.numbers(job.task.equivalent, columns))
        if exit_loop is not None:
            numbers["exit_loop"] = exit_loop
        if job.overlap is not None:
            numbers["overlap"] = job.overlap
        if self.base is not None and job.base_texts is not None:
            other, _ = self._evaluate(job, cell, self.base, job.base_texts, "relative_to")
            numbers |= own.relative_to(other)
            columns["pass@1_difference"] = own.gains(other)
        return cell, numbers, columns

    def _evaluate(
        self, job: Job, cell: Cell, subject: Subject, texts: Texts, side: str
    ) -> tuple[Evaluation, float | None]:
        """One model on one row, and the mean loop that its tokens were read out of, where they exit early."""
        how, kept = job.part.how, self.kept
        sampler = self._sampler(subject, job, cell)
        place = {"task": job.part.label, "side": side, **asdict(cell)}
        told: dict[str, float] = {"exit_loops": 0, "decode_tokens": 0}

        def keep(groups: list[Any]) -> None:
            if kept is not None:
                kept.append(place, groups, **{key: sampler.stats[key] - told[key] for key in told})
                told.update({key: sampler.stats[key] for key in told})

        progress = self._progress(
            job, cell, job.part.label if side == "model" else f"{job.part.label}, the other model"
        )
        before = [] if kept is None else kept.done(place, job.task, how.split)
        progress(len(before), job.problems)
        found = evaluate(
            job.task,
            texts,
            sampler,
            samples=how.samples,
            before=before,
            keep=keep,
            split=how.split,
            problems=how.problems,
            seed=how.seed,
            progress=progress,
        )
        exits, tokens = (sampler.stats[key] if kept is None else kept.counted(place, key) for key in told)
        return found, exits / tokens if exits else None


def _report(rows: Sequence[tuple[Job, Cell, dict[str, Any], Columns]], notes: list[str]) -> dict[str, Any]:
    """One evaluation's numbers flat, several as a grid; adds to the notes."""
    several = len({job.part.label for job, *_ in rows}) > 1
    for job, cell, numbers, _ in rows:
        share = numbers["unscorable"] / (job.problems * job.part.how.samples)
        if share > UNSCORABLE:
            where = f"{job.part.label}, {_described(cell)}: " if len(rows) > 1 else ""
            notes.append(f"{where}{share:.1%} of the responses could not be scored, and are left out of all numbers")
    if len(rows) == 1:
        return rows[0][2]
    out: dict[str, Any] = {
        "grid": [{"task": job.part.label, **asdict(cell), **numbers} for job, cell, numbers, _ in rows]
    }
    if several:
        out["average"] = _averages(rows)
    return out


def _averages(rows: Sequence[tuple[Job, Cell, dict[str, Any], Columns]]) -> list[dict[str, Any]]:
    """Over the tasks, for every place that all of them have; over all of them where each has a single one."""
    by_task: dict[str, dict[Cell, Columns]] = {}
    for job, cell, _, columns in rows:
        by_task.setdefault(job.part.label, {})[cell] = columns
    if all(len(cells) == 1 for cells in by_task.values()):
        places = {cell for cells in by_task.values() for cell in cells}
        same = {key: {asdict(cell)[key] for cell in places} for key in ("loops", "exit_threshold", "max_new_tokens")}
        place = {key: values.pop() if len(values) == 1 else None for key, values in same.items()}
        return [{"task": "average", **place, **macro_average([next(iter(c.values())) for c in by_task.values()])}]
    first, *others = by_task.values()
    shared = [cell for cell in first if all(cell in cells for cells in others)]
    return [
        {"task": "average", **asdict(cell), **macro_average([cells[cell] for cells in by_task.values()])}
        for cell in shared
    ]


def _described(cell: Cell) -> str:
    loops = "" if cell.loops is None else f"loops {cell.loops}, "
    threshold = "" if cell.exit_threshold is None else f"exit at {cell.exit_threshold}, "
    return f"{loops}{threshold}{cell.max_new_tokens} tokens"


# --- options --------------------------------------------------------------------------------------------


def numbers_of(option: str, text: str, or_else: str = "") -> list[int]:
    """``"1,2,4"`` as numbers.

    Raises:
        UserError: anything else, and a number that comes twice, which is taken for a slip of the pen.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"0*[1-9][0-9]{0,8}", word) for word in words):
        raise UserError(f"{option}: '{text}' must be a number from 1, or several such as 1,2,4{or_else}")
    return _once(option, [int(word) for word in words])


def thresholds_of(option: str, text: str) -> list[float]:
    """``"0.5,1"`` as numbers from 0 to 1; as :func:`numbers_of`."""
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{0,9}\.?[0-9]{1,9}", word) and float(word) <= 1 for word in words):
        raise UserError(f"{option}: '{text}' must be a number from 0 to 1, or several such as 0.5,0.9")
    return _once(option, [float(word) for word in words])


def switch_of(option: str, text: str) -> bool:
    """``"on"`` or ``"off"``.

    Raises:
        UserError: anything else.
    """
    if text not in ("on", "off"):
        raise UserError(f"{option}: '{text}' must be on or off")
    return text == "on"


def _once(option: str, numbers: list[Any]) -> list[Any]:
    twice = sorted(n for n in set(numbers) if numbers.count(n) > 1)
    if twice:
        raise UserError(f"{option}: {twice[0]} is named twice")
    return numbers


def _check_options(
    flags: Mapping[str, Any],
    probe: str | None,
    relative_to: str | None,
    directory: Path | None,
    resume: bool,
    tasks: int,
) -> None:
    split = flags.get("split", "test")
    if split not in ("dev", "test"):
        raise UserError(f"--split: '{split}' is no held-out split (known: dev, test)")
    if resume and directory is None:
        raise UserError("--resume: goes on with the evaluation in --out DIR; name it")
    if probe is None:
        return
    if probe not in PROBES:
        raise UserError(f"--probe: '{probe}' is unknown{nearest(probe, PROBES)}")
    if relative_to is not None:
        raise UserError("--relative-to: compares accuracy, and --probe measures something else; leave one out")
    if directory is not None:
        raise UserError("--out: keeps what accuracy is drawn from, and --probe measures something else; leave one out")
    if tasks > 1:
        raise UserError(f"--probe {probe}: needs a single task")
    for key, option in (
        ("loops", "--loops"),
        ("exit_threshold", "--exit-threshold"),
        ("max_new_tokens", "--max-new-tokens"),
    ):
        if isinstance(flags.get(key), list) and len(flags[key]) > 1:
            raise UserError(f"--probe {probe}: needs a single {option}")


# --- models and tasks -----------------------------------------------------------------------------------


class _Overlap:
    """Counts evaluation problems that a run was trained on.

    Attributes:
        notes: why they cannot be counted.
    """

    def __init__(self, run: Mapping[str, Any] | None) -> None:
        self.notes: list[str] = []
        self._trained: Task | None = None
        if run is not None:
            settings = dict(run["task"])
            try:
                self._trained = build_task(settings.pop("name"), settings)
            except UserError as error:  # its data may lie on another machine
                self.notes.append(f"whether the run was trained on these problems is not known: {error}")

    def count(self, task: Task, split: str, problems: int) -> int | None:
        """None where nothing was trained, and for the task that was: its splits are disjoint."""
        own = self._trained
        if own is None or (own.name, own.settings) == (task.name, task.settings):
            return None
        return shared(own, task, split, problems)


def _build(part: Part, several: bool) -> Task:
    return build_task(part.task, part.settings, key=part.label if several else "task")


def _load(model: str, flags: Mapping[str, Any]) -> Subject:
    """A model with its chat; a run's with the run's own settings, but for the flags."""
    step = None
    if is_run(Path(model)):
        loaded, run = load_run_model(Path(model))
        for key in ("dtype", "trust_remote_code"):
            if key in flags:
                raise UserError(f"--{key.replace('_', '-')}: {model} is a run, which has this setting of its own")
        section = validate({"model": {**run.get("model", {}), **flags}}).model
        cast(Any, loaded.model).to(choose_device(section.device))
        step = list_checkpoints(Path(model) / CHECKPOINTS)[-1][0]
    else:
        run, section = None, validate({"model": {"name": model, **flags}}).model
        dtype = "float32" if section.dtype == "auto" else section.dtype
        loaded = load_model(model, dtype=dtype, device=section.device, trust_remote_code=section.trust_remote_code)
    return Subject(model, loaded, open_chat(loaded, section), section, run, step)


def _load_base(name: str, subject: Subject, parts: Sequence[Part]) -> Subject:
    """The model to compare with, asked as the other one is."""
    same = {key: getattr(subject.section, key) for key in ("chat", "thinking", "system", "kernels")}
    try:
        base = _load(name, same)
    except UserError as error:
        raise UserError(f"--relative-to: {error}") from None
    for key, option in (("loops", "--loops"), ("exit_threshold", "--exit-threshold")):
        if any(getattr(part.how, key) is not None for part in parts) and not is_looped(base.loaded.model):
            raise UserError(f"--relative-to: {name} has no loops, so {option} cannot hold for both models")
    return base


def _with_cells(part: Part, subject: Subject, suite: Path | None) -> Part:
    for key, option in (("loops", "--loops"), ("exit_threshold", "--exit-threshold")):
        if getattr(part.how, key) is not None and not is_looped(subject.loaded.model):
            where = option if suite is None else f"{suite}: {part.label}: {key}"
            raise UserError(f"{where}: {subject.name} has no loops")
    return part.with_cells(number_of_loops(subject.loaded.model))


def _notes(job: Job, subject: Subject) -> list[str]:
    """What the reader should know of one part's data; stops where a prompt does not fit."""
    how, label = job.part.how, job.part.label
    room = context_length(subject.loaded.model)
    for texts in (job.texts, job.base_texts):
        if texts is not None:
            longest, problem = longest_prompt(job.task, texts, {how.split: how.problems})
            if longest >= room:
                raise UserError(
                    f"{label}: the {longest} tokens of the prompt of {problem.uid} leave no room for a response: "
                    f"the model's context holds {room}"
                )
    notes = [f"{label}: {note}" for note in job.task.notes()]
    if job.overlap:
        notes.append(f"{label}: {job.overlap} of its {job.problems} problems stand in what the run was trained on")
    if job.problems < how.problems and "problems" in how.model_fields_set:
        notes.append(f"{label}: its {how.split} split has {job.problems} problems, not {how.problems}")
    return notes


# --- settings -------------------------------------------------------------------------------------------


def _settings(
    subject: Subject, base: Subject | None, jobs: Sequence[Job], max_rows: int, probe: str | None
) -> dict[str, Any]:
    """All that the numbers depend on."""
    parts = {job.part.label: _part_settings(job) for job in jobs}
    out = {
        **_model_settings(subject),
        **(next(iter(parts.values())) if len(parts) == 1 else {"evaluate": parts}),
        "max_rows": max_rows,
        "probe": probe,
    }
    if base is not None:
        told = _model_settings(base)
        out["relative_to"] = told.pop("model")
        out["relative_to_weights"] = told["weights"]
    out["versions"] = {
        "mulligan": mulligan.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return out


def _part_settings(job: Job) -> dict[str, Any]:
    how: Measure = job.part.how
    loops = sorted({c.loops for c in job.part.cells if c.loops is not None})
    return {
        "task": {"name": job.part.task, **job.task.settings.model_dump(mode="json")},
        "split": how.split,
        "problems": job.problems,
        "samples": how.samples,
        "temperature": how.temperature,
        "max_new_tokens": _one(how.max_new_tokens),
        "stop": list(how.stop),
        "seed": how.seed,
        "loops": _one(loops),
        "exit_threshold": _one(how.exit_threshold),
    }


def _one(values: Sequence[Any] | None) -> Any:
    return None if not values else values[0] if len(values) == 1 else list(values)


def _model_settings(subject: Subject) -> dict[str, Any]:
    model = subject.loaded.model
    return {
        "model": subject.name,
        **({} if subject.step is None else {"step": subject.step}),
        "weights": weights_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "kernels": subject.section.kernels,
        "chat": subject.chat is not None,
        "thinking": subject.section.thinking,
        "system": subject.section.system,
    }


def weights_digest(model: torch.nn.Module) -> str:
    """A hash of all weights as they are in memory, with their names and types."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"sha256:{hasher.hexdigest()[:16]}"
