"""Errors of the CUDA kernels on random inputs, compared with PyTorch's own arithmetic in the same precision."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from gpu_checks import random_problems, rows
from gpu_checks.problems import PRECISIONS, Machine

SECONDS = 25
PROBLEMS = 400


@pytest.mark.limit(60)  # the first problems compile
@pytest.mark.parametrize("rank", random_problems.WINDOWS)
def test_errors_are_those_of_pytorch(machine: Machine, rank: int, tmp_path: Path):
    count = random_problems.each_case_once(rank) if machine.is_rehearsal else PROBLEMS
    until = time.monotonic() + (1e9 if machine.is_rehearsal else SECONDS)
    random_problems.check_rank(rows.Writer(tmp_path, "random"), machine, rank, count, until)
    found = [row for row in rows.read(tmp_path) if row.verdict != "open"]
    assert {row.verdict for row in found} == {"passed"}, found
    assert len(found) == len(PRECISIONS)
