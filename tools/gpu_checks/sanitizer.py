"""compute-sanitizer finds no invalid memory access (memcheck) and no race (racecheck) in the kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from gpu_checks.problems import REHEARSAL, small_calls
from gpu_checks.rows import Writer

_CODE = "from gpu_checks.problems import CUDA, small_calls; small_calls(CUDA)"
# Without PyTorch's cache of memory, each tensor has its own allocation, beyond which an access is invalid.
_ENVIRONMENT = {"NATTEN_SELF_CHECK": "0", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def run(writer: Writer, is_rehearsal: bool) -> None:
    """Run the tool that is named like the part."""
    if is_rehearsal:
        small_calls(REHEARSAL)
        writer.open("small calls", "they ran on the CPU, without compute-sanitizer")
        return
    if not shutil.which("compute-sanitizer"):
        writer.open("small calls", "compute-sanitizer is not installed")
        return
    # A process that loads only natten, because the tool checks the kernels of all loaded libraries.
    command = ["compute-sanitizer", "--tool", writer.part, "--error-exitcode", "9", "--kernel-name", "kns=natten_"]
    done = subprocess.run(
        [*command, sys.executable, "-c", _CODE],
        env=os.environ | _ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    summaries = [line.strip("= ") for line in done.stdout.splitlines() if "SUMMARY" in line]
    writer.checked("small calls", done.returncode == 0, summaries[-1] if summaries else f"status {done.returncode}")
