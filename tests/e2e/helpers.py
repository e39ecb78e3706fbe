"""Tiny models, ways to run the command line, and what it means that two runs ended alike."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from mulligan import cli
from mulligan.checkpoint import STATE, list_checkpoints
from mulligan.models.loading import save_model
from mulligan.models.looped import LoopedConfig, LoopedForCausalLM
from mulligan.models.tokenizer import pico_tokenizer

HERE = Path(__file__).parent
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": 68, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
# A step of these takes some hundredths of a second.
SMALL = (
    "sampling.prompts=4",
    "sampling.max_new_tokens=12",
    "method.group_size=4",
    "eval.problems=4",
    "eval.samples=2",
    "eval.every=2",
    "checkpoint.every=2",
)


def make_model(folder: Path, kind: str = "looped", context: int = 96) -> Path:
    """A model directory with random weights of width 32; the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "looped":
            model: Any = LoopedForCausalLM(
                LoopedConfig(**SIZES, **IDS, total_ut_steps=2, max_position_embeddings=context)
            )
        else:
            more = {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": context}
            model = Qwen3ForCausalLM(Qwen3Config(**SIZES, **IDS, **more))
    save_model(model, pico_tokenizer(), folder)
    return folder


# --- in this process ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


def call(*argv: str | Path) -> Said:
    """The command line in this process; anything but an exit is an error of the test."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv
    sys.argv = ["mulligan", *map(str, argv)]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = before
    return Said(code, out.getvalue(), err.getvalue())


def refused(said: Said, *parts: object) -> str:
    """The one line with which something was refused; it holds all the parts."""
    assert said.code == 2, said
    assert said.err.startswith("mulligan: ") and said.err.count("\n") == 1, said.err
    assert "Traceback" not in said.out + said.err
    for part in parts:
        assert str(part) in said.err, (part, said.err)
    return said.err


# --- in another process ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    """Where a process kills itself: in the ``call``-th call of ``target`` within a phase of a step."""

    phase: str  # step, evaluate or save
    step: int
    target: str  # "module:Class.function"
    call: int = 1
    afterwards: bool = False  # when the function has done its work
    signal: str = "SIGKILL"


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int  # negative: the signal that killed it
    late: float | None  # seconds from the signal to the end
    output: str


class Forks:
    """A running ``kill_at.py``."""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "kill_at.py"), str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "100"},
        )

    def run(
        self,
        cwd: Path,
        *argv: str | Path,
        kill: Kill | None = None,
        after: float | None = None,
        signal: str = "SIGKILL",
    ) -> Ended:
        """``mulligan ARGV`` in ``cwd``, which is made when absent; it gets ``signal`` after so many seconds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        cwd.mkdir(parents=True, exist_ok=True)
        request = {
            "cwd": str(cwd),
            "argv": [str(a) for a in argv],
            "kill": asdict(kill) if kill else None,
            "after": after,
            "signal": signal,
        }
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def forks(model: Path) -> Iterator[Forks]:
    """A :class:`Forks` that is closed in the end; ``model`` is loaded once before the first fork."""
    running = Forks(model)
    try:
        yield running
    finally:
        running.close()


# --- what a run leaves ----------------------------------------------------------------------------------


def steps_saved(run: Path) -> list[int]:
    """The steps of a run's checkpoints."""
    return [step for step, _ in list_checkpoints(run / "checkpoints")]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the times, which no two runs share."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def no_line_doubles(run: Path) -> None:
    """Every step has one line of training, and every evaluation one; every sample has one."""
    kinds = [(m["step"], "eval/pass@1" in m) for m in metrics(run)]
    assert len(kinds) == len(set(kinds)), kinds
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    names = [(s["step"], s["uid"]) for s in samples]
    assert len(names) == len(set(names))


def ended_alike(one: Path, other: Path) -> None:
    """Two runs have the same newest checkpoint bit for bit, the same rollouts, and the same numbers, times aside."""
    no_line_doubles(one)
    no_line_doubles(other)
    assert metrics(one) == metrics(other)
    assert (one / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    last = [list_checkpoints(run / "checkpoints")[-1][1] for run in (one, other)]
    assert last[0].name == last[1].name
    tensors = [sorted(p.name for p in folder.glob("*.safetensors")) for folder in last]
    assert tensors[0] == tensors[1] == ["model.safetensors", "optimizer.safetensors", "rng.safetensors"]
    for name in tensors[0]:
        assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), name
    states = [json.loads((folder / STATE).read_text()) for folder in last]
    for run, state in zip((one, other), states, strict=True):
        # Lines have as many digits as their times: the offsets differ, but always stand at the files' ends.
        assert state.pop("offsets") == {n: (run / n).stat().st_size for n in ("metrics.jsonl", "samples.jsonl")}
    assert states[0] == states[1]
