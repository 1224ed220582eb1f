"""Errors of the CUDA kernels on random inputs, compared with PyTorch's own arithmetic in the same precision."""

from __future__ import annotations

import time

import pytest
import torch

from gpu.problems import PRECISIONS, Machine, float32_products, kernel_size_of, make_inputs, run_step
from natten import profiler
from natten.backends import cuda
from natten.backends.cuda import driver
from natten.checks import make_axes

PROBLEMS = 750  # per precision
PATIENCE_S = 20  # after which only the first problem of each case still runs

# By rank: a window (kernel_size, stride, dilation, is_causal), map sizes, and head_dim. Few, to limit compilation.
WINDOWS = {
    1: (
        ((7, 1, 1, False), ((64,), (33,)), 32),
        ((9, 2, 3, True), ((40,), (61,)), 24),
        ((130, 1, 1, False), ((300,),), 64),
    ),
    2: (
        ((7, 1, 1, False), ((7, 7), (20, 17), (56, 31)), 32),
        (((5, 4), (1, 2), (2, 1), (False, True)), ((23, 19), (12, 40)), 16),
        ((13, 1, 1, False), ((26, 29),), 64),
        ((3, 3, 2, True), ((9, 14),), 128),
    ),
    3: (((3, 1, 1, False), ((6, 7, 9),), 32), (((2, 4, 3), 1, (1, 2, 1), (True, False, False)), ((5, 11, 10),), 40)),
}
CASES = [
    (rank, window, space, dim, has_rpb)
    for rank, windows in WINDOWS.items()
    for window, spaces, dim in windows
    for space in spaces
    for has_rpb in (True, False)
]
BATCHES = ((1, 4), (2, 2), (4, 1))  # batch and heads; equal products need the same kernels


def compile_ahead(dtype: torch.dtype) -> None:
    """Compile the kernels of all cases on all cores."""
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else profiler.find_gpu("9.0")
    kernels, (batch, heads) = set(), BATCHES[0]
    for _, window, space, dim, has_rpb in CASES:
        query = torch.empty(batch, *space, heads, dim, dtype=dtype, device="meta")
        for op in ("attention", "attention_backward"):
            kernels |= {step.kernel for step in cuda.launches(op, query, make_axes(space, *window), has_rpb, gpu)}
    assert kernels
    if torch.cuda.is_available():
        driver.machine_codes(kernels, (gpu.major, gpu.minor))


@pytest.mark.limit(50)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_errors_are_those_of_pytorch(machine: Machine, precision: str):
    """Against float64, the error is close to that of the reference in the same precision."""
    dtype, eps, products = PRECISIONS[precision]
    with float32_products(products):
        compile_ahead(dtype)
    wrong, errors = [], []
    started = time.monotonic()
    for index in range(len(CASES) if machine.is_rehearsal else PROBLEMS):
        if index >= len(CASES) and time.monotonic() - started > PATIENCE_S:
            break
        rank, window, space, dim, has_rpb = CASES[index % len(CASES)]
        batch, heads = BATCHES[index // len(CASES) % len(BATCHES)]
        shape = (batch, space, heads, dim, kernel_size_of(rank, window))
        qkv, rpb = make_inputs(machine, *shape, dtype, index, has_rpb)
        exact = run_step(qkv.double(), None if rpb is None else rpb.double(), "reference", *window, seed=index)
        with float32_products(products):
            peers = run_step(qkv, rpb, "reference", *window, seed=index)
            found = run_step(qkv, rpb, machine.backend, *window, seed=index)
        for number, (x, peer, expected) in enumerate(zip(found, peers, exact, strict=True)):
            rounding = eps * expected.abs().max().clamp(min=1)
            error, peer_error = (((y - expected).square().mean().sqrt() / rounding).item() for y in (x, peer))
            errors.append((error, peer_error))
            if not error <= max(8 * peer_error, 1.0):
                wrong.append((space, window, dim, number, error, peer_error))
    assert not wrong
    error, peer_error = torch.tensor(errors, dtype=torch.float64).square().mean(0).sqrt().tolist()
    assert error <= 2 * peer_error
