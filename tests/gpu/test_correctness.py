"""Goldens, repeatability, CUDA graphs, streams and long training on a GPU."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch
from gpu_checks.problems import CUDA, Machine, make_inputs, run_step
from test_natten import test_goldens as goldens

import natten

CASES = goldens.CASES
SOAK_STEPS, SOAK_S = 10_000, 25.0


@pytest.mark.limit(90)  # the first fused and the first unfused calls compile
@pytest.mark.parametrize("way", ["fused", "packed", "unfused"])
def test_goldens(machine: Machine, way: str):
    """Output, logsumexp and gradients equal those of NATTEN 0.17.5."""
    attend = goldens.unfused if way == "unfused" else partial(getattr(goldens, way), backend=machine.backend)
    for case in CASES:
        qkv, rpb, dout = goldens.make_inputs(case)
        qkv = [x.detach().to(machine.device).requires_grad_() for x in qkv]
        rpb = None if rpb is None else rpb.detach().to(machine.device).requires_grad_()
        out, lse = attend(case, qkv, rpb)
        inputs = {name: x for name, x in zip(("dq", "dk", "dv", "drpb"), (*qkv, rpb), strict=True) if x is not None}
        grads = torch.autograd.grad(out, list(inputs.values()), dout.to(machine.device))
        found = {"out": out, "lse": lse, **dict(zip(inputs, grads, strict=True))}
        for name, expected in goldens.load(case["tag"]).items():
            error = (found[name].detach().cpu() - expected).abs().max().item()
            assert error <= goldens.TOLERANCE, (case["tag"], name)


@pytest.mark.parametrize("table", ["small", "large"])
def test_deterministic_runs_are_bit_equal(machine: Machine, table: str):
    shape = {"small": (4, (56, 56), 2, 32, 7), "large": (2, (12, 18, 18), 2, 32, (9, 9, 9))}[table]
    if machine.is_rehearsal:
        shape = {"small": (1, (9, 9), 2, 8, 3), "large": (1, (5, 6, 7), 2, 8, (3, 3, 3))}[table]
    qkv, rpb = make_inputs(machine, *shape)
    torch.use_deterministic_algorithms(True)
    try:
        one, other = (run_step(qkv, rpb, machine.backend, shape[4]) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.gpu
def test_cuda_graph():
    """A compiled call can be captured and replayed; a first call, which compiles, cannot."""
    qkv, rpb = make_inputs(CUDA, 2, (24, 24), 2, 32, 5)
    with torch.no_grad():
        with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            natten.na2d_qkvpacked(qkv, 5, rpb=rpb, backend="cuda")
        torch.cuda.synchronize()
        expected = natten.na2d_qkvpacked(qkv, 5, rpb=rpb, backend="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = natten.na2d_qkvpacked(qkv, 5, rpb=rpb, backend="cuda")
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_concurrent_streams():
    problems = [make_inputs(CUDA, 8, (28, 28), 4, 32, 7, seed=seed) for seed in range(4)]
    expected = [run_step(*problem, "cuda", 7) for problem in problems]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in problems], []
    for stream, problem in zip(streams, problems, strict=True):
        with torch.cuda.stream(stream):
            found.append(run_step(*problem, "cuda", 7))
    torch.cuda.synchronize()
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.limit(45)
def test_long_training_stays_finite(machine: Machine):
    """In bfloat16, with float32 parameters."""
    qkv, rpb = make_inputs(machine, 2, (14, 14), 2, 32, 7)
    qkv, rpb = qkv.float().requires_grad_(), rpb.requires_grad_()
    is_finite = torch.ones((), dtype=torch.bool, device=machine.device)
    started = time.monotonic()
    for _ in range(3 if machine.is_rehearsal else SOAK_STEPS):
        if time.monotonic() - started > SOAK_S:  # on a slow GPU
            break
        out = natten.na2d_qkvpacked(qkv.bfloat16(), 7, rpb=rpb, backend=machine.backend)
        grads = torch.autograd.grad(out.float().square().mean(), (qkv, rpb))
        with torch.no_grad():
            for x, grad in zip((qkv, rpb), grads, strict=True):
                x -= 10 * grad
                is_finite &= grad.isfinite().all()
    assert is_finite
