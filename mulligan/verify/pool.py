"""Killable worker processes for what must not run in the user's own: comparing a model's text with sympy's help.

The parent's side. A deadline is kept by killing the worker's process group, never by a signal in the user's process, so
it holds off the main thread and in code that never returns to Python. The worker's side is ``worker.py``.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mulligan.errors import UserError, nearest
from mulligan.verify.judge import quick
from mulligan.verify.judgement import Judgement
from mulligan.verify.worker import FUNCTIONS, frame, read_frame

WORKERS_VARIABLE = "MULLIGAN_VERIFIER_WORKERS"
MOST_WORKERS = 8  # by default
FIRST_SHARE = 0.6  # of the deadline for the first attempt; the rest is the second's
IN_TIME = 0.98  # of the deadline are used, so that it holds although a thread wakes up late
START_TRIES = 5
START_SECONDS = 120.0  # a worker is ready within one; this is for a machine that is loaded beyond measure
LONGEST_ANSWER = 2**24  # bytes of a worker's answer; ours are a few hundred
IN_FLIGHT = 64  # jobs handed out ahead for each worker, so that one slow answer does not stall those behind it

_PACKAGE = Path(__file__).resolve().parents[1]
_ENVIRONMENT = {
    "HOME": "/nonexistent",
    "LC_ALL": "C.UTF-8",
    "MALLOC_ARENA_MAX": "1",  # each further arena of glibc would take 64 MB of the address space
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONHASHSEED": "0",  # verdicts must not depend on the order of a set
}
_INHERITED = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")  # without which some Pythons do not start


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one job.

    Attributes:
        value: the function's result as JSON; None when there is none: unscorable.
        reason: why there is none, else empty.
        seconds: wall clock in workers, both attempts together; waiting for a worker does not count.
        peak_memory: of the worker in bytes during the job.
    """

    value: Any
    reason: str
    seconds: float
    peak_memory: int


