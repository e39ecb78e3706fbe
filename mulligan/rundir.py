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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

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
from mulligan.config import differences, read_toml, to_toml
from mulligan.errors import UserError
from mulligan.files import reason, write_aside
from mulligan.log import METRICS, SAMPLES, RunLog
from mulligan.memory import Memory
from mulligan.models.loading import LoadedModel
from mulligan.session import Session
from mulligan.types import Forest, Row, Sample

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
    if resume:
        offsets = {METRICS: 0, SAMPLES: 0}
        found = load_checkpoint(directory / CHECKPOINTS)
        if found is not None:
            load_state(session, found.tensors, found.state, found.path)
            offsets = found.state["offsets"]
        elif is_run(directory):  # what it has logged is cut off now, so it must be this very run's
            _same_settings(read_toml(directory / RUN), session, directory / RUN)
    elif is_run(directory) or (directory / METRICS).exists() or list_checkpoints(directory / CHECKPOINTS):
        raise UserError(f"{directory} holds another run: --resume goes on with it, --out DIR starts beside it")

    def write(path: Path) -> None:
        path.write_text(to_toml(session.resolved), encoding="utf-8")

    with RunLog(directory, offsets=offsets, tensorboard=session.run.log.tensorboard) as log:
        write_aside(directory / RUN, write)
        try:
            session.loaded.model.config.save_pretrained(directory / MODEL)
            session.loaded.tokenizer.save_pretrained(directory / MODEL)
        except Exception as error:  # tokenizers' Rust raises the bare Exception for a full disk
            raise UserError(f"{directory / MODEL}: cannot write: {reason(error)}") from error
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
    load_model_tensors(session.learner.model, tensors["model"])
    unpack_optimizer(session.learner.optimizer, session.learner.model, tensors["optimizer"], state["optimizer"])
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
    packed, optimizer = pack_optimizer(session.learner.optimizer, session.learner.model)
    generators, rng = rng_state()
    return save_checkpoint(
        session.run.directory / CHECKPOINTS,
        session.step,
        {"model": model_tensors(session.learner.model), "optimizer": packed, "rng": generators},
        {
            "run": session.resolved,
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
    """The model of one of a run's checkpoints, on the CPU.

    Raises:
        UserError: the run's ``model/`` cannot be read.
    """
    try:
        # In the dtype of the run from the start: casting afterwards would round the rotary tables, too.
        dtype = next(iter(found.tensors["model"].values())).dtype
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory / MODEL), dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(directory / MODEL)
    except Exception as error:  # damaged tokenizer files raise anything at all
        raise UserError(f"{directory / MODEL}: cannot be loaded: {reason(error)}") from error
    load_model_tensors(model, found.tensors["model"])
    return LoadedModel(model=model.eval(), tokenizer=tokenizer, name=str(directory))


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
