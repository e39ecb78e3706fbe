"""What a verifier's worker may not do once it is warm: it computes and answers on one socket, and no more.

Three layers, because no single one is everywhere: resource limits (any Unix), an audit hook of Python (any platform,
but code that escapes from Python escapes from it) and a seccomp filter of system calls (Linux on x86_64 and aarch64,
where the surroundings permit it). The filter lists what is allowed; everything else fails with EPERM.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any

CHANNEL = 3  # the file descriptor of the socket; 0, 1 and 2 are /dev/null
CPU_SECONDS = 600  # of one worker's whole life, for a stuck one whose parent is gone and that nothing else can end

# Audit events that computing raises by itself. Any other event is refused, those of later Pythons included.
_ALLOWED_EVENTS = frozenset(
    {
        "array.__new__",
        "builtins.id",
        "code.__new__",  # compile and exec: sympy's parser and lambdify are built on them, hence the sandbox
        "compile",
        "exec",
        "function.__new__",
        "object.__delattr__",
        "object.__getattr__",
        "object.__setattr__",
        "sys._getframe",
        "sys._getframemodulename",
        "sys.excepthook",
        "sys.unraisablehook",
        "time.sleep",
    }
)

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_SECCOMP = {"x86_64": 317, "aarch64": 277}
# System calls of a process that computes, reads and writes what is open already, waits and ends.
_ALLOWED_CALLS: dict[str, tuple[int, int]] = {  # name: (x86_64, aarch64)
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "close": (3, 57),
    "fstat": (5, 80),
    "lseek": (8, 62),
    "poll": (7, 73),  # aarch64 has ppoll alone
    "ppoll": (271, 73),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "sched_yield": (24, 124),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getrandom": (318, 278),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "exit": (60, 93),
    "exit_group": (231, 94),
}

_SECCOMP_SET_MODE_FILTER = 1
_SECCOMP_FILTER_FLAG_TSYNC = 1
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38

refused: list[str] = []  # the audit events that were refused since the worker last looked


def layers() -> list[str]:
    """The layers that `lock` will have on this machine, in the order in which they are put on; for reports."""
    return ["rlimits", *(["seccomp"] if _seccomp_is_there() else []), "audit"]


def die_with_parent(parent: int) -> None:
    """Have the kernel end this process when its parent ends, where the kernel can (Linux).

    Args:
        parent: process id of the parent; when it is gone already, this process ends here.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (signal.SIGKILL, 0, 0, 0)))
    if os.getppid() != parent:  # it ended before the line above
        os._exit(0)


def lock(memory: int) -> list[str]:
    """Close this process in, for good and for all its threads. What it needs must be imported and open by now.

    Args:
        memory: bytes of address space. Beyond it an allocation fails (on macOS the kernel does not hold to it).

    Returns:
        The layers that are on.
    """
    seccomp = _Seccomp() if _seccomp_is_there() else None  # ctypes loads its libraries before the hook forbids it
    _limit("RLIMIT_AS", memory)
    _limit("RLIMIT_CPU", CPU_SECONDS)
    _limit("RLIMIT_FSIZE", 0)
    _limit("RLIMIT_CORE", 0)
    _limit("RLIMIT_NPROC", 0)
    _limit("RLIMIT_NOFILE", CHANNEL + 1)  # all numbers below are taken: nothing can be opened any more
    on = ["rlimits"]
    if seccomp is not None and seccomp.install():
        on.append("seccomp")
    sys.addaudithook(_audit)
    return [*on, "audit"]


def _limit(name: str, value: int) -> None:
    which = getattr(resource, name, None)
    if which is None:
        return
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    try:
        resource.setrlimit(which, (value, value))
    except (OSError, ValueError):  # macOS refuses RLIMIT_AS below what is mapped; the worker's watcher stands in
        if sys.platform == "linux":
            raise


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _ALLOWED_EVENTS:
        return
    if event == "import":  # libraries that try an optional package expect this error, and no other
        refused.append(f"import {arguments[0]}")
        raise ImportError(f"{arguments[0]} was not imported before the verifier's worker was closed in")
    refused.append(event)
    raise PermissionError(errno.EPERM, f"'{event}' is refused in the verifier's worker")


def _seccomp_is_there() -> bool:
    """Asks the kernel to read a filter at address 0: where filters exist it complains of the address."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _SECCOMP or struct.calcsize("P") != 8:
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(ctypes.c_long(_SECCOMP[machine]), ctypes.c_long(_SECCOMP_SET_MODE_FILTER), ctypes.c_long(0), None)
    return ctypes.get_errno() in (errno.EFAULT, errno.EACCES)


class _Seccomp:
    """A filter program in the kernel's classic BPF (struct sock_filter: code, jump if true, jump if false, operand)."""

    def __init__(self) -> None:
        machine = platform.machine()
        self.number = _SECCOMP[machine]
        self.libc = ctypes.CDLL(None, use_errno=True)
        column = 0 if machine == "x86_64" else 1
        allowed = [row[column] for row in _ALLOWED_CALLS.values()]
        load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
        kill, fail, allow = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
        program = [
            (load, 0, 0, 4),  # seccomp_data.arch: a number means another call under another architecture
            (equal, 1, 0, _AUDIT_ARCH[machine]),
            (give, 0, 0, kill),
            (load, 0, 0, 0),  # seccomp_data.nr
            *((equal, len(allowed) - at, 0, call) for at, call in enumerate(allowed)),
            (give, 0, 0, fail),
            (give, 0, 0, allow),
        ]
        self.code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
        self.header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(self.code)))

    def install(self) -> bool:
        """Whether the kernel took it, for every thread of this process."""
        if self.libc.prctl(_PR_SET_NO_NEW_PRIVS, *map(ctypes.c_ulong, (1, 0, 0, 0))) != 0:
            return False
        set_filter, all_threads = ctypes.c_long(_SECCOMP_SET_MODE_FILTER), ctypes.c_long(_SECCOMP_FILTER_FLAG_TSYNC)
        return self.libc.syscall(ctypes.c_long(self.number), set_filter, all_threads, self.header) == 0