class Pool:
    """Workers that start when they are first needed. Safe to use from many threads at once.

    A job that runs out of time or memory, or whose worker dies, is tried once more on a fresh worker within what is
    left of its deadline; after that it is unscorable. The pool outlives all of it.

    Args:
        workers: processes side by side for each function; by default one a CPU, at most 8, or what the environment's
            MULLIGAN_VERIFIER_WORKERS says. One more waits warm, to step in for one that was killed.
        deadline: seconds of wall clock for one job, from when a worker gets it, the second attempt included.
        memory: bytes of address space of a worker.
        recycle: jobs after which a worker is replaced whatever it weighs; a start costs as much as thousands of jobs.
    """

    def __init__(
        self, workers: int | None = None, *, deadline: float = 5.0, memory: int = 512 * 2**20, recycle: int = 10_000
    ) -> None:
        self.workers = default_workers() if workers is None else workers
        if self.workers < 1 or deadline <= 0 or memory <= 0 or recycle < 1:
            raise UserError(
                "a verifier pool needs at least one worker, one job a worker, and a deadline and memory > 0"
            )
        self.deadline = deadline
        self.memory = memory
        self.recycle = recycle
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._idle: dict[str, list[_Worker]] = {}
        self._spare: dict[str, Future[_Worker]] = {}
        self._alive: set[_Worker] = set()
        # The kernel ends a worker with the *thread* that started it, so only these threads start any: they last.
        self._threads = ThreadPoolExecutor(self.workers, "verifier")
        self._nursery = ThreadPoolExecutor(1, "verifier-spare")
        _pools.add(self)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers. Jobs under way raise RuntimeError where they are waited for."""
        if os.getpid() != self._process:  # a forked child's copy: the workers are the parent's
            return
        with self._lock:
            self._closed = True
            alive = list(self._alive)
        for worker in alive:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        self._nursery.shutdown(cancel_futures=True)
        for worker in alive:  # idle ones; a worker that was at work is ended by its thread
            self._end(worker)

    @property
    def closed(self) -> bool:
        return self._closed

    def grade(self, gold: str, answer: str, *, percent: bool = False) -> Judgement:
        """The verdict on one answer; see `grade_each`."""
        return next(self.grade_each([(gold, answer)], percent=percent))

    def grade_many(self, pairs: Sequence[tuple[str, str]], *, percent: bool = False) -> list[Judgement]:
        """The verdicts on pairs of gold and answer, in order; see `grade_each`."""
        return list(self.grade_each(pairs, percent=percent))

    def grade_each(self, pairs: Iterable[tuple[str, str]], *, percent: bool = False) -> Iterator[Judgement]:
        """The verdicts on pairs of gold and answer, in order and as they come.

        What can be told at sight is told in the calling thread; the rest goes to the workers, side by side.

        Args:
            percent: the task says that its answers are percentages, so that ``10%`` and ``10`` are the same.

        Raises:
            UserError: workers do not start at all.
        """

        self._must_be_usable()

        def hand_out(pair: tuple[str, str]) -> Judgement | Future[Outcome]:
            gold, answer = pair
            begun = time.monotonic()
            try:
                told = quick(gold, answer, percent=percent)
            except Exception:  # a text that no rule foresaw must not end a run; in a worker it is unscorable
                told = None
            if told is not None:
                return Judgement(told.verdict, told.reason, time.monotonic() - begun)
            return self._submit("judge", {"gold": gold, "answer": answer, "percent": percent})

        for found in _ahead(map(hand_out, pairs), IN_FLIGHT * self.workers):
            yield _judgement(found) if isinstance(found, Outcome) else found

    def run(self, function: str, arguments: Sequence[Mapping[str, Any]]) -> list[Outcome]:
        """A function of the workers' fixed table, once for each set of keyword arguments, side by side, in order.

        Args:
            function: a name in `worker.FUNCTIONS`.
            arguments: JSON objects.

        Raises:
            UserError: no such function, or workers do not start at all.
        """
        if function not in FUNCTIONS:
            raise UserError(f"verifier function '{function}' is unknown{nearest(function, FUNCTIONS)}")
        jobs = (self._submit(function, keywords) for keywords in arguments)
        return list(_ahead(jobs, IN_FLIGHT * self.workers))

    def _submit(self, function: str, keywords: Mapping[str, Any]) -> Future[Outcome]:
        self._must_be_usable()
        return self._threads.submit(self._do, function, dict(keywords))

    def _must_be_usable(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("this verifier pool belongs to the parent process; ask for shared_pool() after a fork")
        if self._closed:
            raise RuntimeError("this verifier pool is closed")

    def _do(self, function: str, keywords: dict[str, Any]) -> Outcome:
        """One job, in one of the pool's threads: two attempts at most."""
        spent, peak, answer = 0.0, 0, {}
        for attempt, share in enumerate((FIRST_SHARE, 1.0)):
            worker = self._take(function, fresh=attempt > 0)
            keep = False
            begun = time.monotonic()
            try:
                answer = worker.ask(keywords, share * (IN_TIME * self.deadline - spent))
                keep = not answer.get("again")
            except TimeoutError:
                answer = {"failure": f"out of time ({self.deadline:g} s)", "again": True}
            except (OSError, EOFError, ValueError):  # it died, or what it sent is no answer
                answer = {"failure": f"the worker died ({worker.cause_of_death()})", "again": True}
            finally:  # whatever else is raised, a worker in an unknown state is not used again
                spent += time.monotonic() - begun
                self._put_back(worker, keep)
            peak = max(peak, worker.peak_memory)
            if not answer.get("again"):
                break
        return Outcome(answer.get("value"), answer.get("failure", ""), spent, peak)

    def _take(self, function: str, *, fresh: bool) -> _Worker:
        """A worker that is ready: an idle one unless it has to be fresh, the spare one, or a new one."""
        while True:
            with self._lock:
                idle = self._idle.setdefault(function, [])
                worker = idle.pop() if idle and not fresh else None
                spare = None if worker else self._spare.pop(function, None)
            if spare is not None and not spare.cancel():  # it waits behind another: starting one here is sooner
                with contextlib.suppress(UserError, RuntimeError, CancelledError):
                    worker = spare.result()
            started = worker is None
            if worker is None:
                worker = self._start(function)
            self._have_a_spare(function)
            if started or worker.is_alive():  # those that waited may have died meanwhile
                return worker
            self._end(worker)

    def _have_a_spare(self, function: str) -> None:
        with self._lock:
            if function not in self._spare and not self._closed:
                self._spare[function] = self._nursery.submit(self._start, function)

    def _put_back(self, worker: _Worker, keep: bool) -> None:
        worker.measure()
        if keep and worker.jobs < self.recycle and not worker.refused and not worker.has_grown():
            with self._lock:
                if not self._closed:
                    self._idle.setdefault(worker.function, []).append(worker)
                    return
        self._end(worker)

    def _start(self, function: str) -> _Worker:
        """A new worker, ready. Tried a few times, never for ever.

        Raises:
            UserError: it does not start.
        """
        reason = ""
        for attempt in range(START_TRIES):
            time.sleep(0.1 * attempt)
            try:
                worker = _Worker(function, self.memory)
            except OSError as error:  # no memory or no process left, perhaps for the moment
                reason = str(error)
                continue
            with self._lock:
                self._alive.add(worker)
                closed = self._closed
            if not closed:
                try:
                    worker.wait_until_ready(START_SECONDS)
                    return worker
                except UserError:
                    self._end(worker)
                    raise
                except TimeoutError:
                    self._end(worker)
                    raise UserError(f"the verifier's worker is not ready after {START_SECONDS:g} s") from None
                except (OSError, EOFError, ValueError):
                    reason = f"it died at once ({worker.cause_of_death()})"
            self._end(worker)
            if self._closed:
                raise RuntimeError("this verifier pool is closed")
        raise UserError(f"the verifier's worker does not start: {reason}")

    def _end(self, worker: _Worker) -> None:
        worker.end()
        with self._lock:
            self._alive.discard(worker)


