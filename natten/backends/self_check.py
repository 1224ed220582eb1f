"""Check the compiled kernels on this machine: run a small problem per kernel family and compare it to the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal, NamedTuple

import torch

from natten.backends import cpu, cuda
from natten.backends.cuda import first_use
from natten.backends.families import Family, Verdict, check, families
from natten.backends.kernels import Unsupported

MODULES = {"cpu": cpu, "cuda": cuda}


class CheckRow(NamedTuple):
    """The result of checking one kernel family.

    Attributes:
        name: the pass, the precision, and whether the kernels use matrix instructions.
        verdict: "unavailable" if the kernels cannot run here.
        detail: why the verdict is not "passed"; else empty.
        largest_error: the largest error relative to the largest number of a result; None if there are no results.
        seconds: duration of the check, including compilation.
    """

    name: str
    verdict: Literal["passed", "failed", "unavailable"]
    detail: str
    largest_error: float | None
    seconds: float


def run_self_check(backend: str, device: torch.device | str | None = None) -> list[CheckRow]:
    """Run a small problem for each kernel family of a backend and compare its results with those of the reference.

    Args:
        backend: "cpu" or "cuda".
        device: where to run; by default the CPU or the current GPU.

    Returns:
        One row per family, or a single row if the backend is not available.

    Raises:
        ValueError: if the backend is unknown.
    """
    if backend not in MODULES:
        raise ValueError(f"backend={backend!r} has no kernels to check; use one of {', '.join(map(repr, MODULES))}.")
    module = MODULES[backend]
    if device is None and backend == "cuda" and not torch.cuda.is_available():
        return [CheckRow(backend, "unavailable", "PyTorch finds no CUDA device", None, 0.0)]
    if device is None:
        device = torch.device("cuda", torch.cuda.current_device()) if backend == "cuda" else "cpu"
    device = torch.device(device)
    reason = module.unsupported_reason(torch.empty(1, 1, 1, 8, device=device))
    if reason is not None:
        return [CheckRow(backend, "unavailable", reason, None, 0.0)]
    if backend == "cpu":
        return [_row(family, partial(check, cpu.KERNELS, family, device)) for family in families()]
    rows: list[CheckRow] = []
    found = [*families(), *cuda.matrix_families(device)]
    for family in found:
        with _tf32_products() if family.precision == "tf32" else nullcontext():
            # Checks again, whatever the stored verdict is, and stores the new one.
            rows.append(_row(family, partial(first_use.check, family, device, cuda.KERNELS)))
    return rows


def _row(family: Family, run: Callable[[], Verdict]) -> CheckRow:
    started = time.perf_counter()
    try:
        verdict = run()
    except (Unsupported, RuntimeError) as failure:
        verdict = Verdict(str(failure))
    seconds = time.perf_counter() - started
    if verdict.problem is not None:
        return CheckRow(str(family), "failed", verdict.problem, verdict.error, seconds)
    return CheckRow(str(family), "passed", "", verdict.error, seconds)


@contextmanager
def _tf32_products() -> Iterator[None]:
    """Allow TF32 in float32 matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
