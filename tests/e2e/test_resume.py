"""A run that is killed in any phase and resumed ends like one that was never stopped, bit for bit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from mulligan.checkpoint import load_checkpoint, read_checkpoint
from tests.e2e.helpers import SMALL, Ended, Kill, ended_alike, metrics, no_line_doubles, steps_saved

VERIFY, DECODE = "mulligan.tasks.chain:Chain.verify", "mulligan.sampling.embedded:EmbeddedSampler._forward"
GRADIENT, STEP = "mulligan.learner.update:Learner._micro_batch", "torch.optim:AdamW.step"
# Where; the last step that is complete then; the last one that has a checkpoint. One is saved every second step.
PHASES = {
    "sampling": (Kill("step", 4, DECODE, call=4), 3, 2),
    "verifying": (Kill("step", 4, VERIFY, call=7), 3, 2),
    "computing gradients": (Kill("step", 4, GRADIENT, call=2), 3, 2),
    "just after the update": (Kill("step", 4, STEP, afterwards=True), 4, 2),
    "logging": (Kill("step", 4, "mulligan.log:RunLog.samples"), 4, 2),
    "evaluating": (Kill("evaluate", 4, VERIFY, call=3), 4, 2),
    "saving": (Kill("save", 4, "mulligan.checkpoint:_write_manifest"), 4, 2),
    "just after saving": (Kill("save", 4, "mulligan.checkpoint:_put_in_place", afterwards=True), 4, 4),
    "the last evaluation": (Kill("evaluate", 6, VERIFY, call=3), 6, 4),
}
TRAIN = ("train", "--steps", "6", "--out", "run", *SMALL, "task.level=1", "optimizer.tokens_per_micro_batch=60")
SEVERAL = (*TRAIN, "optimizer.updates_per_batch=2", "optimizer.epochs=2")
DAPO = (*TRAIN, "method.name=dapo")


@pytest.fixture(scope="module")
def uninterrupted(forked, tiny, tmp_path_factory):
    """A run that is never stopped, by its arguments; each is made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*argv: str) -> Path:
        if argv not in made:
            folder = tmp_path_factory.mktemp("uninterrupted")
            ended = forked.run(folder, *argv, "--model", tiny)
            assert ended.code == 0, ended.output
            made[argv] = folder / "run"
            no_line_doubles(made[argv])
        return made[argv]

    return run


def resume(forked, tiny, folder: Path, *argv: str) -> int:
    """Goes on to the end; the step it went on from."""
    ended = forked.run(folder, *argv, "--model", tiny, "--resume")
    assert ended.code == 0, ended.output
    found = re.search(r"going on from step (\d+)\n", ended.output)
    assert found, ended.output
    return int(found[1])


def stopped_cleanly(ended: Ended) -> None:
    """SIGTERM: the code, the time and the one line."""
    assert ended.code == 143, ended.output
    assert ended.late is not None and ended.late < 10
    assert "Traceback" not in ended.output
    assert ended.output.splitlines()[-1].startswith("mulligan: SIGTERM: ")


@pytest.mark.parametrize("phase", PHASES)
def test_kill(phase, forked, tiny, uninterrupted, tmp_path):
    kill, _, saved = PHASES[phase]
    reference = uninterrupted(*TRAIN)
    ended = forked.run(tmp_path, *TRAIN, "--model", tiny, kill=kill)
    assert ended.code == -9, ended.output
    assert steps_saved(tmp_path / "run")[-1] == saved
    assert resume(forked, tiny, tmp_path, *TRAIN) == saved
    ended_alike(reference, tmp_path / "run")


@pytest.mark.parametrize("phase", PHASES)
def test_terminate(phase, forked, tiny, uninterrupted, tmp_path):
    kill, complete, _ = PHASES[phase]
    reference = uninterrupted(*TRAIN)
    ended = forked.run(tmp_path, *TRAIN, "--model", tiny, kill=replace(kill, signal="SIGTERM"))
    stopped_cleanly(ended)
    assert steps_saved(tmp_path / "run")[-1] == complete
    assert resume(forked, tiny, tmp_path, *TRAIN) == complete
    ended_alike(reference, tmp_path / "run")


def test_the_reference_trains(uninterrupted):
    """Otherwise all of the above would compare nothing with nothing."""
    lines = [m for m in metrics(uninterrupted(*TRAIN)) if "update/gradient_norm" in m]
    assert [m["step"] for m in lines] == [1, 2, 3, 4, 5, 6]
    assert sum(m["update/gradient_norm"] > 0 for m in lines) >= 4
    folder = uninterrupted(*TRAIN) / "checkpoints"
    first, last = (read_checkpoint(folder / f"step-{step:08d}").tensors["model"] for step in (4, 6))
    assert any((first[k] != last[k]).any() for k in first)


def test_interrupt_from_the_keyboard(forked, tiny, uninterrupted, tmp_path):
    kill = replace(PHASES["sampling"][0], signal="SIGINT")
    ended = forked.run(tmp_path, *TRAIN, "--model", tiny, kill=kill)
    assert ended.code == 130 and "Traceback" not in ended.output
    assert resume(forked, tiny, tmp_path, *TRAIN) == 3
    ended_alike(uninterrupted(*TRAIN), tmp_path / "run")


