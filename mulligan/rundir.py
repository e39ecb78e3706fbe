"""A run's directory: what lies in it, how a run is put there, and how it is taken up again.

| path | what |
|---|---|
| run.toml | the resolved run |
| metrics.jsonl, samples.jsonl | a line a step, a line a sample |
| checkpoints/step-N/ | weights, optimizer, cursor, memory, random states; hashed |
| model/ | the model's config and tokenizer, so that the run needs nothing outside itself |
| curve.png | the learning curve |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mulligan.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_model_tensors,
    model_tensors,
    pack_optimizer,
    rng_state,
    save_checkpoint,
    set_rng_state,
    unpack_optimizer,
)
from mulligan.config import Run, differences, read_toml, to_toml, validate
from mulligan.errors import UserError
from mulligan.files import reason, write_aside
from mulligan.log import METRICS, SAMPLES, RunLog
from mulligan.loggers import build_loggers
from mulligan.memory import Memory
from mulligan.models.adapters import adapter_names, fingerprint, has_adapter
from mulligan.models.loading import LoadedModel, load_skeleton, read_generation_config, save_skeleton
from mulligan.policy import base_name, load_base
from mulligan.session import Session, settle_dtype
from mulligan.types import Forest, Metrics, Row, Sample

RUN = "run.toml"
CHECKPOINTS = "checkpoints"
MODEL = "model"


def is_run(directory: Path) -> bool:
    """Whether a run was started in this directory."""
    return (directory / RUN).is_file()


@contextmanager
def open_directory(session: Session, *, resume: bool) -> Iterator[RunLog]:
    """The run's log, with the session brought to its last checkpoint when ``resume`` finds one.

    Raises:
        UserError: a directory that holds another run, settings that differ from the checkpoint's, or a
            damaged checkpoint. Nothing is changed then.
    """
    directory = session.run.directory
    offsets: dict[str, int] | None = None
    measured: Metrics = {}
    if resume:
        offsets = {METRICS: 0, SAMPLES: 0}
        found = load_checkpoint(directory / CHECKPOINTS)
        stored = found.state["run"] if found is not None else read_toml(directory / RUN) if is_run(directory) else {}
        measured = settle_dtype(session, stored.get("sampling", {}).get("dtype"))
        if found is not None:
            load_state(session, found.tensors, found.state, found.path)
            offsets = found.state["offsets"]
        elif is_run(directory):  # what it has logged is cut off now, so it must be this very run's
            _same_settings(stored, session, directory / RUN)
    elif is_run(directory) or (directory / METRICS).exists() or list_checkpoints(directory / CHECKPOINTS):
        raise UserError(f"{directory} holds another run: --resume goes on with it, --out DIR starts beside it")
    else:
        measured = settle_dtype(session)

    def write(path: Path) -> None:
        path.write_text(to_toml(session.resolved), encoding="utf-8")

    loggers = build_loggers(session.run.log, directory)
    with RunLog(directory, offsets=offsets, loggers=loggers, run=session.resolved) as log:
        write_aside(directory / RUN, write)
        try:
            save_skeleton(session.loaded, directory / MODEL)
        except Exception as error:  # tokenizers' Rust raises the bare Exception for a full disk
            raise UserError(f"{directory / MODEL}: cannot write: {reason(error)}") from error
        if measured:
            log.metrics({"step": session.step, **measured})
        yield log


def load_state(
    session: Session, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any], path: Path
) -> None:
    """Puts a checkpoint's content into a session.

    Raises:
        UserError: settings that differ, with the keys; or more steps done than the run asks for.
    """
    _same_settings(state["run"], session, path)
    if state["step"] > session.run.steps:
        raise UserError(f"{path}: {state['step']} steps are done already; the run asks for {session.run.steps}")
    model = session.learner.model
    _same_base(model, state["base"], path)
    load_model_tensors(model, tensors["model"], adapter_names(model))
    unpack_optimizer(session.learner.optimizer, model, tensors["optimizer"], state["optimizer"])
    session.learner.updates = state["updates"]
    session.memory = Memory(state["memory"])
    session.step, session.evaluated = state["step"], state["evaluated"]
    set_rng_state(tensors["rng"], state["rng"])


def _same_settings(old: dict[str, Any], session: Session, path: Path) -> None:
    changed = differences(old, session.resolved)
    if changed:
        raise UserError(f"{path}: cannot resume with other settings: {'; '.join(changed)}")


def save_state(session: Session, log: RunLog) -> Path:
    """A checkpoint of the last completed step."""
    model = session.learner.model
    packed, optimizer = pack_optimizer(session.learner.optimizer, model)
    generators, rng = rng_state()
    return save_checkpoint(
        session.run.directory / CHECKPOINTS,
        session.step,
        {"model": model_tensors(model, adapter_names(model)), "optimizer": packed, "rng": generators},
        {
            "run": session.resolved,
            "base": _base(session) if has_adapter(model) else None,
            "step": session.step,
            "evaluated": session.evaluated,
            "updates": session.learner.updates,
            "optimizer": optimizer,
            "memory": session.memory.state(),
            "offsets": log.flush(),
            "rng": rng,
        },
        keep=session.run.checkpoint.keep,
    )


def load_run_model(directory: Path) -> tuple[LoadedModel, dict[str, Any]]:
    """The model of a run's newest checkpoint, and the run's settings.

    Raises:
        UserError: not a run, no checkpoint yet, or a damaged one.
    """
    if not is_run(directory):
        raise UserError(f"{directory} is no run: {RUN} is missing")
    found = load_checkpoint(directory / CHECKPOINTS)
    if found is None:
        raise UserError(f"{directory} has no checkpoint yet")
    return checkpoint_model(directory, found), read_toml(directory / RUN)


def checkpoint_model(directory: Path, found: Checkpoint) -> LoadedModel:
    """The model of one of a run's checkpoints, on the CPU; of a run with an adapter base and adapter.

    Raises:
        UserError: the run's ``model/`` cannot be read, or the base of its adapter is gone or another one.
    """
    run = validate(found.state["run"], str(found.path))
    if run.lora.rank:
        loaded = _with_adapter(directory, run, found)
    else:
        loaded = load_skeleton(directory / MODEL, run.model.dtype, run.model.trust_remote_code)
        load_model_tensors(loaded.model, found.tensors["model"])
    return LoadedModel(model=loaded.model.eval(), tokenizer=loaded.tokenizer, name=str(directory))


def _with_adapter(directory: Path, run: Run, found: Checkpoint) -> LoadedModel:
    base = found.state["base"]
    model = run.model.model_copy(update={"name": base["name"]})
    try:
        loaded = load_base(model, run.lora, seed=run.seed, device="cpu")
    except UserError as error:
        raise UserError(f"{directory}: its base model cannot be loaded: {error}") from error
    _same_base(loaded.model, base, found.path)
    load_model_tensors(loaded.model, found.tensors["model"], adapter_names(loaded.model))
    read_generation_config(loaded.model, directory / MODEL)  # the run's end of turn is in it
    return loaded


def _base(session: Session) -> dict[str, str]:
    """What an adapter's checkpoint has to say of the weights that it does not hold."""
    return {"name": base_name(session.run.model.name), "fingerprint": fingerprint(session.learner.model)}


