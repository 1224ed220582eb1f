"""compute-sanitizer finds no invalid memory access and no race in the CUDA kernels."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from gpu_checks import rows, sanitizer
from gpu_checks.problems import REHEARSAL, small_calls


@pytest.mark.gpu
@pytest.mark.limit(55)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_small_calls(tool: str, tmp_path: Path):
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not installed")
    sanitizer.run(rows.Writer(tmp_path, tool), is_rehearsal=False)
    (row,) = rows.read(tmp_path)
    assert row.verdict == "passed", row.found


def test_rehearsal():
    small_calls(REHEARSAL)
