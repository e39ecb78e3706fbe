"""The logged rollouts of a step under another method's credit, without training.

What differs between two methods on the *same* samples is credit alone: which tokens are trained, with what advantages,
and what gradient that gives. The forest is rebuilt from ``samples.jsonl``, the weights are those of a checkpoint, and
rows, streams and gradients come from the same code as in training. No weight changes.

Signal to noise, over the n problems of the step: with g_i problem i's part of the batch gradient and g their mean,

    SNR = |g|^2 / (tr Cov(g_i) / n),    tr Cov = (sum_i |g_i|^2 - n |g|^2) / (n - 1).

Its denominator estimates E|g - E g|^2, so noise alone gives about 1, and it does not change when a loss is scaled.
Problems without any advantage count, with g_i = 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch

from mulligan.assign import assign
from mulligan.checkpoint import list_checkpoints, read_checkpoint
from mulligan.config import Run, flatten, load_run, read_toml, validate
from mulligan.contract import check_schedule
from mulligan.errors import UserError
from mulligan.learner.scoring import number_of_loops
from mulligan.learner.update import Learner, Plan, frozen_models
from mulligan.log import METRICS, SAMPLES, read_metrics
from mulligan.method import Method
from mulligan.methods import build_schedule
from mulligan.models.adapters import has_adapter
from mulligan.models.chat import open_chat
from mulligan.models.loading import LoadedModel
from mulligan.policy import autocast_of, load_base, load_teacher, micro_batch_tokens
from mulligan.records import read_samples, rebuild
from mulligan.rehearsal import rehearse
from mulligan.rundir import CHECKPOINTS, RUN, checkpoint_model, is_run, sample_records
from mulligan.schedule import constant
from mulligan.tasks import build_task
from mulligan.tasks.base import Task
from mulligan.texts import Texts
from mulligan.types import Forest, Row, Sample

SHOWN = 80  # characters of a response in the report


# --- gradients ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class GradientSums:
    """Running sums over the parts g_1..g_n of a gradient: one buffer of its size, whatever n is."""

    total: list[torch.Tensor] = field(default_factory=list)  # sum of g_i, by parameter
    squares: float = 0.0  # sum of |g_i|^2
    n: int = 0

    def add(self, part: Sequence[torch.Tensor]) -> None:
        """One more g_i, by parameter; () is 0."""
        self.n += 1
        self.squares += _dot(part, part)
        if part and not self.total:
            self.total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in part]
        for mine, theirs in zip(self.total if part else (), part, strict=True):
            mine += theirs

    @property
    def norm(self) -> float:
        """|sum_i g_i|: the norm of the batch's gradient."""
        return _dot(self.total, self.total) ** 0.5

    @property
    def snr(self) -> float | None:
        """Signal to noise as the module's docstring has it; None for a single part, or parts that do not differ."""
        noise = self.squares - self.norm**2 / self.n if self.n else 0.0  # (n - 1) tr Cov
        return self.norm**2 / self.n * (self.n - 1) / noise if self.n > 1 and noise > 0 else None

    def cosine(self, other: GradientSums) -> float | None:
        """Between the two sums; None where one of them is 0."""
        size = self.norm * other.norm
        return _dot(self.total, other.total) / size if size else None