def _same_base(model: PreTrainedModel, base: dict[str, str] | None, path: Path) -> None:
    if base is not None and base["fingerprint"] != fingerprint(model):
        raise UserError(f"{path}: {base['name']} has other weights now than those that its adapter was trained on")


def sample_records(forest: Forest, rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """The lines of ``samples.jsonl`` for one step, those of filtered groups too.

    In the order of asking, problem by problem: the samples of one request are n lines in a row.
    """
    trained: dict[int, list[Row]] = {}
    for row in rows:
        trained.setdefault(row.sample.uid, []).append(row)
    for trees, filtered in ((forest.trees, False), (forest.filtered, True)):
        for tree in trees:
            for sample in tree.samples:
                yield _sample_record(forest.step, sample, trained.get(sample.uid, []), filtered)


def _sample_record(step: int, sample: Sample, rows: Sequence[Row], filtered: bool) -> dict[str, Any]:
    """One line: with its step's others enough to replay the step. Log-probs are rounded to 1e-6 nats."""
    request, grade = sample.request, sample.grade
    return {
        "step": step + 1,
        "uid": sample.uid,
        "problem": request.problem.uid,
        "filtered": filtered,
        "group": sample.group,
        "origin": sample.origin,
        "parent": request.parent,
        "branch": sample.branch,
        "attempt": sample.attempt,
        "n": request.n,
        "seed": request.seeds[sample.attempt],
        "prompt": request.problem.prompt,
        "gold": request.problem.answer,
        "response": sample.text,
        "verdict": str(grade.verdict),
        "reward": grade.reward,
        "answer": grade.answer,
        "reason": grade.reason,
        "process_correct": grade.process_correct,
        "first_wrong_step": grade.first_wrong_step,
        "steps": grade.steps,
        "mentions_hint": grade.mentions_hint,
        "finish": sample.finish,
        "temperature": request.temperature,
        "max_new_tokens": request.max_new_tokens,
        "stop": list(request.stop),
        "context_tokens": list(request.context),
        "tokens": list(sample.tokens),
        "behavior_logprobs": [round(x, 6) for x in sample.behavior_logprobs],
        "rows": [_row_record(row) for row in rows],
    }


def _row_record(row: Row) -> dict[str, Any]:
    trained = row.advantages[row.mask].tolist()
    same = bool(trained) and all(a == trained[0] for a in trained)
    return {
        "term": row.term,
        "group": row.group,
        "context_tokens": list(row.context),
        "trained": int(row.mask.sum()),
        "advantage": trained[0] if same else trained,  # one number where it is the same on every trained token
    }
