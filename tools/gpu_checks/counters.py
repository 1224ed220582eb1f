"""Hardware counters of the three kernels of NAT-Tiny's first stage, read by Nsight Compute (ncu)."""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

from gpu_checks.problems import CUDA, REHEARSAL, Machine, make_inputs, run_step
from gpu_checks.rows import Writer

_METRICS = {
    "gpu__time_duration.sum": "time",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum": "shared-memory wavefronts",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue slots used",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "lts__t_bytes.sum": "L2 traffic",
    "dram__bytes.sum": "DRAM traffic",
}
_CODE = "from gpu_checks import counters; from gpu_checks.problems import CUDA; counters.stage(CUDA)"


def stage(where: Machine) -> None:
    """Run forward and backward of the first stage, at batch 128, twice."""
    shape = (1, (9, 9), 2, 8, 3) if where == REHEARSAL else (128, (56, 56), 2, 32, 7)
    qkv, rpb = make_inputs(where, *shape)
    for _ in range(2):
        run_step(qkv, rpb, where.backend, shape[4])


def run(writer: Writer, is_rehearsal: bool) -> None:
    """Add a row per kernel and counter."""
    if is_rehearsal:
        stage(REHEARSAL)
        writer.open("NAT-Tiny, stage 1", "the calls ran on the CPU, without counters")
        return
    if not shutil.which("ncu"):
        writer.open("NAT-Tiny, stage 1", "ncu is not installed")
        return
    command = [
        "ncu",
        "--clock-control",
        "none",
        "--csv",
        "--print-units",
        "base",
        "--kernel-name",
        "regex:natten_.*tiles",
    ]
    command += ["--launch-skip", "3", "--launch-count", "3", "--metrics", ",".join(_METRICS)]
    environment = os.environ | {"NATTEN_SELF_CHECK": "0"}
    done = subprocess.run([*command, sys.executable, "-c", _CODE], env=environment, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    found = list(parse(done.stdout))
    for kernel, what, value in found:
        writer.measured(f"{kernel}, {what}", value)
    if not found:
        writer.open(
            "NAT-Tiny, stage 1", f"ncu ended with status {done.returncode}: {_error(done.stdout + done.stderr)}"
        )


def _error(output: str) -> str:
    lines = [line for line in output.splitlines() if "ERR" in line or "rror" in line]
    return (lines or output.splitlines() or ["no output"])[-1][:200]


def parse(output: str) -> Iterator[tuple[str, str, str]]:
    """Yield kernel, counter and value with its unit from the CSV that ncu prints after other lines."""
    start = output.find('"ID"')
    for row in csv.DictReader(io.StringIO(output[start:])) if start >= 0 else ():
        name = _METRICS.get(row["Metric Name"])
        if name:
            yield row["Kernel Name"].removeprefix("natten_"), name, f"{row['Metric Value']} {row['Metric Unit']}"


if __name__ == "__main__":
    stage(CUDA)