def _dot(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


def problem_gradients(
    learner: Learner, rows: Sequence[Row], method: Method, forest: Forest
) -> tuple[GradientSums, dict[str, float]]:
    """The gradient of the whole batch as one update, problem by problem.

    Args:
        learner: with a learning rate of 0 and neither clipping nor several updates a batch; its guard is replaced.

    Returns:
        The sums over problems; the loss, and the mean distance of the learner's log-probs from the sampler's.
    """
    # The denominators are those of the whole batch, so that the parts add up to its gradient.
    weights: dict[int, float] = {}
    for index, term in enumerate(method.terms):
        mine = [row for row in rows if row.term == index]
        given = term.aggregation(mine, learner.plan.max_new_tokens) if mine else []
        weights |= {id(row): weight for row, weight in zip(mine, given, strict=True)}

    def fixed(some: Sequence[Row], max_new_tokens: int) -> list[float]:
        return [weights[id(row)] for row in some]

    parts = method.replace(terms=tuple(replace(term, aggregation=fixed) for term in method.terms))
    sums, loss, gap, tokens = GradientSums(), 0.0, 0.0, 0.0

    def note() -> None:
        parameters = [p for p in learner.model.parameters() if p.requires_grad]
        sums.add([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])

    learner.guard = note
    by_problem: dict[str, list[Row]] = {tree.problem.uid: [] for tree in forest.trees}
    for row in rows:
        by_problem[row.sample.request.problem.uid].append(row)
    for mine in by_problem.values():
        if not mine:
            sums.add(())
            continue
        said = learner.update(mine, parts, forest.step)
        loss += said["update/loss"]
        gap += said.get("mismatch/mean", 0.0) * said["update/live_tokens"]
        tokens += said["update/live_tokens"]
    return sums, {"loss": loss, "mismatch": gap / tokens if tokens else 0.0}


# --- the whole ------------------------------------------------------------------------------------------


def replay(directory: Path, step: int, method: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Step ``step`` (from 1) of a run under its own method and under another; JSON-able.

    Several updates a batch are taken as one, from the state before the first.

    Args:
        method: as ``method.name``; of one that changes over time, what it is at this step.
        overrides: ``method.key=value``, the other method's settings; what is left out is the method's default, or as
            in the run where the method is the run's own.

    Returns:
        ``weights``, ``notes`` (lines for people), ``methods`` (``run`` and ``replay``: rows, gradient norm, SNR),
        ``cosine`` of the two gradients, and ``samples`` with the advantages under both.

    Raises:
        UserError: no run, no such step, a method that does not fit; in one line.
    """
    if not is_run(directory):
        raise UserError(f"{directory} is no run: {RUN} is missing")
    run = validate(read_toml(directory / RUN), str(directory / RUN))
    if not run.log.samples:
        raise UserError(f"{directory} has no samples to replay: it was run with log.samples=false")
    named = flatten(run.model_dump())  # the run's other settings stand, whatever a preset would bring
    try:
        own = build_schedule(run.method.name, run.method.settings, named)
    except UserError as error:
        raise UserError(f"{directory / RUN}: {error}") from error
    other = build_schedule(method, _settings(run, method, overrides), named)
    records, metrics = read_samples(directory, step), _logged_metrics(directory, step)
    task = build_task(run.task.name, run.task.settings)
    forest = rebuild(records, task)
    if len(forest.samples) != metrics.get("rollout/samples", len(forest.samples)):
        raise UserError(f"step {step}: {SAMPLES} and {METRICS} of {directory} disagree on how many samples it has")
    loaded, weights = _weights(directory, run, step)
    texts, most = Texts(task, loaded.tokenizer, open_chat(loaded, run.model)), run.sampling.max_new_tokens
    theirs = other.schedule.at(step - 1)
    check_schedule(
        constant(theirs),
        task,
        texts,
        [task.problem("train", index) for index in range(2)],
        max_new_tokens=most,
        loops=number_of_loops(loaded.model),
    )
    learner = _learner(loaded, run)
    sides = {
        "run": _Side(run.method.name, own.settings, own.schedule.at(step - 1), forest),
        "replay": _Side(method, other.settings, theirs, _narrowed(forest, theirs)),
    }
    for side in sides.values():
        learner.frozen = _frozen(side.method, loaded, run)
        side.rows = assign(side.method, side.forest, texts, learner.fill_streams, most)
        side.sums, side.measured = problem_gradients(learner, side.rows, side.method, side.forest)
    told = {who: side.told() for who, side in sides.items()}
    told["run"]["logged_gradient_norm"] = metrics.get("update/gradient_norm")
    told["run"]["off_log"] = _off_log(forest, sides["run"].rows, records)
    return {
        "run": str(directory),
        "step": step,
        "weights": weights,
        "notes": [
            *_notes_of_forest(sides["run"], sides["replay"], task, texts, most),
            *_notes_of_run(run, told["run"], metrics, exact=weights["away"] == 0),
        ],
        "methods": told,
        "cosine": sides["run"].sums.cosine(sides["replay"].sums),
        "samples": [_described(sample, sides) for sample in forest.samples],
    }


@dataclass(slots=True)
class _Side:
    """One of the two methods: what was asked for, and what came of it."""

    name: str  # as asked for; a schedule has one name and a method for each phase
    settings: dict[str, Any]
    method: Method
    forest: Forest
    rows: list[Row] = field(default_factory=list)
    sums: GradientSums = field(default_factory=GradientSums)
    measured: dict[str, float] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "phase": self.method.name,
            "settings": self.settings,
            "problems": len(self.forest.trees),
            "rows": len(self.rows),
            "trained_tokens": sum(int(row.mask.sum()) for row in self.rows),
            "gradient_norm": self.sums.norm,
            "snr": self.sums.snr,
            **self.measured,
        }


def _settings(run: Run, method: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The other method's settings: where it is the run's own, what is not given is as in the run."""
    foreign = [o for o in overrides if not o.startswith("method.")]
    if foreign:
        raise UserError(f"'{foreign[0]}': replay takes method.key=value alone")
    given = load_run(None, overrides).method
    if "name" in given.model_fields_set and given.name != method:
        raise UserError(f"--method {method} and method.name={given.name} are two methods")
    out = dict(given.settings)
    for key, value in run.method.settings.items() if method == run.method.name else ():
        if isinstance(value, dict) and isinstance(out.get(key, {}), dict):  # the table of one method of several
            out[key] = {k: v for k, v in value.items() if k not in given.settings} | out.get(key, {})
        else:
            out.setdefault(key, value)
    return out


def _logged_metrics(directory: Path, step: int) -> dict[str, Any]:
    """The step's line of training; {} where there is none."""
    found = [r for r in read_metrics(directory / METRICS) if r.get("step") == step and "update/gradient_norm" in r]
    return found[0] if found else {}


def _weights(directory: Path, run: Run, step: int) -> tuple[LoadedModel, dict[str, Any]]:
    """The weights nearest to those that sampled the step: the newest checkpoint of the steps before it; the base
    model for the first step; else the oldest checkpoint; else the base model."""
    wanted = step - 1
    saved = list_checkpoints(directory / CHECKPOINTS)
    before = [path for at, path in saved if at <= wanted]
    device, why = _device(run.model.device), ""
    if not before and (wanted == 0 or not saved):
        try:
            loaded = load_base(run.model, run.lora, seed=run.seed, device=device)
            return loaded, _told(f"the base model {run.model.name}", 0, step)
        except UserError as error:
            if not saved:
                raise
            why = f" (not the base model: {error})"
    found = read_checkpoint(before[-1] if before else saved[0][1])
    loaded = checkpoint_model(directory, found)
    cast(Any, loaded.model).to(device)
    return loaded, _told(f"{CHECKPOINTS}/{found.path.name}{why}", found.step, step)


def _told(name: str, at: int, step: int) -> dict[str, Any]:
    away = at - (step - 1)
    steps = f"{abs(away)} step{'s' if abs(away) > 1 else ''}"
    where = f"{steps} {'later' if away > 0 else 'earlier'} than those" if away else "those"
    return {"name": name, "step": at, "away": away, "line": f"weights: {name}, {where} that sampled step {step}"}


def _device(setting: str) -> str:
    """The run's device where this machine has it, else what "auto" gives."""
    if setting == "cpu":
        return setting
    if setting.startswith("cuda") and (torch.device(setting).index or 0) < torch.cuda.device_count():
        return setting
    return "cuda" if torch.cuda.is_available() else "cpu"


def _learner(loaded: LoadedModel, run: Run) -> Learner:
    """A learner whose updates change nothing: its rate is 0, and the batch is one update."""
    plan = Plan(
        temperature=run.sampling.temperature,
        max_new_tokens=run.sampling.max_new_tokens,
        tokens_per_micro_batch=micro_batch_tokens(run, loaded.model.device),
        share_prefixes=run.optimizer.share_prefixes,
        autocast=autocast_of(run.model),
        clip_norm=0.0,
        seed=run.seed,
    )
    still = torch.optim.SGD(loaded.model.parameters(), lr=0.0)
    return Learner(loaded.model, loaded.tokenizer, still, plan, rate=lambda _: 0.0)


def _frozen(method: Method, policy: LoadedModel, run: Run) -> dict[str, Any]:
    """The frozen models that a method reads; the reference is the base model, as in the run."""
    out = {}
    for name, path in frozen_models([method]).items():
        if path is None and has_adapter(policy.model):
            continue  # the learner switches the adapter off
        try:
            if path is not None:
                out[name] = load_teacher(name, path, policy, run.model)
            else:
                base = load_base(run.model, run.lora, device=_device(run.model.device))
                out[name] = base.model.requires_grad_(False)
        except UserError as error:
            raise UserError(f"{method.name} reads a frozen {name}: {error}") from error
    return out


def _narrowed(forest: Forest, method: Method) -> Forest:
    """The forest as another method's group filter leaves it."""
    keep = method.keep or (lambda tree: True)
    return Forest(forest.step, [t for t in forest.trees if keep(t)], [t for t in forest.trees if not keep(t)])


def _origins(method: Method, task: Task, texts: Texts, most: int) -> set[str]:
    """The origins that a method's passes draw in a rehearsal."""

    def fill(rows: Sequence[Row], streams: Sequence[Any], build: Any) -> None:
        for row in rows:
            row.streams |= {stream.name: torch.full((len(row.tokens),), -0.7) for stream in streams}

    problems = [task.problem("train", index) for index in range(2)]
    return {sample.origin for sample in rehearse(method, task, texts, problems, fill, most).samples}


def _notes_of_forest(run: _Side, other: _Side, task: Task, texts: Texts, most: int) -> Iterator[str]:
    """What keeps the replay from being what the other method would have done."""
    name, forest = other.method.name, run.forest
    if other.method.passes != run.method.passes:
        logged = {sample.origin for sample in forest.samples}
        drawn = _origins(other.method, task, texts, most)
        if absent := sorted(drawn - logged):
            yield f"{name} can draw {', '.join(absent)} samples; this step's log has none, and none can be invented"
        if foreign := sorted(logged - drawn):
            yield f"{name} never draws {', '.join(foreign)} samples; the logged ones go through its select as they are"
    if forest.filtered:
        yield f"{len(forest.filtered)} problems that {run.method.name} filtered out are left out of both"
    if gone := len(other.forest.filtered):
        yield f"{name} filters out {gone} of {len(forest.trees)} problems; it would draw others in their place"


def _notes_of_run(run: Run, told: Mapping[str, Any], metrics: Mapping[str, Any], *, exact: bool) -> Iterator[str]:
    """Where the run's own method does not come out as it did in training."""
    cuts = run.optimizer.epochs * run.optimizer.updates_per_batch
    if cuts > 1:
        yield f"the run makes {cuts} updates of a batch; the gradients here are those of the batch as one"
    if told["off_log"] is None:
        yield "the run's own method gives other rows than it logged: it is not what it was"
    elif told["off_log"] > 1e-6:
        yield f"the run's own advantages come out up to {told['off_log']:.2g} off the logged ones"
    then = metrics.get("mismatch/mean", told["mismatch"])
    if exact and cuts == 1 and abs(told["mismatch"] - then) > 1e-3 + 0.1 * then:
        yield (
            f"these are not the weights that sampled: their log-probs are {told['mismatch']:.2g} nats a token off the "
            f"sampler's, and were {then:.2g} in the run"
        )


def _off_log(forest: Forest, rows: Sequence[Row], records: Sequence[Mapping[str, Any]]) -> float | None:
    """The largest difference between an advantage as replayed and as logged; None when the rows are others."""
    largest = 0.0
    for ours, logged in zip(sample_records(forest, rows), records, strict=True):
        if [_shape(row) for row in ours["rows"]] != [_shape(row) for row in logged["rows"]]:
            return None
        for mine, theirs in zip(ours["rows"], logged["rows"], strict=True):
            pairs = zip(_spread(mine), _spread(theirs), strict=True)
            largest = max([largest, *(abs(a - b) for a, b in pairs)])
    return largest


def _shape(row: Mapping[str, Any]) -> list[Any]:
    return [row["term"], row["group"], row["context_tokens"], row["trained"]]


def _spread(row: Mapping[str, Any]) -> list[float]:
    given = row["advantage"]
    return given if isinstance(given, list) else [given] * row["trained"]


def _described(sample: Sample, sides: Mapping[str, _Side]) -> dict[str, Any]:
    return {
        "uid": sample.uid,
        "problem": sample.request.problem.uid,
        "origin": sample.origin,
        "group": sample.group,
        "parent": sample.request.parent,
        "verdict": str(sample.grade.verdict),
        "reward": sample.grade.reward,
        "response": sample.text[:SHOWN],
        **{who: _advantage([r for r in side.rows if r.sample is sample]) for who, side in sides.items()},
    }


def _advantage(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Over the trained tokens of a sample's rows, of all terms; None when nothing of it is trained."""
    trained = [row.advantages[row.mask] for row in rows if bool(row.mask.any())]
    if not trained:
        return None
    values = torch.cat(trained)
    low, high = float(values.min()), float(values.max())
    middle = min(max(float(values.double().mean()), low), high)
    return {"tokens": len(values), "mean": middle, "min": low, "max": high}
