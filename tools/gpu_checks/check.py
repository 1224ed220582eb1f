"""What all parts of tools/gpu_check.py share: where to run and for how long, rows, times, and problems."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

import natten
from natten.backends import cuda
from natten.backends.cuda.driver import Kernel
from natten.checks import make_axes


class Check:
    """What all parts share: where to run, how long, and where the rows go."""

    def __init__(self, seconds: float, rows: Path | None, rehearse: bool):
        self.end = time.monotonic() + seconds
        self.rows, self.rehearse = rows, rehearse
        self.backend = "cpu" if rehearse else "cuda"
        self.device = torch.device("cpu" if rehearse else "cuda:0")
        self.failed = False

    def row(self, part: str, what: str, result: str) -> None:
        line = f"{part} | {what} | {result}"
        print(line, flush=True)
        if self.rows:
            with self.rows.open("a") as file:
                file.write(line + "\n")

    @contextmanager
    def guarded(self, part: str, what: str) -> Iterator[None]:
        """A row of its own for whatever goes wrong."""
        try:
            yield
        except Exception as error:  # whatever it is, the other rows must come
            self.failed = True
            self.row(part, what, f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:160]}")

    def has_time(self, part: str, what: str, seconds: float = 5.0) -> bool:
        if time.monotonic() + seconds < self.end:
            return True
        self.row(part, what, "left out: no time")
        return False

    def synchronize(self) -> None:
        if not self.rehearse:
            torch.cuda.synchronize()

    def milliseconds(self, calls: list[Callable[[], object]], repeats: int = 15, graph: bool = True) -> float:
        """Median time of a call, of which there are several alike on different inputs."""
        for call in calls:
            call()
        self.synchronize()
        if self.rehearse:
            start = time.perf_counter()
            calls[0]()
            return (time.perf_counter() - start) * 1e3
        run = self._graph(calls) if graph else None
        if run is None:
            run = lambda: [call() for call in calls]  # noqa: E731
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / len(calls))
        return statistics.median(times)

    def _graph(self, calls) -> Callable[[], object] | None:
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for call in calls:
                    call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
            graph.replay()
            torch.cuda.synchronize()
            return graph.replay
        except RuntimeError as error:
            print("no graph:", str(error).splitlines()[0], flush=True)
            torch.cuda.synchronize()
            return None


def make_inputs(check: Check, batch, space, heads, dim, kernel_size, dtype=torch.bfloat16, seed=0, has_rpb=True):
    """A packed qkv as the models have it, a bias table or None, and the axes' window."""
    generator = torch.Generator(check.device).manual_seed(seed)
    kernel_size = (kernel_size,) * len(space) if isinstance(kernel_size, int) else kernel_size
    options = {"generator": generator, "device": check.device}
    qkv = torch.randn(batch, *space, 3, heads, dim, **options).to(dtype)
    rpb = torch.randn(heads, *(2 * k - 1 for k in kernel_size), **options) if has_rpb else None
    return qkv, rpb


def run_step(check: Check, qkv: Tensor, rpb: Tensor | None, backend: str, *window, seed: int = 1) -> list[Tensor]:
    """Output, logsumexp and the gradients of qkv and rpb."""
    rank = qkv.dim() - 4
    attend = getattr(natten, f"na{rank}d_qkvpacked")
    leaves = [x.detach().requires_grad_() for x in (qkv, rpb) if x is not None]
    bias = leaves[1] if rpb is not None else None
    out, lse = attend(leaves[0], *window, rpb=bias, return_lse=True, backend=backend)
    generator = torch.Generator(check.device).manual_seed(seed)
    sent = [torch.randn(x.shape, generator=generator, device=check.device).to(x.dtype) for x in (out, lse)]
    return [out, lse, *torch.autograd.grad((out, lse), leaves, sent)]


def kernel_size_of(rank: int, window: tuple) -> tuple[int, ...]:
    """One value an axis, as bias tables are made by."""
    return tuple(axis.kernel_size for axis in make_axes((1 << 20,) * rank, *window))


def kernels_of(query: Tensor, axes, has_rpb: bool, gpu) -> set[Kernel]:
    """What both passes of a problem launch on a GPU."""
    passes = ("attention", "attention_backward")
    return {step.kernel for kind in passes for step in cuda.launches(kind, query, axes, has_rpb, gpu)}


# Dtype, its rounding, and what PyTorch may do to products of float32 matrices.
PRECISIONS = {
    "bfloat16": (torch.bfloat16, 2.0**-7, "highest"),
    "float16": (torch.float16, 2.0**-10, "highest"),
    "float32": (torch.float32, 2.0**-23, "highest"),
    "tf32": (torch.float32, 2.0**-10, "high"),
}


@contextmanager
def float32_products(setting: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
