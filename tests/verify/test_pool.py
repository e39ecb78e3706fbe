"""The pool: whatever a job does, the others get their answers, and nothing is left behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mulligan.errors import UserError
from mulligan.verify import pool as pools
from mulligan.verify.pool import Outcome, Pool, default_workers, shared_pool

DEADLINE = 1.0
SLACK = 0.3  # seconds by which a busy machine may be late
MEMORY = 256 * 2**20
LINUX = sys.platform == "linux"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def trial_function():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(pools.FUNCTIONS, "trial", "tests.verify.trials:run")
        yield


@pytest.fixture(scope="module")
def pool(trial_function):
    with Pool(2, deadline=DEADLINE, memory=MEMORY) as pool:
        yield pool


def run(pool: Pool, *jobs: tuple[str, dict]) -> list[Outcome]:
    return pool.run("trial", [{"what": what, **keywords} for what, keywords in jobs])


def one(pool: Pool, what: str, **keywords) -> Outcome:
    return run(pool, (what, keywords))[0]


def workers_of(parent: int) -> list[int]:
    """Process ids of the workers of a process; those that are dead but not buried count too."""
    command = ["ps", "-A", "-ww", "-o", "pid=", "-o", "ppid=", "-o", "args="]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in lines.splitlines()]
    return [int(row[0]) for row in rows if int(row[1]) == parent and ("verify/worker.py" in row[2] or "<def" in row[2])]


def is_there(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # a zombie of a parent that is gone waits for init alone


def wait_until(true, seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_answers_come_in_order_and_side_by_side(pool):
    values = [*range(100), "1 MB " * 200_000, None, "\ud800\u0000", {"a": [1.5, None]}]
    found = run(pool, *(("echo", {"value": value}) for value in values))
    assert [outcome.value for outcome in found] == values
    begun = time.monotonic()
    assert [outcome.value for outcome in run(pool, *[("sleep", {"seconds": 0.4})] * 2)] == ["awake"] * 2
    assert time.monotonic() - begun < 0.75  # one behind the other they would take 0.8 s


def test_none_is_no_result_and_says_so(pool):
    assert one(pool, "echo", value=None) == Outcome(
        None, "no result", pytest.approx(0, abs=SLACK), pytest.approx(0, abs=MEMORY)
    )


@pytest.mark.parametrize("what", ["spin", "spin_in_c"])
def test_a_hanging_job_ends_at_the_deadline_with_its_retry(pool, what):
    begun = time.monotonic()
    outcome, other = run(pool, (what, {}), ("echo", {"value": 1}))
    assert (outcome.value, outcome.reason) == (None, "out of time (1 s)")
    assert 0.97 * DEADLINE <= outcome.seconds <= DEADLINE + SLACK
    assert time.monotonic() - begun < DEADLINE + 10  # a worker that has to start first does not count
    assert other.value == 1


def test_the_deadline_runs_from_when_a_worker_has_the_job_not_while_it_waits(pool):
    found = run(pool, *[("sleep", {"seconds": 0.4})] * 8)  # 4 x 0.4 s for each of two workers
    assert all(outcome.value == "awake" and 0.4 <= outcome.seconds < 0.4 + SLACK for outcome in found)


@pytest.mark.parametrize("what", ["die_unless_fresh", "hang_unless_fresh"])
def test_what_fails_on_a_used_worker_is_tried_on_a_fresh_one(trial_function, what):
    with Pool(2, deadline=DEADLINE) as pool:
        run(pool, *[("use", {"seconds": 0.3})] * 2)  # side by side, so that neither of two workers is fresh
        outcome = one(pool, what)
        assert outcome.value == "fresh" and outcome.seconds < DEADLINE + SLACK


def test_idle_workers_that_died_cost_no_attempt(trial_function):
    with Pool(1) as pool:
        one(pool, "echo", value=1)
        assert wait_until(lambda: len([worker for worker in pool._alive if worker.layers]) == 2)
        workers = list(pool._alive)  # the idle one and the spare: two attempts would be lost on them
        for worker in workers:
            worker.kill()
        assert wait_until(lambda: not any(worker.is_alive() for worker in workers))
        assert one(pool, "echo", value=2).value == 2


@pytest.mark.parametrize(
    ("what", "keywords", "reason"),
    [
        ("die", {"code": 3}, "the worker died (exit code 3)"),
        ("segfault", {}, "the worker died (SIGSEGV)"),
        ("half_a_frame", {}, "the worker died (exit code 0)"),
        ("garbage", {"text": "\xff" * 100}, "the worker died (it sent what is no answer)"),
        ("garbage", {"text": "\0\0\0\2[]"}, "the worker died (it sent what is no answer)"),
        ("garbage", {"text": "\0\0\0\5nonse"}, "the worker died (it sent what is no answer)"),
        ("garbage", {"text": '\0\0\0\14{"job": 999}'}, "the worker died (it sent what is no answer)"),
        ("trickle", {}, "out of time (1 s)"),
        ("fail", {"kind": "value"}, "ValueError: on purpose"),
        ("fail", {"kind": "exit"}, "SystemExit: on purpose"),
        ("fail", {"kind": "base"}, "BaseException: on purpose"),
        ("fail", {"kind": "deep"}, "too deeply nested"),
        ("unspeakable", {}, "Rude"),
        ("no_such_function", {}, "KeyError: 'no_such_function'"),
    ],
)
def test_what_breaks_is_unscorable_and_the_next_answer_is_right(pool, what, keywords, reason):
    broken, next_one = run(pool, (what, keywords), ("echo", {"value": what}))
    assert (broken.value, broken.reason) == (None, reason)
    assert next_one.value == what
    assert one(pool, "echo", value=reason).value == reason


@pytest.mark.skipif(not LINUX, reason="macOS does not hold a process to its address space")
def test_memory_is_limited_and_measured_for_each_job(pool):
    large, beyond, again = (one(pool, "grow", megabytes=size) for size in (100, 400, 1))
    assert (large.value, again.value) == (100 * 2**20, 2**20)
    assert (beyond.value, beyond.reason) == (None, "out of memory")
    assert 100 * 2**20 <= large.peak_memory <= MEMORY and beyond.peak_memory <= MEMORY
    with Pool(1, memory=MEMORY) as alone:
        peaks = [one(alone, "grow", megabytes=size).peak_memory for size in (100, 1)]
        assert peaks[0] > 100 * 2**20 and 0 < peaks[1] < 60 * 2**20  # each job's own peak, not the worker's


def test_chatter_on_stdout_and_stderr_goes_nowhere(pool, capfd):
    assert one(pool, "chatter").value == "said"
    assert capfd.readouterr() == ("", "")


def test_an_answer_left_lying_is_not_taken_for_the_next_jobs(trial_function):
    with Pool(1, deadline=DEADLINE) as pool:
        twice, after = run(pool, ("answer_twice", {}), ("echo", {"value": "right"}))
        assert (twice.value, after.value) == ("early", "right")


def test_workers_are_recycled_by_count_and_by_memory(trial_function):
    with Pool(1, memory=MEMORY, recycle=3) as pool:
        pids = [one(pool, "keep", megabytes=0).value for _ in range(7)]
        assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [3, 3, 1]
    if LINUX:
        with Pool(1, memory=MEMORY) as pool:
            pids = [one(pool, "keep", megabytes=20).value for _ in range(12)]
            # Ready it has some 10 MB, so it may keep up to about (10 + 256) / 2; out of memory it would be after 11.
            assert None not in pids and max(pids.count(pid) for pid in pids) in (6, 7)


def test_a_worker_in_which_something_was_refused_is_replaced(trial_function):
    with Pool(1) as pool:
        pid = one(pool, "keep", megabytes=0).value
        assert one(pool, "attempt", action="import").value == "ImportError"
        assert one(pool, "keep", megabytes=0).value != pid


def kill_at_random(pool: Pool, job, right: list, chance: float) -> int:
    """Have 8 threads ask for every answer while ready workers are killed, each at work, idle or spare.

    A worker at its first job is spared: it may be at the second attempt of a job whose worker was killed before, and a
    job that sees two kills rightly goes without an answer.

    Args:
        job: the answer to the k-th question.
        right: all answers.
        chance: of a kill behind one answer.
    """
    found: list = [None] * len(right)
    kills: list[int] = []
    draw = random.Random(0)

    def ask(thread: int) -> None:
        for at in range(thread, len(right), 8):
            found[at] = job(at)
            ready = [worker for worker in list(pool._alive) if worker.layers and worker.jobs != 1]
            if ready and draw.random() < chance:
                draw.choice(ready).kill()
                kills.append(at)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == right
    return len(kills)


def test_no_answer_is_lost_or_wrong_while_workers_are_killed_at_random(trial_function):
    with Pool(2) as pool:
        kills = kill_at_random(pool, lambda at: one(pool, "echo", value=at).value, list(range(500)), 1 / 20)
        assert kills >= 10


@pytest.mark.slow
def test_no_verdict_is_lost_or_wrong_while_workers_are_killed_at_random():
    pairs = [(rf"{k}\sqrt{{2}}", rf"\sqrt{{2}}\cdot {k if k % 3 else k + 1}") for k in range(1, 501)]
    right = ["correct" if k % 3 else "wrong" for k in range(1, 501)]
    with Pool(2) as pool:
        assert kill_at_random(pool, lambda at: pool.grade(*pairs[at]).verdict, right, 1 / 30) >= 10


def test_ctrl_c_leaves_the_pool_usable(pool):
    # Python does without its handler where the shell that began it, in the background, ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(pool, *[("spin", {})] * 50)
    finally:
        signal.signal(signal.SIGINT, before)
    begun = time.monotonic()
    assert one(pool, "echo", value="still here").value == "still here"
    assert time.monotonic() - begun < 2 * DEADLINE + 10  # the 48 that had not begun are dropped


def test_the_users_own_alarm_is_left_alone(pool):
    rings = []
    before = signal.signal(signal.SIGALRM, lambda *_: rings.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        assert one(pool, "spin").value is None
        assert rings == [1]
    finally:
        signal.signal(signal.SIGALRM, before)


def test_a_worker_that_cannot_start_is_one_clear_error_and_soon(trial_function):
    for function, reason in [
        ("tests.verify.nothing:run", "ModuleNotFoundError: No module named 'tests.verify.nothing'"),
        ("tests.verify.trials:nothing", "AttributeError"),
        ("tests.verify.dies_at_once:run", "it died at once (exit code 9)"),
    ]:
        with pytest.MonkeyPatch.context() as patch, Pool(2) as pool:
            patch.setitem(pools.FUNCTIONS, "broken", function)
            begun = time.monotonic()
            with pytest.raises(UserError, match="the verifier's worker does not start") as told:
                pool.run("broken", [{}] * 20)
            assert reason in str(told.value) and "\n" not in str(told.value)
            assert time.monotonic() - begun < 20
            assert one(pool, "echo", value=1).value == 1  # other functions work on
    with pytest.MonkeyPatch.context() as patch, Pool(1) as pool:
        patch.setattr(sys, "executable", "/no/such/python")
        with pytest.raises(UserError, match=r"does not start: .*No such file"):
            one(pool, "echo", value=1)


def test_unknown_functions_and_senseless_settings_are_refused(pool):
    with pytest.raises(UserError, match=r"verifier function 'jugde' is unknown \(did you mean 'judge'\?\)"):
        pool.run("jugde", [{}])
    for settings in ({"workers": 0}, {"deadline": 0}, {"recycle": 0}, {"memory": 0}):
        with pytest.raises(UserError, match="needs at least"):
            Pool(**settings)


def test_a_closed_pool_says_so_and_leaves_nothing(trial_function):
    before = set(workers_of(os.getpid()))  # other pools'
    pool = Pool(2, deadline=30)
    caught: list[str] = []

    def wait_for_it() -> None:
        try:
            run(pool, ("spin", {}), ("spin", {}), ("spin", {}))
        except BaseException as error:
            caught.append(type(error).__name__)

    waiting = threading.Thread(target=wait_for_it)
    waiting.start()
    assert wait_until(lambda: len(set(workers_of(os.getpid())) - before) >= 2)
    time.sleep(0.2)
    begun = time.monotonic()
    pool.close()
    pool.close()
    waiting.join(5)
    assert time.monotonic() - begun < 5 and not waiting.is_alive()
    assert caught and caught[0] in ("RuntimeError", "CancelledError")
    assert set(workers_of(os.getpid())) <= before
    with pytest.raises(RuntimeError, match="closed"):
        pool.grade("2", "x+x")


def test_a_worker_gets_no_secrets_no_torch_and_a_fixed_hash(pool, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with Pool(1) as fresh:
        facts = one(fresh, "facts").value
    assert not facts["torch"]
    # LC_CTYPE is Python's own doing.
    assert facts["environment"].keys() - pools._INHERITED - {"LC_CTYPE"} == pools._ENVIRONMENT.keys()
    assert "secret" not in str(facts)
    assert "" not in facts["path"] and all(not entry.endswith("mulligan/verify") for entry in facts["path"])
    with Pool(1) as fresh:
        assert one(fresh, "facts").value["hash"] == facts["hash"]


def test_how_many_workers(monkeypatch):
    monkeypatch.delenv(pools.WORKERS_VARIABLE, raising=False)
    assert 1 <= default_workers() <= 8
    monkeypatch.setenv(pools.WORKERS_VARIABLE, "3")
    assert default_workers() == 3
    for wrong in ("", "0", "-1", "two", "1.5"):
        monkeypatch.setenv(pools.WORKERS_VARIABLE, wrong)
        with pytest.raises(UserError, match=pools.WORKERS_VARIABLE):
            default_workers()


def test_the_shared_pool_is_one_and_a_forked_child_has_its_own():
    found: set[int] = set()
    threads = [threading.Thread(target=lambda: found.add(id(shared_pool()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1
    mine = shared_pool()
    assert one(mine, "echo", value="parent").value == "parent"
    workers = set(workers_of(os.getpid()))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            own = shared_pool()
            told = one(own, "echo", value="child").value
            try:
                mine.grade("7", "7")
            except RuntimeError as error:
                mine.close()  # of no effect on the parent's workers
                own.close()
                code = 0 if told == "child" and own is not mine and "fork" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert workers <= set(workers_of(os.getpid()))
    assert one(mine, "echo", value="parent").value == "parent"
    mine.close()
    assert shared_pool() is not mine
    shared_pool().close()


PARENT = """
import sys, threading, time, types
sys.path.insert(0, {root!r})
sys.modules["mulligan"] = bare = types.ModuleType("mulligan")  # without torch it starts in no time
bare.__path__ = [{root!r} + "/mulligan"]
from mulligan.verify import pool as pools
pools.FUNCTIONS["trial"] = "tests.verify.trials:run"
pool = pools.{pool}
pool.run("trial", [dict(what="echo", value=1)])
for what in {jobs}:
    threading.Thread(target=pool.run, args=("trial", [dict(what=what)]), daemon=True).start()
