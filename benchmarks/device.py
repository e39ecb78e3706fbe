"""The device that a benchmark runs on, and its own limits: waiting for it, memory, matrix products, bandwidth."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

# Dense bfloat16 operations and bytes a second by the makers' data sheets; the first name that is part of a card's own.
SHEETS = {
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 80GB HBM3": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.04e12),
    "A100 80GB PCIe": (312e12, 1.94e12),
    "A100-SXM4-40GB": (312e12, 1.56e12),
    "L40S": (362e12, 0.864e12),
    "RTX 4090": (165e12, 1.01e12),
}


@dataclass(frozen=True)
class Sheet:
    """What the data sheet promises; None: this card's is not known here."""

    name: str
    operations: float | None  # a second, bfloat16, dense
    bandwidth: float | None  # bytes a second


def best_device() -> torch.device:
    """CUDA where there is one, else the CPU: what a run's ``device="auto"`` means."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise(device: torch.device) -> None:
    """Waits for the device, so that a clock reads what was done and not what was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long some work takes, from an idle device to an idle device."""
    synchronise(device)
    begun = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - begun


def peak_memory(work: Callable[[], object], device: torch.device) -> float | None:
    """Bytes that some work needs at most beyond what is there before; None where the system does not say.

    On the CPU this is the whole process, freed memory that it kept included.
    """
    gc.collect()
    if device.type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        synchronise(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins again at what is held now
    except OSError:
        work()
        return None
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def product_rate(dtype: torch.dtype, device: torch.device, size: int = 0, seconds: float = 1.0) -> float:
    """Floating-point operations a second of the fastest square matrix product.

    Args:
        size: of the matrices; 0: the best of some sizes.
        seconds: to go on for; the best of all tries is taken, which is what the device can do undisturbed.
    """
    sizes = [size] if size else [4096, 8192, 16384] if device.type == "cuda" else [512, 1024, 2048]
    return max(_product_rate(n, dtype, device, seconds / len(sizes)) for n in sizes)


def _product_rate(size: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    several = 8 if device.type == "cuda" else 1  # between two waits, so that starting them costs nothing

    def multiply() -> None:
        for _ in range(several):
            torch.mm(a, b, out=out)

    return 2.0 * size**3 * several / _least(multiply, device, seconds)


def copy_bandwidth(device: torch.device, size: int = 0, seconds: float = 0.5) -> float:
    """Bytes a second read and written, by copies of an array far larger than any cache.

    Args:
        size: of the array in bytes; 0: 1 GiB on CUDA, 256 MiB on the CPU.
    """
    size = size or (2**30 if device.type == "cuda" else 2**28)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2.0 * size / _least(lambda: target.copy_(source), device, seconds)


def _least(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while best == float("inf") or time.perf_counter() < end:
        best = min(best, seconds_of(work, device))
    return best


def data_sheet(device: torch.device) -> Sheet:
    """The device's name and what its maker promises."""
    if device.type != "cuda":
        return Sheet("CPU", None, None)
    name = torch.cuda.get_device_name(device)
    operations, bandwidth = next((numbers for part, numbers in SHEETS.items() if part in name), (None, None))
    return Sheet(name, operations, bandwidth)
