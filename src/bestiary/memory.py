"""This process's memory: its peak, and how the C library reuses what tensors have freed."""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

MIB = 2**20

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux only


@dataclass(frozen=True)
class PeakMemory:
    """The most memory held at once since the process started, or since `reset_peak_memory`. In MiB."""

    process_mib: float  # resident memory of the process, and of the child processes that the caller counts
    device_mib: float | None  # tensors on the current CUDA device; None when this process uses none


def peak_memory(child_processes: int = 0) -> PeakMemory:
    """Return the peak memory of this process and of its current CUDA device.

    `child_processes` is the number of child processes that ran at once. Each counts with the peak of the largest
    child that has ended, so the sum is an upper bound.

    >>> peak = peak_memory()
    >>> peak.process_mib > 1
    True
    """
    peak = _process_mib() + (child_processes * _largest_child_mib() if child_processes else 0.0)
    torch = _torch_on_cuda()
    return PeakMemory(peak, torch.cuda.max_memory_allocated() / MIB if torch else None)


def reset_peak_memory() -> None:
    """Make the next `peak_memory` count from now on.

    Outside Linux the system cannot reset a process's peak: there `process_mib` still counts from the process's start.
    """
    if torch := _torch_on_cuda():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5", encoding="utf-8")  # man 5 proc: resets VmHWM


def keep_freed_memory() -> None:
    """Let tensors reuse the memory of freed tensors, in this thread and in threads that start later.

    This affects glibc only. By default glibc returns large blocks to the system, and the system clears every page again
    for the next tensor of that size: with Stable Diffusion's tensors this costs a tenth of a training step and a fifth
    of decoding (docs/decisions.md). A thread's own arena cannot hold blocks that large, so all threads share the main
    arena.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1)):
            mallopt(option, value)


def _process_mib() -> float:
    # Linux's own figure first: getrusage's peak survives fork and exec, so a small process would report its parent's.
    status = _STATUS.read_text(encoding="utf-8") if _STATUS.is_file() else ""
    if found := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
        return int(found[1]) / 1024
    import resource  # not on Windows

    return _mib(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _largest_child_mib() -> float:
    import resource  # not on Windows

    return _mib(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def _mib(maxrss: int) -> float:
    return maxrss / (MIB if sys.platform == "darwin" else 1024)  # macOS reports bytes, Linux KiB


def _torch_on_cuda() -> ModuleType | None:
    """The torch module if this process has already used CUDA: measuring must neither import torch nor start CUDA."""
    torch = sys.modules.get("torch")
    return torch if torch and torch.cuda.is_initialized() else None
