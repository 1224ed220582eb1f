"""compute-sanitizer finds no invalid memory access and no race in the CUDA kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpu.problems import REHEARSAL, small_calls

TESTS = Path(__file__).parents[1]


@pytest.mark.gpu
@pytest.mark.limit(55)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_small_calls(tool: str):
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not installed")
    # A separate process that loads only natten, because the tool checks the kernels of all loaded libraries.
    code = "from gpu.problems import CUDA, small_calls; small_calls(CUDA)"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]


def test_rehearsal():
    small_calls(REHEARSAL)
