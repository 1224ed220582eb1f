"""How much memory a call takes at its peak, beyond what was there before.

It is measured in a fresh process: what was freed may stay with an older one, and be used again unseen.
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


def peak_mb(entry: Entry, make: Callable[[Entry], Subject]) -> float:
    """MB (1e6 bytes) that the first call of an entry adds to this process, or to the memory of its GPU.

    The same with a batch of one runs before, so that libraries which are loaded on first use do not count.
    """
    torch.set_num_threads(entry.setting.threads)
    _give_back_what_is_freed()
    make(entry._replace(case=re.sub(r"b\d+_", "b1_", entry.case, count=1))).run()
    subject = make(entry)
    _return_freed_memory()
    if entry.device.type == "cuda":
        before = torch.cuda.memory_allocated(entry.device)
        torch.cuda.reset_peak_memory_stats(entry.device)
        subject.run()
        return (torch.cuda.max_memory_allocated(entry.device) - before) / 1e6
    with suppress(OSError):  # lets the peak begin here, where the system allows it
        Path("/proc/self/clear_refs").write_text("5")
    before = _resident_bytes("VmRSS")
    subject.run()
    return (_resident_bytes("VmHWM") - before) / 1e6


def peak_mb_in_fresh_process(entry: Entry, script: str) -> float:
    """The same, by the subcommand `memory` of the script.

    Raises:
        RuntimeError: with the last line of what it said, if that fails.
    """
    setting = [f"--{name}={value}" for name, value in entry.setting._asdict().items()]
    words = (entry.kind, entry.case, entry.provider, entry.pass_name)
    done = subprocess.run([sys.executable, script, "memory", *words, *setting], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {entry} could not be measured: {(done.stderr.splitlines() or ['?'])[-1]}")
    return float(done.stdout.split()[-2])


def keep_freed_memory() -> None:
    """Lets the C library (glibc) keep what is freed, so that no call is charged with getting the same memory again.

    As it is, large results are given back and fetched anew from call to call, by chance of what lies beside them.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_MMAP_THRESHOLD, 2**30)


def _give_back_what_is_freed() -> None:
    """Lets the C library (glibc) take large blocks from the system one by one, and give each back when it is freed.

    Else what an earlier call left behind is used again, and hides a part of what this one takes.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)


def _return_freed_memory() -> None:
    """Gives what was freed back to the system, where the C library can."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident_bytes(field: str) -> int:
    """Resident memory now (VmRSS) or at its peak (VmHWM).

    Not ru_maxrss where there is another way: on Linux that begins with the peak of the process that started this one.
    """
    if _STATUS.is_file():
        return int(re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text())[1]) * 1024
    import resource  # which Windows does not have

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