@pytest.mark.parametrize("call", [1, 2, 4])
def test_terminate_between_the_updates_of_a_batch(call, forked, tiny, uninterrupted, tmp_path):
    """Two epochs of two updates: whichever of the four the signal follows, the batch is taken back whole."""
    reference = uninterrupted(*SEVERAL)
    kill = Kill("step", 4, STEP, call=call, afterwards=True, signal="SIGTERM")
    stopped_cleanly(forked.run(tmp_path, *SEVERAL, "--model", tiny, kill=kill))
    assert steps_saved(tmp_path / "run")[-1] == 3
    assert resume(forked, tiny, tmp_path, *SEVERAL) == 3
    ended_alike(reference, tmp_path / "run")


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
def test_dynamic_sampling_draws_the_same_problems(signal, forked, tiny, uninterrupted, tmp_path):
    """The kill falls into a second draw, when the cursor is ahead of what the step will have used."""
    reference = uninterrupted(*DAPO)
    drawn_on = [m["step"] for m in metrics(reference) if m.get("rollout/filtered") and m["step"] > 2]
    assert drawn_on, "no step drew twice, so this shows nothing"
    kill = Kill("step", drawn_on[0], VERIFY, call=18, signal=signal)
    ended = forked.run(tmp_path, *DAPO, "--model", tiny, kill=kill)
    assert ended.code == (-9 if signal == "SIGKILL" else 143), ended.output
    assert resume(forked, tiny, tmp_path, *DAPO) > 0
    ended_alike(reference, tmp_path / "run")
    assert load_checkpoint(reference / "checkpoints").state["memory"]["cursor"] > 6 * 4


def test_more_steps_than_at_first(forked, tiny, uninterrupted, tmp_path):
    fewer = ("train", "--steps", "4", *TRAIN[3:])
    assert forked.run(tmp_path, *fewer, "--model", tiny).code == 0
    assert resume(forked, tiny, tmp_path, *TRAIN) == 4
    ended_alike(uninterrupted(*TRAIN), tmp_path / "run")


def test_resuming_a_finished_run_changes_nothing(forked, tiny, uninterrupted, tmp_path):
    assert forked.run(tmp_path, *TRAIN, "--model", tiny).code == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "output.txt"}
    assert resume(forked, tiny, tmp_path, *TRAIN) == 6
    after = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "output.txt"}
    assert before == after


def test_a_kill_before_the_first_checkpoint(forked, tiny, uninterrupted, tmp_path):
    """There are log lines, and half a checkpoint, but nothing to go on from."""
    kill = Kill("save", 2, "mulligan.checkpoint:_write_manifest")
    assert forked.run(tmp_path, *TRAIN, "--model", tiny, kill=kill).code == -9
    assert (tmp_path / "run" / "checkpoints").is_dir() and steps_saved(tmp_path / "run") == []
    ended = forked.run(tmp_path, *TRAIN, "--model", tiny, "--resume")
    assert ended.code == 0, ended.output
    assert ended.output.splitlines()[0] == "run has no checkpoint yet: starting fresh"
    assert "going on" not in ended.output
    ended_alike(uninterrupted(*TRAIN), tmp_path / "run")


def test_resuming_what_never_began(forked, tiny, uninterrupted, tmp_path):
    ended = forked.run(tmp_path, *TRAIN, "--model", tiny, "--resume")
    assert ended.code == 0 and "run has no checkpoint yet: starting fresh" in ended.output
    ended_alike(uninterrupted(*TRAIN), tmp_path / "run")


def test_a_directory_is_enough_to_go_on(forked, tiny, uninterrupted, tmp_path):
    """Its run.toml knows the settings."""
    assert forked.run(tmp_path, *TRAIN, "--model", tiny, kill=PHASES["verifying"][0]).code == -9
    assert resume(forked, tiny, tmp_path, "train", "--out", "run") == 2
    ended_alike(uninterrupted(*TRAIN), tmp_path / "run")


@pytest.mark.parametrize("checkpoint", [True, False])
def test_changed_settings_are_refused_by_name(checkpoint, forked, tiny, tmp_path):
    kill = Kill("step", 4 if checkpoint else 2, VERIFY)
    assert forked.run(tmp_path, *TRAIN, "--model", tiny, kill=kill).code == -9
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    changed = ("sampling.prompts=5", "optimizer.learning_rate=1e-3", "task.level=2")
    ended = forked.run(tmp_path, *TRAIN, *changed, "--model", tiny, "--resume", "--seed", "7")
    assert ended.code == 2
    line = ended.output.splitlines()[-1]
    for part in ("seed: 0 -> 7", "sampling.prompts: 4 -> 5", "optimizer.learning_rate: 0.0002 -> 0.001", "task.level"):
        assert part in line
    assert "steps:" not in line.replace("min_steps:", "").replace("max_steps:", "")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_fewer_steps_than_are_done(forked, tiny, tmp_path):
    assert forked.run(tmp_path, *TRAIN, "--model", tiny, kill=Kill("step", 6, VERIFY)).code == -9
    ended = forked.run(tmp_path, *TRAIN, "--model", tiny, "--resume", "--steps", "3")
    assert ended.code == 2 and "4 steps are done already; the run asks for 3" in ended.output


def test_the_checkpoint_holds_everything_and_no_pickle(uninterrupted):
    run = uninterrupted(*TRAIN)
    found = load_checkpoint(run / "checkpoints")
    assert found is not None and found.step == 6
    files = {p.relative_to(found.path).as_posix() for p in found.path.rglob("*") if p.is_file()}
    names = {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "manifest.json"}
    assert files == names
    assert {"torch", "python", "numpy"} <= found.tensors["rng"].keys()
    assert found.state["memory"]["cursor"] == 24
    assert found.state["updates"] == 6
    listed = json.loads((found.path / "manifest.json").read_text())["files"]
    assert set(listed) == names - {"manifest.json"} and all(len(f["sha256"]) == 64 for f in listed.values())
