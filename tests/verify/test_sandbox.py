"""What a worker may not do, all layers together and each by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mulligan.verify import pool as pools
from mulligan.verify import sandbox
from mulligan.verify.pool import Pool
from tests.verify.trials import ACTIONS, CALLS

ROOT = Path(__file__).resolve().parents[2]
LEFT = (Path("/tmp/mulligan-sandbox-trial"), Path("/tmp/mulligan-sandbox-trial-folder"))
FORBIDDEN = sorted(ACTIONS.keys() - {"evaluate"})
SECCOMP = pytest.mark.skipif("seccomp" not in sandbox.layers(), reason="no seccomp filters here")


@pytest.fixture(scope="module")
def pool():
    with pytest.MonkeyPatch.context() as patch, Pool(1) as pool:
        patch.setitem(pools.FUNCTIONS, "trial", "tests.verify.trials:run")
        yield pool


@pytest.fixture(autouse=True)
def nothing_is_left():
    for path in LEFT:
        assert not path.exists(), f"{path} is in the way"
    yield
    left = [path for path in LEFT if path.exists()]
    for path in left:
        path.rmdir() if path.is_dir() else path.unlink()
    assert not left


def test_files_network_processes_and_imports_are_refused(pool):
    found = pool.run("trial", [{"what": "attempt", "action": action} for action in FORBIDDEN])
    told = {action: outcome.value for action, outcome in zip(FORBIDDEN, found, strict=True)}
    assert "done" not in told.values() and None not in told.values(), told
    assert told["import"] == "ImportError"  # the error that libraries expect of an optional package
    assert told["read a file"] == told["system"] == "PermissionError"


def test_computing_goes_on(pool):
    assert pool.run("trial", [{"what": "attempt", "action": "evaluate"}])[0].value == "done"


@SECCOMP
@pytest.mark.parametrize("call", sorted(CALLS))
def test_system_calls_behind_pythons_back_are_refused(pool, call):
    assert pool.run("trial", [{"what": "call_the_kernel", "name": call}])[0].value == -1


def test_the_layers_told_are_the_layers_there(pool):
    pool.run("trial", [{"what": "echo", "value": 1}])
    (layers,) = {tuple(worker.layers) for worker in pool._alive if worker.layers}
    assert list(layers) == sandbox.layers()
    assert {"rlimits", "audit"} <= set(layers)
    if sys.platform == "linux":
        (pid, *_) = (worker._process.pid for worker in pool._alive if worker.layers)
        status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        threads = [path / "status" for path in Path(f"/proc/{pid}/task").iterdir()]
        assert len(threads) >= 2  # the watcher is filtered too
        assert status["NoNewPrivs"] == "1"
        assert all(("Seccomp:\t2" in path.read_text()) == ("seccomp" in layers) for path in threads)


SCRIPT = """
import json, sys, types
sys.path.insert(0, {root!r})
sys.modules["mulligan"] = bare = types.ModuleType("mulligan")
bare.__path__ = [{root!r} + "/mulligan"]
from tests.verify import trials
from mulligan.verify import sandbox
{lock}
told = {{}}
for name in {names}:
    try:
        told[name] = {attempt}
    except Exception as error:
        told[name] = repr(error)
print(json.dumps(told))
"""


def alone(lock: str, names: list[str], attempt: str) -> dict:
    """What the attempts give in a process that has one layer of the sandbox."""
    script = SCRIPT.format(root=str(ROOT), lock=lock, names=names, attempt=attempt)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def test_the_audit_hook_suffices_for_what_goes_through_python():
    told = alone("sys.addaudithook(sandbox._audit)", [*FORBIDDEN, "evaluate"], "trials.attempt(name)")
    assert told.pop("evaluate") == "done"
    told.pop("start a thread")  # older Pythons raise no event for it
    assert set(told.values()) == {"PermissionError", "ImportError"}, told


@SECCOMP
def test_the_filter_suffices_without_the_audit_hook():
    lock = "assert sandbox._Seccomp().install()"
    names = [action for action in FORBIDDEN if action not in ("raise its limits", "load a library", "import")]
    told = alone(lock, names, "trials.attempt(name)")
    assert "done" not in told.values(), told
    told = alone(lock, sorted(CALLS), "trials.call_the_kernel(name)")
    assert set(told.values()) == {-1}, told


def test_without_a_sandbox_the_attempts_would_succeed():
    """Else the tests above would pass with no sandbox at all."""
    safe = ["read a file", "list a folder", "run a program", "system", "fork", "import", "evaluate", "kill the parent"]
    assert set(alone("", safe, "trials.attempt(name)").values()) == {"done"}
    told = alone("", ["fork", "kill", "socketpair", "dup"], "trials.call_the_kernel(name)")
    assert -1 not in told.values(), told


@pytest.mark.skipif(sys.platform != "linux", reason="macOS does not hold a process to its address space")
def test_limits_are_those_of_the_kernel(pool):
    pool.run("trial", [{"what": "echo", "value": 1}])
    (pid, *_) = (worker._process.pid for worker in pool._alive if worker.layers)
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    limits = {line[:26].strip(): line[26:].split()[:2] for line in lines}
    assert limits["Max address space"] == [str(512 * 2**20)] * 2
    assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
    assert limits["Max open files"] == ["4", "4"]
    assert limits["Max cpu time"] == [str(sandbox.CPU_SECONDS)] * 2
