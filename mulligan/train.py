"""The loop. Every method runs through these lines; none is named in them."""

from __future__ import annotations

import time
from typing import Protocol

from mulligan.assign import assign
from mulligan.evaluate import Evaluation, evaluate
from mulligan.learner.alignment import alignment
from mulligan.log import RunLog
from mulligan.measures import mechanism_metrics, rollout_metrics
from mulligan.rollout import rollout
from mulligan.rundir import open_directory, sample_records, save_state
from mulligan.session import Session
from mulligan.stopping import Stopped, Stopper
from mulligan.types import Forest, Metrics, Problem


class Reporter(Protocol):
    """Who is told what happens; the library itself prints nothing."""

    def started(self, session: Session, resumed: bool) -> None: ...
    def phase(self, name: str, done: int, total: int) -> None: ...
    def stepped(self, step: int, metrics: Metrics) -> None: ...
    def evaluated(self, step: int, evaluation: Evaluation, numbers: Metrics) -> None: ...


def train(session: Session, reporter: Reporter, *, resume: bool = False) -> None:
    """Trains to ``run.steps``, evaluating and saving on the way; everything lands in the run's directory.

    A signal to end saves the last completed step and comes out as :class:`Stopped`.

    Raises:
        UserError: whatever the user can mend. Checkpoints and log stay valid.
    """
    stopper = Stopper()
    with stopper.listening(), open_directory(session, resume=resume) as log:
        reporter.started(session, resumed=session.step > 0)
        saved = (session.step, session.evaluated)
        try:
            while True:
                stopper.check()
                if _evaluation_due(session):
                    _evaluate(session, log, reporter, stopper)
                done = _done(session)
                due = done or session.step % session.run.checkpoint.every == 0
                if due and session.step and (session.step, session.evaluated) != saved:
                    reporter.phase("saving", 0, 1)
                    stopper.shield()
                    save_state(session, log)
                    saved = (session.step, session.evaluated)
                    stopper.unshield()
                    log.confirm()
                if done:
                    return
                one_step(session, log, reporter, stopper)
        except Stopped:
            session.memory.rollback()
            if session.step and (session.step, session.evaluated) != saved:
                save_state(session, log)
            raise


def one_step(session: Session, log: RunLog, reporter: Reporter, stopper: Stopper) -> None:
    """Rollout, rows, update; the step counts once weights, memory and log all have it."""
    run, learner, step = session.run, session.learner, session.step
    method, clock = session.schedule.at(step), _Clock()
    reporter.phase("sampling", 0, 1)

    def draw() -> tuple[int, Problem]:
        index = session.memory.next_index()
        return index, session.task.problem("train", index)

    forest = rollout(
        draw,
        run.sampling.prompts,
        method.passes,
        step=step,
        seed=run.seed,
        texts=session.texts,
        sampler=session.sampler,
        grade=session.task.grade,
        keep=method.keep,
        draws=run.sampling.draws,
        score=learner.score_samples,
        memory=session.memory,
    )
    clock.lap("time/rollout")
    reporter.phase("updating", 0, 1)
    rows = assign(method, forest, session.texts, learner.fill_streams, run.sampling.max_new_tokens)
    clock.lap("time/assign")
    every, aligned = run.diagnose.alignment, {}
    if every and step % every == 0:
        aligned = alignment(learner.model, [row.sample for row in rows], session.texts, run.diagnose.samples)
        clock.lap("time/diagnose")
    several = run.optimizer.epochs * run.optimizer.updates_per_batch > 1
    # Weights move inside update. One optimizer step is shielded from its start; a batch of several may take
    # long, so there a signal puts back the weights from before it.
    undo = learner.snapshot() if several else None
    shields = 0

    def guard() -> None:
        nonlocal shields
        if not several:
            stopper.shield()
            shields += 1

    learner.guard = guard
    try:
        metrics = learner.update(rows, method, step)
        if not shields:  # inside the try: a signal between the last optimizer step and here puts back, too
            stopper.shield()
    except BaseException:
        if undo is not None:
            stopper.shield()
            undo()
            stopper.unshield()
        if shields:
            stopper.unshield()
        raise
    clock.lap("time/update")
    _count(session, forest)
    if method.remember is not None:
        method.remember(forest, session.memory)
    session.memory.commit()
    session.step = step + 1
    seen = rollout_metrics(forest, rows) | mechanism_metrics(forest, rows, session.texts) | aligned
    record = {"step": session.step, **seen, **metrics, **session.memory["totals"], **clock.times}
    log.metrics(record)
    if run.log.samples:
        log.samples(sample_records(forest, rows))
    reporter.stepped(session.step, record)
    stopper.unshield()


def _count(session: Session, forest: Forest) -> None:
    """Running totals: every sampled token counts, those of filtered groups too."""
    before = session.memory.get("totals", {"total/tokens": 0, "total/samples": 0})
    every = [s for t in (*forest.trees, *forest.filtered) for s in t.samples]
    session.memory["totals"] = {
        "total/tokens": before["total/tokens"] + sum(len(s.behavior_logprobs) for s in every),
        "total/samples": before["total/samples"] + len(every),
    }


def _evaluation_due(session: Session) -> bool:
    if session.evaluated == session.step:
        return False
    every = session.run.eval.every
    return session.step == 0 or _done(session) or bool(every and session.step % every == 0)


def _done(session: Session) -> bool:
    """Whether the steps, or the tokens that may be sampled, are spent."""
    spent = session.memory.get("totals", {"total/tokens": 0})["total/tokens"]
    return session.step >= session.run.steps or (session.run.tokens is not None and spent >= session.run.tokens)


def _evaluate(session: Session, log: RunLog, reporter: Reporter, stopper: Stopper) -> None:
    settings, clock = session.run.eval, _Clock()
    found = evaluate(
        session.task,
        session.texts,
        session.eval_sampler,
        split=settings.split,
        problems=settings.problems,
        samples=settings.samples,
        seed=session.run.seed,
        progress=lambda done, total: reporter.phase("evaluating", done, total),
    )
    numbers = found.numbers()
    clock.lap("time/evaluate")
    data = {f"data/left_out/{why}": n for why, n in session.task.left_out().items()} if session.step == 0 else {}
    stopper.shield()
    log.metrics({"step": session.step, **data, **{f"eval/{k}": v for k, v in numbers.items()}, **clock.times})
    session.evaluated = session.step
    reporter.evaluated(session.step, found, numbers)
    stopper.unshield()


class _Clock:
    """Seconds of each phase."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.times[name], self._last = now - self._last, now
