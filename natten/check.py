"""Report what natten finds on this machine, and check its kernels. Paste the output into a bug report.

    python -m natten.check

Lists the CPU and its level, the library of the CPU kernels and where it comes from, compilers, PyTorch, GPUs and NVRTC.
Then each kernel runs a small problem, and its results are compared with those of the reference. The exit status is 1 if
a kernel fails or the CPU kernels are unavailable.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils import collect_env

import natten
from natten.backends import cache
from natten.backends.cpu import build
from natten.backends.cpu.compiler import find_compilers
from natten.backends.cpu.openmp import find_runtime
from natten.backends.cuda import nvrtc
from natten.backends.self_check import MODULES, CheckRow, run_self_check
from natten.checks import CommandParser

_VARIABLES = re.compile("NATTEN_|NATZOO_|CXX$|OMP_|XDG_CACHE_HOME|CUDA_VISIBLE_DEVICES|ATEN_CPU_CAPABILITY")


def report() -> Iterator[tuple[str, str]]:
    """Yield what natten finds on this machine, as names and values. A name can occur several times."""
    for name, find in _FACTS.items():
        try:
            values = find()
        except Exception as error:  # a report with a gap is better than none
            values = [f"{type(error).__name__}: {error}"]
        for value in values or ["none"]:
            yield name, value


def _cpu() -> Sequence[str]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.*)$", info.read_text(), re.MULTILINE)
        model = found[1] if found else model
    levels = [level for level, needed in build.LEVELS.items() if needed <= build.cpu_flags()]
    return [f"{model}, {os.cpu_count()} cores, level {levels[0] if levels else 'unknown'}"]


def _threads() -> Sequence[str]:
    runtime = find_runtime()
    return [f"{torch.get_num_threads()} by {'the kernels themselves' if runtime is None else runtime.path}"]


def _library() -> Sequence[str]:
    try:
        found = build.find()
    except build.Unavailable as error:
        return [f"unavailable: {error}"]
    return [f"{found.path or 'a temporary file'}, {found.origin}"]


def _devices() -> Sequence[str]:
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [f"{d.name}, capability {d.major}.{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in devices]


def _nvrtc() -> Sequence[str]:
    try:
        return [".".join(map(str, nvrtc.version()))]
    except (nvrtc.Unavailable, ImportError) as error:
        return [f"unavailable: {error}"]


_FACTS: dict[str, Callable[[], Sequence[str]]] = {
    "natten": lambda: [f"{natten.__version__}, {Path(natten.__file__).parent}"],
    "Python": lambda: [f"{platform.python_version()}, {sys.executable}"],
    "system": lambda: [platform.platform()],
    "PyTorch": lambda: [f"{torch.__version__}, CUDA {torch.version.cuda or 'no'}, ROCm {torch.version.hip or 'no'}"],
    "CPU": _cpu,
    "threads": _threads,
    "compiler": lambda: [str(compiler) for compiler in find_compilers()],
    "cache folder": lambda: [str(folder) for folder in cache.folders()],
    "CPU kernels": _library,
    "CUDA device": _devices,
    "CUDA driver": lambda: [collect_env.get_nvidia_driver_version(collect_env.run) or "none"],
    "NVRTC": _nvrtc,
    "variable": lambda: [f"{name}={os.environ[name]}" for name in sorted(os.environ) if _VARIABLES.match(name)],
}


def _describe(row: CheckRow) -> str:
    error = "" if row.largest_error is None else f"error {row.largest_error:.1e}"
    return "  ".join(part for part in (f"{row.verdict}: {row.name}", error, f"{row.seconds:.2f} s", row.detail) if part)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m natten.check` with the given arguments, by default those of the command line."""
    summary = (__doc__ or "").partition("\n")[0]
    CommandParser(prog="python -m natten.check", description=summary).parse_args(argv)
    for name, value in report():
        print(f"{name:14}{value}", flush=True)
    is_well = True
    for backend in MODULES:
        for row in run_self_check(backend):
            print(f"{f'{backend} check':14}{_describe(row)}", flush=True)
            is_well &= row.verdict == "passed" or (row.verdict == "unavailable" and backend != "cpu")
    print(f"{'result':14}{'all that can run here passed' if is_well else 'failed; please report the lines above'}")
    sys.exit(not is_well)


if __name__ == "__main__":
    main()
