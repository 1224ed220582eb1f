"""Whether the CUDA kernels are right: goldens, repeatability, CUDA graphs, streams, long runs, random problems."""

from __future__ import annotations

import time

import torch

import natten
from natten.backends.cuda import driver

from .check import Check, make_inputs, run_step
from .random_problems import random_problems

SOAK_STEPS = 10_000


def correctness(check: Check) -> None:
    for what, part in (
        ("first call of a specialisation", _first_call),
        ("goldens", _goldens),
        ("same from run to run", _determinism),
        ("CUDA graph", _capture),
        ("another stream", _streams),
        ("bf16 soak", _soak),
        ("random problems", random_problems),
    ):
        with check.guarded("correctness", what):
            if check.has_time("correctness", what):
                part(check, what)


def _first_call(check: Check, what: str) -> None:
    qkv, rpb = make_inputs(check, 2, (20, 20), 2, 32, 7)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            natten.na2d_qkvpacked(qkv, 7, rpb=rpb, backend=check.backend)
        check.synchronize()
        times.append(time.perf_counter() - start)
        if not check.rehearse:
            driver._functions.clear()  # the next finds it in the cache
    check.row("correctness", what, f"forward {times[0]:.2f} s, kept {times[1] * 1e3:.0f} ms")


def _goldens(check: Check, what: str) -> None:
    from test_natten import test_goldens

    worst = 0.0
    cases = [case for case in test_goldens.CASES if case["d"] % 8 == 0]
    for case in cases:
        qkv, rpb, dout = test_goldens.make_inputs(case)
        qkv = [x.detach().to(check.device).requires_grad_() for x in qkv]
        rpb = None if rpb is None else rpb.detach().to(check.device).requires_grad_()
        out, lse = test_goldens.fused(case, qkv, rpb, check.backend)
        inputs = {name: x for name, x in zip(("dq", "dk", "dv", "drpb"), (*qkv, rpb), strict=True) if x is not None}
        grads = torch.autograd.grad(out, list(inputs.values()), dout.to(check.device))
        found = {"out": out, "lse": lse, **dict(zip(inputs, grads, strict=True))}
        for name, expected in test_goldens.load(case["tag"]).items():
            worst = max(worst, (found[name].detach().cpu() - expected).abs().max().item())
    check.failed |= not worst <= test_goldens.TOLERANCE
    check.row("correctness", what, f"{len(cases)} cases, largest error {worst:.1e} (bar 1e-4)")


def _determinism(check: Check, what: str) -> None:
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for shape in ((4, (56, 56), 2, 32, 7), (2, (12, 18, 18), 2, 32, (9, 9, 9))):
            qkv, rpb = make_inputs(check, *shape)
            one, other = (run_step(check, qkv, rpb, check.backend, shape[4]) for _ in range(2))
            results.append(all(torch.equal(x, y) for x, y in zip(one, other, strict=True)))
    finally:
        torch.use_deterministic_algorithms(False)
    check.failed |= not all(results)
    check.row("correctness", what, f"bit-equal: small table {results[0]}, large table {results[1]}")


def _capture(check: Check, what: str) -> None:
    if check.rehearse:
        return
    qkv, rpb = make_inputs(check, 2, (24, 24), 2, 32, 5)
    with torch.no_grad():
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                natten.na2d_qkvpacked(qkv, 5, rpb=rpb, backend="cuda")
            told = False
        except RuntimeError as error:
            told = "run once before capture" in str(error)
        torch.cuda.synchronize()
        expected = natten.na2d_qkvpacked(qkv, 5, rpb=rpb, backend="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = natten.na2d_qkvpacked(qkv, 5, rpb=rpb, backend="cuda")
        out.zero_()
        graph.replay()
        torch.cuda.synchronize()
    is_equal = torch.equal(out, expected)
    check.failed |= not (told and is_equal)
    check.row("correctness", what, f"replay equal: {is_equal}; compiling within a capture is refused: {told}")


def _streams(check: Check, what: str) -> None:
    if check.rehearse:
        return
    problems = [make_inputs(check, 8, (28, 28), 4, 32, 7, seed=seed) for seed in range(4)]
    expected = [run_step(check, *problem, "cuda", 7) for problem in problems]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in problems], []
    for stream, problem in zip(streams, problems, strict=True):
        with torch.cuda.stream(stream):
            found.append(run_step(check, *problem, "cuda", 7))
    torch.cuda.synchronize()
    pairs = [(x, y) for one, other in zip(expected, found, strict=True) for x, y in zip(one, other, strict=True)]
    is_equal = all(torch.equal(x, y) for x, y in pairs)
    check.failed |= not is_equal
    check.row("correctness", what, f"four streams at once, equal: {is_equal}")


def _soak(check: Check, what: str) -> None:
    steps, done = 3 if check.rehearse else SOAK_STEPS, 0
    qkv, rpb = make_inputs(check, 2, (14, 14), 2, 32, 7)
    qkv, rpb = qkv.float().requires_grad_(), rpb.requires_grad_()
    is_finite = torch.ones((), dtype=torch.bool, device=check.device)
    patience = time.monotonic() + 25
    while done < steps and time.monotonic() < patience:
        done += 1
        out = natten.na2d_qkvpacked(qkv.bfloat16(), 7, rpb=rpb, backend=check.backend)
        grads = torch.autograd.grad(out.float().square().mean(), (qkv, rpb))
        with torch.no_grad():
            for x, grad in zip((qkv, rpb), grads, strict=True):
                x -= 10 * grad
                is_finite &= grad.isfinite().all()
    check.failed |= not is_finite.item()
    check.row("correctness", what, f"{done} steps, all finite: {is_finite.item()}")
