"""Errors of the CUDA kernels on random problems, beside those of PyTorch's own arithmetic in the same precision."""

from __future__ import annotations

import time

import torch

from natten import profiler
from natten.backends.cuda import driver
from natten.checks import make_axes

from .check import PRECISIONS, Check, float32_products, kernel_size_of, kernels_of, make_inputs, run_step

RANDOM_PROBLEMS_PER_RANK = 1000


# Windows, by rank: kernel_size, stride, dilation, is_causal; spaces, head_dim. Few, so that little is compiled.
_WINDOWS = {
    1: (((7, 1, 1, False), (64, 33), 32), ((9, 2, 3, True), (40, 61), 24), ((130, 1, 1, False), (300,), 64)),
    2: (
        ((7, 1, 1, False), ((7, 7), (20, 17), (56, 31)), 32),
        (((5, 4), (1, 2), (2, 1), (False, True)), ((23, 19), (12, 40)), 16),
        ((13, 1, 1, False), ((26, 29),), 64),
        ((3, 3, 2, True), ((9, 14),), 128),
    ),
    3: (((3, 1, 1, False), ((6, 7, 9),), 32), (((2, 4, 3), 1, (1, 2, 1), (True, False, False)), ((5, 11, 10),), 40)),
}
_BATCHES = ((1, 4), (2, 2), (4, 1))


def _kernels(cells, gpu) -> set:
    """What problems of all cells launch."""
    kernels, (batch, heads) = set(), _BATCHES[0]  # the others have as many maps, so the same tiles
    for _, window, space, dim, precision, has_rpb in cells:
        dtype, _, products = PRECISIONS[precision]
        query = torch.empty(batch, *space, heads, dim, dtype=dtype, device="meta")
        with float32_products(products):
            kernels |= kernels_of(query, make_axes(space, *window), has_rpb, gpu)
    return kernels


def _compile_ahead(check: Check, cells) -> None:
    """Compiles the kernels of all cells on all cores, where one problem after another would wait for its own."""
    if check.rehearse:
        print(f"{len(_kernels(cells, profiler.find_gpu('9.0')))} kernels would be compiled")
        return
    start, gpu = time.monotonic(), torch.cuda.get_device_properties(0)
    kernels = _kernels(cells, gpu)
    driver.machine_codes(kernels, (gpu.major, gpu.minor))
    check.row("correctness", "compilation", f"{len(kernels)} kernels in {time.monotonic() - start:.0f} s, on all cores")


def random_problems(check: Check, what: str) -> None:
    """Errors, against float64, of ours and of the reference with the same numbers."""
    precisions = ("float32",) if check.rehearse else tuple(PRECISIONS)
    cells = []
    for rank, windows in _WINDOWS.items():
        for window, spaces, dim in windows:
            for space in spaces:
                space = (space,) if isinstance(space, int) else space
                cells += [(rank, window, space, dim, name, has_rpb) for name in precisions for has_rpb in (True, False)]
    _compile_ahead(check, cells)
    errors = {name: [] for name in precisions}
    wrong, count, counts = [], 0, dict.fromkeys(_WINDOWS, 0)
    end = min(check.end - 5, time.monotonic() + (3 if check.rehearse else 80))
    while time.monotonic() < end and min(counts.values()) < RANDOM_PROBLEMS_PER_RANK:
        rank, window, space, dim, name, has_rpb = cells[count * 7 % len(cells)]
        dtype, eps, products = PRECISIONS[name]
        batch, heads = _BATCHES[count // len(cells) % len(_BATCHES)]
        count += 1
        counts[rank] += 1
        shape = (batch, space, heads, dim, kernel_size_of(rank, window))
        qkv, rpb = make_inputs(check, *shape, dtype, count, has_rpb)
        exact = run_step(check, qkv.double(), None if rpb is None else rpb.double(), "reference", *window, seed=count)
        with float32_products(products):
            peers = run_step(check, qkv, rpb, "reference", *window, seed=count)
            found = run_step(check, qkv, rpb, check.backend, *window, seed=count)
        for index, (x, peer, expected) in enumerate(zip(found, peers, exact, strict=True)):
            rounding = eps * expected.abs().max().clamp(min=1)
            error, peer_error = (((y - expected).square().mean().sqrt() / rounding).item() for y in (x, peer))
            errors[name].append((error, peer_error))
            if not error <= max(8 * peer_error, 1.0):
                wrong.append(f"{space} {window} d{dim} {name} result {index}: {error:.2g} for {peer_error:.2g}")
    ratios = []
    for name, pairs in errors.items():
        if not pairs:
            ratios.append(f"{name} left out: no time")
            continue
        error, peer_error = torch.tensor(pairs, dtype=torch.float64).square().mean(0).sqrt().tolist()
        ratios.append(f"{name} {error / peer_error:.2f}")
        check.failed |= not error <= 2 * peer_error
    check.failed |= bool(wrong)
    print(*wrong[:20], sep="\n")
    result = f"{counts} by rank, {len(wrong)} wrong; error over PyTorch's own (bar 2): {', '.join(ratios)}"
    check.row("correctness", what, result)