deadline = time.monotonic() + 20
while len(pool._alive) < {workers} and time.monotonic() < deadline:
    time.sleep(0.02)
time.sleep(0.3)
print(*[worker._process.pid for worker in pool._alive], flush=True)
{then}
"""


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "exit", "exception"])
def test_no_worker_outlives_its_parent(end):
    then = {"exit": "sys.exit(0)", "exception": "raise ValueError"}.get(end, "time.sleep(60)")
    source = "Pool(2, deadline=30)" if end != "exit" else "shared_pool()"
    jobs = ["spin", "spin_in_c"] if end.startswith("SIG") else []
    script = PARENT.format(root=str(ROOT), pool=source, jobs=jobs, then=then, workers=1 + len(jobs))
    environment = os.environ | {pools.WORKERS_VARIABLE: "2"}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        if end.startswith("SIG"):
            assert len(pids) >= 2 and all(map(is_there, pids))
            parent.send_signal(signal.Signals[end])
        parent.wait(30)
    assert wait_until(lambda: not any(map(is_there, pids))), f"left behind: {pids}"


def test_a_worker_busy_in_python_ends_when_its_channel_closes(trial_function):
    """What ends it where the kernel does not tie it to its parent."""
    with Pool(1, deadline=60) as pool:
        one(pool, "echo", value=1)
        worker = pool._take("trial", fresh=False)
        worker._channel.settimeout(1)
        worker._channel.sendall(pools.frame({"job": 1, "arguments": {"what": "spin"}}))
        time.sleep(0.2)
        assert worker.is_alive()
        worker._channel.close()
        assert wait_until(lambda: not worker.is_alive(), 3)
        pool._put_back(worker, False)
