"""Who else is told a run's numbers, beside ``metrics.jsonl``: TensorBoard, W&B, trackio, or a logger of the user's own.

All of them stand behind one hook, :class:`Logger`, which :class:`mulligan.log.RunLog` calls. What they keep is a copy:
a run is resumed, plotted and exported from its own files alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mulligan.config import LogSection, to_toml
from mulligan.errors import UserError, nearest
from mulligan.files import reason, write_aside
from mulligan.userfile import load_from_file

# At a run's end W&B uploads what the network has not taken yet. What does not get there in this time stays in the
# run's directory, and is told; waiting without an end would be a hang.
WANDB_FINISH_SECONDS = 300.0


class Logger(Protocol):
    """Takes a run's numbers elsewhere.

    Making one must be cheap and change nothing, because ``--dry-run`` makes it, too; whatever opens a file or a
    connection belongs into :meth:`start`. An exception of :meth:`start` stops the run before it trains. One of
    :meth:`metrics` or :meth:`flush` is kept: the record is offered again before the next one, and if that has not
    helped when a checkpoint is saved, the run stops there with nothing lost.
    """

    def start(self, run: Mapping[str, Any], directory: Path, kept: Sequence[Mapping[str, Any]] | None) -> None:
        """Begin, or go on.

        Args:
            run: the resolved settings, as in ``run.toml``.
            directory: the run's; it exists.
            kept: None for a new run. On resuming, the records up to the checkpoint: what was told of later steps will
                be told again, with the same values, and what was lost can be told now.
        """
        ...

    def metrics(self, record: Mapping[str, Any]) -> None:
        """One line of ``metrics.jsonl``: ``step`` (int, never falling) and the numbers of that step."""
        ...

    def flush(self) -> None:
        """A checkpoint is about to be saved: what was told should be safe from a kill, as far as this is possible."""
        ...

    def close(self, failed: bool) -> None:
        """The end; called once after :meth:`start`.

        Args:
            failed: the run ends by an error or a signal, and not because its steps are done.
        """
        ...


def build_loggers(settings: LogSection, directory: Path) -> dict[str, Logger]:
    """The loggers that ``log.to`` names, by those names; none of them started.

    Args:
        settings: the run's ``[log]``.
        directory: the run's; ``log.name`` is its name when left out.

    Raises:
        UserError: an unknown or doubled name, a package that is absent, W&B without an account, or a file of the
            user's that has no such factory.
    """
    name = settings.name or directory.resolve().name
    out: dict[str, Logger] = {}
    for choice in settings.to:
        if choice in out:
            raise UserError(f"log.to: '{choice}' is named twice")
        if ":" in choice:
            out[choice] = _from_file(choice)
        elif choice in _BUILT_IN:
            out[choice] = _BUILT_IN[choice](settings.project, name)
        else:
            raise UserError(f"log.to: '{choice}' is no logger{nearest(choice, [*_BUILT_IN, './mine.py:factory'])}")
    return out


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """What of a record can be plotted, without its step."""
    plain = {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {key: value for key, value in plain.items() if key != "step"}


class TensorBoard:
    """Event files in ``<run>/tensorboard``."""

    def __init__(self, project: str, name: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _absent("TensorBoard", "tensorboard") from error
        self._make: Any = SummaryWriter
        self._writer: Any = None

    def start(self, run: Mapping[str, Any], directory: Path, kept: Sequence[Mapping[str, Any]] | None) -> None:
        folder = directory / "tensorboard"
        new = not folder.exists()
        # Its files cannot be cut; it is told to forget the steps that come again.
        purge = None if kept is None else max((record["step"] for record in kept), default=-1) + 1
        self._writer = self._make(str(folder), purge_step=purge)
        indented = "".join(f"    {line}\n" for line in to_toml(run).splitlines())
        self._writer.add_text("run", indented, 0 if purge is None else purge)
        for record in kept or () if new else ():
            self.metrics(record)

    def metrics(self, record: Mapping[str, Any]) -> None:
        for key, value in numbers(record).items():
            self._writer.add_scalar(key, value, record.get("step"))

    def flush(self) -> None:
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in W&B; its files lie in ``<run>/wandb``.

    A resumed run goes on with the same W&B run, whose id is kept in ``<run>/wandb/<project>.id``. W&B wants an index
    that rises by the record, and a step can have two (its training and an evaluation), so step N has the indices 2 N
    and 2 N + 1. What W&B does not have by its index is sent when a run is resumed, because it keeps records in memory
    for a while and a killed run loses those; what it has is not sent twice. The x axis of all charts is ``step``.
    """

    def __init__(self, project: str, name: str) -> None:
        self.project, self.name = project, name
        try:
            import wandb
        except ImportError as error:
            raise _absent("W&B", "wandb") from error
        self._wandb: Any = wandb
        self._run: Any = None
        self._last = (-1, 0)  # the last record's step, and how many of that step came before it
        self._check_account()

    def _check_account(self) -> None:
        """W&B would ask on the terminal, and wait; and without a terminal it would fail late."""
        mode = os.environ.get("WANDB_MODE") or self._wandb.setup().settings.mode
        if mode in ("offline", "dryrun", "disabled"):
            return
        try:
            known = self._wandb.login(prompt=False)
        except Exception as error:  # a malformed key
            raise UserError(f"log.to: wandb: {_line(error)}") from error
        if not known:
            raise UserError(
                "log.to: wandb has no account on this machine: run 'wandb login' or set WANDB_API_KEY, or set "
                "WANDB_MODE=offline to keep its files in the run's directory"
            )

    def start(self, run: Mapping[str, Any], directory: Path, kept: Sequence[Mapping[str, Any]] | None) -> None:
        self._run = self._wandb.init(
            project=self.project,
            name=self.name,
            id=self._id(directory / "wandb" / f"{self.project}.id"),
            resume="allow",
            dir=str(directory),
            config=dict(run),
            allow_val_change=True,  # a resumed run may have other steps
            settings=self._wandb.Settings(
                console="off",  # the run's own output stays the run's own
                disable_git=True,  # the user's working tree is none of its business
                finish_timeout=WANDB_FINISH_SECONDS,
                finish_timeout_raises=True,
                reinit="create_new",  # a notebook's own W&B run is left alone
            ),
        )
        self._run.define_metric("*", step_metric="step")
        for record in kept or ():
            self.metrics(record)

    @staticmethod
    def _id(path: Path) -> str:
        def write(aside: Path) -> None:
            aside.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")

        if not path.is_file():
            write_aside(path, write)
        return path.read_text(encoding="utf-8").strip()

    def metrics(self, record: Mapping[str, Any]) -> None:
        step = int(record["step"])
        before = self._last[1] + 1 if step == self._last[0] else 0
        index = 2 * step + min(before, 1)
        if index >= self._run.step:
            self._run.log({"step": step, **numbers(record)}, step=index, commit=True)
        self._last = (step, before)  # only now: a record that failed is offered again

    def flush(self) -> None:
        """Nothing can be done: W&B writes and sends at its own pace, and a resumed run sends what was lost."""

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A local store in ``<run>/trackio``, or where TRACKIO_DIR says; no dashboard is started.

    trackio has no way to take back what it was told: the steps that come again after a kill are in the store twice,
    with the same values.
    """

    def __init__(self, project: str, name: str) -> None:
        self.project, self.name = project, name
        # Not imported yet: it fixes its directory when it is.
        if importlib.util.find_spec("trackio") is None:
            raise _absent("trackio", "trackio")
        self._module: Any = None
        self._run: Any = None

    def start(self, run: Mapping[str, Any], directory: Path, kept: Sequence[Mapping[str, Any]] | None) -> None:
        given = os.environ.get("TRACKIO_DIR")
        wanted = Path(given) if given else directory.resolve() / "trackio"
        os.environ["TRACKIO_DIR"] = str(wanted)
        try:
            import trackio.utils
        finally:
            if given is None:
                del os.environ["TRACKIO_DIR"]  # the next run of this process has a directory of its own
        fixed = Path(trackio.utils.TRACKIO_DIR)
        if fixed != wanted:
            raise UserError(
                f"log.to: trackio keeps to one directory in a process, here {fixed}: set TRACKIO_DIR to one directory "
                "for all runs, or start each run in a process of its own"
            )
        self._module = trackio

        def begin(resume: str) -> None:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints; its hints leave out the directory
                self._run = trackio.init(
                    project=self.project,
                    name=self.name,
                    config=dict(run),
                    resume=resume,
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )

        if kept is None:
            begin("never")
            return
        try:
            begin("must")
        except ValueError:  # its store has no such run
            begin("never")
            for record in kept:
                self.metrics(record)

    def metrics(self, record: Mapping[str, Any]) -> None:
        self._run.log(numbers(record), step=int(record["step"]))

    def flush(self) -> None:
        """Nothing to do: a thread of trackio's writes twice a second."""

    def close(self, failed: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._module.finish()


_BUILT_IN: dict[str, Callable[[str, str], Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "trackio": Trackio,
}


def _absent(what: str, extra: str) -> UserError:
    return UserError(f"{what} logging needs another package: pip install 'mulligan[{extra}]'")


def _from_file(text: str) -> Logger:
    """A logger made by a function without arguments in a user's own file."""
    factory = load_from_file("log.to", text)
    try:
        made: Any = factory()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"log.to: {text} fails: {_line(error)}") from error
    missing = [part for part in ("start", "metrics", "flush", "close") if not callable(getattr(made, part, None))]
    if missing:
        raise UserError(f"log.to: {text} makes a {type(made).__name__} without '{missing[0]}' (see docs/loggers.md)")
    return made


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {reason(error)}"
