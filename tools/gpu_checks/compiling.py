"""Compile the kernels of all parts ahead, on all cores, into the cache that the parts use."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context

import torch
from benchmarks import gpu as benchmark_gpu
from benchmarks import ops

from gpu_checks import random_problems
from gpu_checks.problems import FUSED, float32_products, small_kernels
from gpu_checks.rows import Writer
from natten import profiler
from natten.backends.cuda import driver, launches, nvrtc
from natten.backends.cuda.driver import Kernel

_MODEL_MAPS = ((56, 2), (28, 4), (14, 8), (7, 16))  # sides and heads of the stages of nat_tiny at 224 pixels
_DEVICE = "cuda:0"


def run(writer: Writer, is_rehearsal: bool) -> None:
    """Compile all kernels, or a single one for a rehearsal, if NVRTC is installed."""
    try:
        nvrtc.bindings()
    except nvrtc.Unavailable as error:
        writer.open("NVRTC", str(error))
        return
    gpu = profiler.find_gpu("9.0") if is_rehearsal else torch.cuda.get_device_properties(0)
    kernels = sorted(all_kernels(gpu))[: 1 if is_rehearsal else None]
    started, failed = time.monotonic(), Counter()
    compile_one = partial(_compile, capability=(gpu.major, gpu.minor))
    # Processes, because NVRTC compiles one program at a time per process.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for job in as_completed([pool.submit(compile_one, kernel) for kernel in kernels]):
            failed[job.result()] += 1
    writer.measured("kernels", f"{len(kernels)} compiled or found in the cache in {time.monotonic() - started:.0f} s")
    errors = {error: count for error, count in failed.items() if error}
    writer.checked(
        "kernels that do not compile", not errors, f"{sum(errors.values())} {'; '.join(errors)[:300]}".strip()
    )


def all_kernels(gpu) -> set[Kernel]:
    """Return the kernels of the random problems, of compute-sanitizer and of the measurements on a GPU."""
    found = random_problems.kernels(gpu) | small_kernels(gpu)
    shapes = [ops.parse_plain(f"b128_{side}x{side}_h{heads}_d32_k7") for side, heads in _MODEL_MAPS]
    shapes += [shape._replace(batch=1) for shape in shapes]
    settings = [(shape, torch.bfloat16, "highest") for shape in shapes]
    for part in ("ops", "layers"):
        for entry in (entry for group in benchmark_gpu.plan(part, _DEVICE, False) for entry in group):
            products = "high" if entry.setting.dtype == "tf32" else "highest"
            settings.append((ops.parse_plain(entry.case), entry.dtype, products))
    for case, dtype, products in settings:
        found |= _kernels_of(case, dtype, products, gpu)
    return found


def _kernels_of(case: ops.Case, dtype: torch.dtype, products: str, gpu) -> Iterable[Kernel]:
    query = torch.empty(case.batch, *case.space, case.heads, case.head_dim, dtype=dtype, device="meta")
    with float32_products(products):
        steps = [launches(op, query, case.axes, case.has_rpb, gpu) for op in FUSED]
    return {step.kernel for launched in steps for step in launched}


def _compile(kernel: Kernel, capability: tuple[int, int]) -> str:
    """Compile a kernel into the cache. Return the error, or nothing."""
    try:
        driver.machine_codes([kernel], capability)
    except nvrtc.Unavailable as error:
        return str(error)
    return ""