class _Worker:
    """One process. Only the thread that holds it talks to it; any thread may `kill` it.

    Attributes:
        jobs: how many it was given.
        refused: what its sandbox refused in the last job; it may have left a library half set up.
        peak_memory: bytes, of the last job.
    """

    def __init__(self, function: str, memory: int) -> None:
        self.function = function
        self.memory = memory
        self.jobs = 0
        self.refused: list[str] = []
        self.peak_memory = 0
        self.layers: list[str] = []
        self._resident = self._resident_when_ready = 0
        self._lock = threading.Lock()
        self._channel, theirs = socket.socketpair()
        try:
            with theirs:
                script = str(_PACKAGE / "verify" / "worker.py")
                self._process = subprocess.Popen(
                    # -P: the folder of a script goes into the path of modules, and this one's must not.
                    [sys.executable, "-P", "-u", script, str(theirs.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    cwd="/",
                    env={key: os.environ[key] for key in _INHERITED if key in os.environ} | _ENVIRONMENT,
                    start_new_session=True,  # Ctrl-C at the terminal is not for it
                )
        except BaseException:
            self._channel.close()
            raise

    def wait_until_ready(self, seconds: float) -> None:
        """Raises UserError when it says why it cannot be, TimeoutError, EOFError, OSError or ValueError otherwise."""
        # Packages are found where the parent finds them, but never in the folder that it happens to stand in.
        path = [entry for entry in sys.path if Path(entry).is_absolute()]
        order = {"path": path, "package": str(_PACKAGE), "function": FUNCTIONS[self.function], "memory": self.memory}
        answer = self._exchange(order, seconds)
        if "error" in answer:
            raise UserError(f"the verifier's worker does not start: {answer['error']}")
        self.layers = answer["layers"]
        self.measure()
        self._resident_when_ready = self._resident

    def ask(self, keywords: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The answer to one job: ``value``, or ``failure`` and ``again``.

        Raises:
            TimeoutError: no answer in time.
            OSError, EOFError, ValueError: it died, or sent what is no answer.
        """
        self.jobs += 1
        self.peak_memory = 0
        with contextlib.suppress(OSError):
            Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")  # the peak starts anew
        answer = self._exchange({"job": self.jobs, "arguments": keywords}, seconds)
        if answer.get("job") != self.jobs or ("value" in answer) == ("failure" in answer):
            raise ValueError("this is no answer to the job")
        self.refused = answer["refused"]
        if sys.platform != "linux":
            self.peak_memory = answer["peak_memory"]
        return answer

    def _exchange(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        until = time.monotonic() + seconds

        def read(size: int) -> bytes:
            left = until - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._channel.settimeout(left)
            return self._channel.recv(size)

        self._channel.settimeout(seconds)
        self._channel.sendall(frame(message))
        answer = read_frame(read, LONGEST_ANSWER)
        if not isinstance(answer, dict):
            raise ValueError("this is no answer")
        return answer

    def measure(self) -> None:
        """Read its memory from the kernel, which a worker that hangs or lies cannot prevent (Linux)."""
        try:
            text = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:
            return
        sizes = dict(_SIZES.findall(text))  # none of a process that is dead already
        self.peak_memory = max(self.peak_memory, 1024 * int(sizes.get("VmHWM", 0)))
        self._resident = 1024 * int(sizes.get("VmRSS", 0))

    def has_grown(self) -> bool:
        """Whether it keeps more than half of what it had free when it was ready."""
        return self._resident > (self._resident_when_ready + self.memory) / 2

    def is_alive(self) -> bool:
        return not self._reap(wait=False)

    def cause_of_death(self) -> str:
        """``SIGSEGV`` or ``exit code 1``; ends it where it lives on after all."""
        for _ in range(20):  # its socket closes a moment before its process ends
            if self._reap(wait=False):
                break
            time.sleep(0.01)
        else:
            self.kill()
            self._reap(wait=True)
            return "it sent what is no answer"
        code = self._process.returncode
        if code >= 0:
            return f"exit code {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"

    def kill(self) -> None:
        with self._lock:
            if self._process.returncode is None:
                # A stranger may have reaped it (a SIGCHLD handler of the user's); then there is nobody to kill.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        self.kill()
        self._reap(wait=True)
        self._channel.close()

    def _reap(self, *, wait: bool) -> bool:
        """Whether it is dead. Not Popen's own wait, which does not tell how much memory it took."""
        with self._lock:
            if self._process.returncode is not None:
                return True
            try:
                pid, status, usage = os.wait4(self._process.pid, 0 if wait else os.WNOHANG)
            except ChildProcessError:
                self._process.returncode = 0
                return True
            if pid == 0:
                return False
            self._process.returncode = os.waitstatus_to_exitcode(status)
            if sys.platform == "linux" and -self._process.returncode != signal.SIGKILL:
                # It may count the parent's own peak too, hence the bound.
                self.peak_memory = max(self.peak_memory, min(1024 * usage.ru_maxrss, self.memory))
            return True


_SIZES = re.compile(r"^(VmHWM|VmRSS):\s+(\d+) kB$", re.MULTILINE)


def _ahead(started: Iterable[Any], limit: int) -> Iterator[Any]:
    """Results and futures in order, the futures awaited; never more than ``limit`` are started ahead."""
    waiting: deque[Any] = deque()
    source = iter(started)
    try:
        while True:
            while len(waiting) < limit and (item := next(source, None)) is not None:
                waiting.append(item)
            if not waiting:
                return
            item = waiting.popleft()
            yield item.result() if isinstance(item, Future) else item
    finally:  # after Ctrl-C, for example: what no worker has begun is dropped
        for item in waiting:
            if isinstance(item, Future):
                item.cancel()


def _judgement(outcome: Outcome) -> Judgement:
    told = outcome.value
    if told is None:
        return Judgement("unscorable", outcome.reason, outcome.seconds, outcome.peak_memory)
    return Judgement(told["verdict"], told["reason"], outcome.seconds, outcome.peak_memory)


def default_workers() -> int:
    """What MULLIGAN_VERIFIER_WORKERS says, else one a CPU that this process may use, at most 8.

    Raises:
        UserError: the variable is no number from 1.
    """
    told = os.environ.get(WORKERS_VARIABLE)
    if told is not None:
        if not re.fullmatch(r"0*[1-9][0-9]{0,3}", told):
            raise UserError(f"{WORKERS_VARIABLE}: '{told}' must be a number from 1")
        return int(told)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, available)


def shared_pool() -> Pool:
    """This process's own pool, made at the first call and closed at exit. A forked child gets one of its own."""
    global _shared
    with _shared_lock:
        if _shared is None or _shared.closed:
            _shared = Pool()
        return _shared


_shared: Pool | None = None
_shared_lock = threading.Lock()
_pools: weakref.WeakSet[Pool] = weakref.WeakSet()


def _after_fork() -> None:
    """In the child: the parent's workers stay the parent's, and a lock may be held by a thread that is not here."""
    global _shared, _shared_lock
    _shared = None
    _shared_lock = threading.Lock()


@atexit.register
def _close_all() -> None:
    for pool in list(_pools):
        pool.close()


os.register_at_fork(after_in_child=_after_fork)
