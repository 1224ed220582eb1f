"""Measure the peak memory of a call, beyond what was allocated before it.

On a CPU each call is measured in a new process, since a process keeps freed memory and reuses it unseen.
"""

from __future__ import annotations

import ctypes
import gc
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from benchmarks.entry import Entry, Subject

_STATUS = Path("/proc/self/status")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def gpu_peak_mb(entry: Entry, subject: Subject) -> float:
    """Return the MB (1e6 bytes) that a call adds to the memory allocated on its GPU."""
    torch.cuda.synchronize(entry.device)
    before = torch.cuda.memory_allocated(entry.device)
    torch.cuda.reset_peak_memory_stats(entry.device)
    subject.run(entry)
    return (torch.cuda.max_memory_allocated(entry.device) - before) / 1e6


def peak_mb(entry: Entry, make: Callable[[Entry], Subject]) -> float:
    """Return the MB (1e6 bytes) that the first call of an entry adds to this process, or to its GPU.

    The same entry with batch size 1 runs first, so that libraries loaded on first use do not count.
    """
    torch.set_num_threads(entry.setting.threads)
    _return_large_blocks()
    warm_up = entry._replace(case=re.sub(r"b\d+_", "b1_", entry.case, count=1))
    make(warm_up).run(warm_up)
    subject = make(entry)
    if entry.device.type == "cuda":
        subject.run(entry)
        return gpu_peak_mb(entry, subject)
    _return_freed_memory()
    with suppress(OSError):  # resets VmHWM, where the system permits it
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes("VmRSS")
    subject.run(entry)
    return (_resident_bytes("VmHWM") - before) / 1e6


def peak_mb_in_new_process(entry: Entry, script: str) -> float:
    """Return `peak_mb` as measured by the subcommand `memory` of the script.

    Raises:
        RuntimeError: if the process failed, with its last line of output.
    """
    setting = [f"--{name}={value}" for name, value in entry.setting._asdict().items()]
    words = (entry.kind, entry.case, entry.provider, entry.pass_name)
    done = subprocess.run([sys.executable, script, "memory", *words, *setting], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {entry} cannot be measured: {(done.stderr.splitlines() or ['?'])[-1]}")
    return float(done.stdout.split()[-2])


def keep_freed_memory() -> None:
    """Make glibc keep freed memory, so that no timed call pays for getting it from the system again."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_MMAP_THRESHOLD, 2**30)


def _return_large_blocks() -> None:
    """Make glibc return each large block to the system when it is freed, so that no later call reuses it unseen."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)


def _return_freed_memory() -> None:
    """Return freed memory to the system, where the C library can."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes(field: str) -> int:
    """Return the resident memory now (VmRSS) or at its peak (VmHWM).

    On Linux ru_maxrss would start with the peak of the parent process.
    """
    if _STATUS.is_file():
        return int(re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())[1]) * 1024
    import resource  # not available on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
