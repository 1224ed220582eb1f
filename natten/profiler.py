"""Time a neighborhood attention problem, or print which backend and kernels would run it.

    python -m natten.profiler --size 56x56 --batch 8 --heads 2 --head-dim 32 --kernel-size 7 --rpb --backward
    python -m natten.profiler --size 56x56 --head-dim 32 --kernel-size 7 --dtype bfloat16 --dry-run --capability 9.0

This module and tools/benchmark.py measure with the same three definitions, which live here:

- `minimal_work`: the arithmetic and the memory traffic that a pass cannot avoid;
- `Limits`: how fast this machine multiplies large matrices and copies large tensors;
- `Timer`, with `schedule`: samples of a call, interleaved with those of the calls it is compared with.

"Percent of limit" is the shortest possible time of a pass divided by its measured time. The shortest possible time is
the longer of two: the minimal arithmetic at the rate of the matrix product, and the minimal traffic at the rate of the
copy. A small problem that fits into a CPU's cache can exceed 100 percent, because the copy does not fit.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import natten.flops  # noqa: F401  registers the FLOP formulas with FlopCounterMode
from natten import __version__, backends, functional
from natten.backends import cuda, reference
from natten.backends.kernels import unsupported_input
from natten.checks import (
    CAUSAL_HELP,
    WINDOW_PADDINGS,
    CommandParser,
    make_axes,
    parse_causal,
    parse_numbers,
    per_axis,
)
from natten.geometry import Axis

__all__ = [
    "GPUS",
    "Limits",
    "Plan",
    "Problem",
    "Timer",
    "Work",
    "find_gpu",
    "main",
    "measure",
    "minimal_work",
    "plan",
    "schedule",
]

DTYPES = ("float32", "float16", "bfloat16", "float64")

SAMPLE_MS = 20.0  # shorter calls are repeated within a sample until the sample takes this long
WARM_UP_S = 0.3
MIN_SAMPLES = 3
MATRIX_SIDE = {"cpu": 1536, "cuda": 8192}  # of the square matrices whose product is the limit of arithmetic
SMALL_MATRIX_SIDE = (
    384  # of matrices that fit into a CPU's cache; their product shows whether the limit depends on size
)
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # of the copied tensor; larger than any cache
_MAX_INPUT_SETS = 6

# Example GPUs by compute capability: name, multiprocessors, KiB of shared memory available to a block.
GPUS = {
    (7, 0): ("V100", 80, 96),
    (7, 5): ("T4", 40, 64),
    (8, 0): ("A100", 108, 163),
    (8, 6): ("RTX 3090", 82, 99),
    (8, 9): ("L40S", 142, 99),
    (9, 0): ("H100 or H200", 132, 227),
    (10, 0): ("B200", 148, 227),
    (12, 0): ("RTX 5090", 170, 99),
}


# ---------------------------------------------------------------------------------------------------------------------
# Problems and their minimal work
# ---------------------------------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """A call of na1d, na2d or na3d, or of one of their unfused parts.

    Attributes:
        batch: number of maps.
        space: tokens along each axis.
        heads: heads of the query.
        kv_heads: heads of key and value.
        head_dim: channels per head of query and key.
        value_dim: channels per head of the value.
        additional: number of additional keys and values.
        dtype: dtype of query, key and value; the bias is float32.
        has_rpb: whether there is a relative position bias.
        arguments: the remaining keyword arguments of the function.
        part: "" for fused attention, or "qk" or "av", whose tensors are heads-first.
    """

    batch: int
    space: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    additional: int
    dtype: torch.dtype
    has_rpb: bool
    arguments: dict[str, Any]
    part: str = ""

    def tensors(self, device: torch.device | str) -> dict[str, Tensor]:
        """Return random tensors that require gradients, keyed by argument name."""
        maps = {"query": (self.heads, self.head_dim), "key": (self.kv_heads, self.head_dim)}
        maps["value"] = self.kv_heads, self.value_dim
        if self.part:
            maps["attn"] = self.heads, prod(self._window())
            names = {"qk": ("query", "key"), "av": ("attn", "value")}[self.part]
            shapes = {name: (self.batch, maps[name][0], *self.space, maps[name][1]) for name in names}
        else:
            shapes = {name: (self.batch, *self.space, *last) for name, last in maps.items()}
        if self.additional:
            for name in ("key", "value"):
                shapes[f"additional_{name}s"] = self.batch, self.additional, *maps[name]
        tensors = {name: torch.randn(shape, device=device).to(self.dtype) for name, shape in shapes.items()}
        if self.has_rpb and self.part != "av":
            sizes = (2 * k - 1 for k in self._window())
            tensors["rpb"] = torch.randn(self.heads, *sizes, device=device)
        return {name: x.requires_grad_() for name, x in tensors.items()}

    def call(self, tensors: dict[str, Tensor], backend: str | None) -> Tensor:
        """Run the forward pass."""
        name = f"na{len(self.space)}d" + (f"_{self.part}" if self.part else "")
        return getattr(functional, name)(**tensors, **self.arguments, backend=backend)

    def _window(self) -> tuple[int, ...]:
        return per_axis(self.arguments["kernel_size"], len(self.space), "kernel_size", int)


class Work(NamedTuple):
    """Minimal work of a pass.

    Attributes:
        gflop: floating-point operations in 1e9.
        gbytes: bytes read or written in 1e9.
    """

    gflop: float
    gbytes: float

    def plus(self, other: Work) -> Work:
        """Return the work of two passes."""
        return Work(self.gflop + other.gflop, self.gbytes + other.gbytes)


def minimal_work(problem: Problem, with_backward: bool = True) -> dict[str, Work]:
    """Return the minimal work of each pass, "forward" and "backward". Nothing is computed.

    Arithmetic: the products of queries with the keys of their windows and of weights with values; the backward pass
    computes the logits again. Causal windows are counted exactly. Traffic: each tensor is read or written once per
    pass.

    Raises:
        ValueError: if the arguments of the problem are invalid.
    """
    return _trace(problem, with_backward)[0]


class _OperatorCalls(TorchDispatchMode):
    """Records the arguments of the fused attention operator, as the backend receives them."""

    def __init__(self):
        super().__init__()
        self.arguments: list[tuple] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.natten.attention_forward.default:
            self.arguments.append(args)
        return operator(*args, **(kwargs or {}))


def _trace(problem: Problem, with_backward: bool) -> tuple[dict[str, Work], tuple]:
    """Return the minimal work, and the arguments of the fused operator if it runs, from a run on the meta device."""
    tensors = problem.tensors("meta")
    with backends.use_backend(None), _OperatorCalls() as calls, FlopCounterMode(display=False) as forward:
        out = problem.call(tensors, None)
    work = {"forward": Work(forward.get_total_flops() / 1e9, _gbytes(out, *tensors.values()))}
    if with_backward:
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        saved = () if problem.part else (out,)
        traffic = _gbytes(out, *saved, *tensors.values(), *tensors.values())
        work["backward"] = Work(backward.get_total_flops() / 1e9, traffic)
    return work, next(iter(calls.arguments), ())


def _gbytes(*tensors: Tensor) -> float:
    return sum(x.numel() * x.element_size() for x in tensors) / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# What would run
# ---------------------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What would run.

    Attributes:
        backend: name of the backend.
        reasons: why the faster backends cannot run the call, by name.
        shape: shape of the query as the backend receives it.
        axes: the axes as the backend receives them.
        work: minimal work of each pass.
        kernels: launches of the cuda backend in order; empty for other backends.
    """

    backend: str
    reasons: dict[str, str]
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    work: dict[str, Work]
    kernels: list[dict[str, Any]]


def plan(problem: Problem, device: torch.device, backend: str | None, with_backward: bool, gpu=None) -> Plan:
    """Return which backend would run a problem, and how. Nothing is computed.

    Args:
        problem: the call.
        device: where the tensors would be.
        backend: name of a backend, or None for the fastest.
        with_backward: whether to include the backward pass.
        gpu: properties of a GPU that replaces `device` and need not exist here; see `natten.backends.cuda.launches`.

    Raises:
        ValueError: if the arguments of the problem are invalid, or `backend` cannot run it.
    """
    work, (query, _, _, rpb, *window) = _trace(problem, with_backward)
    kernel_size, stride, dilation, is_causal = window[:4]
    axes = make_axes(query.shape[1:-2], kernel_size, stride, dilation, [bool(causal) for causal in is_causal])

    if gpu is None:
        name, reasons = _choose(torch.empty(1, dtype=problem.dtype, device=device).expand(query.shape), backend)
        gpu = torch.cuda.get_device_properties(device) if name == cuda.NAME else None
    else:
        name, reasons = _choose_for(query, gpu, backend)
    kernels = []
    if name == cuda.NAME:
        ops = ("attention", "attention_backward")[: len(work)]
        kernels = [_describe(step) for op in ops for step in cuda.launches(op, query, axes, rpb is not None, gpu)]
    return Plan(name, reasons, tuple(query.shape), axes, work, kernels)


def _choose(query: Tensor, backend: str | None) -> tuple[str, dict[str, str]]:
    """Return the backend for a query on its device, and why the faster ones cannot run it."""
    chosen = backends.choose(query, backend)
    before = backends.LADDER[: backends.LADDER.index(chosen)] if backend is None else ()
    return chosen.NAME, {module.NAME: module.unsupported_reason(query) or "" for module in before}


def _choose_for(query: Tensor, gpu, backend: str | None) -> tuple[str, dict[str, str]]:
    """Return the backend for a query on a GPU that need not be present, and why the cuda backend cannot run it."""
    if backend == reference.NAME:
        return reference.NAME, {}
    if backend not in (None, cuda.NAME):
        raise ValueError(f"--backend {backend!r} cannot run tensors on cuda; use {cuda.NAME!r} or {reference.NAME!r}.")
    reason = unsupported_input(query, cuda.MAX_DIM) or cuda.unsupported_capability((gpu.major, gpu.minor))
    if reason is None:
        return cuda.NAME, {}
    if backend is not None:
        raise ValueError(f"--backend {backend!r} does not support this problem: {reason}.")
    return reference.NAME, {cuda.NAME: reason}


def _describe(step: cuda.Step) -> dict[str, Any]:
    """Return a launch as plain values. A tile has `tile` tokens per axis and `columns` columns per row."""
    words = dict(definition.split("=") for definition in step.kernel.definitions)
    described = {
        "kernel": step.kernel.name.removeprefix("natten_"),
        "blocks": step.blocks,
        "threads": step.kernel.threads,
        "shared_bytes": step.kernel.shared_bytes,
    }
    if "TILE_X" in words:
        described["tile"] = "x".join(words[f"TILE_{letter}"] for letter in "ZYX")
        described["columns"] = int(words["COLUMNS"])
        described["is_staged"] = words["IS_STAGED"] == "1"
        described["blocks_per_multiprocessor"] = int(words["MIN_BLOCKS"])
    return described


def find_gpu(capability: str) -> SimpleNamespace:
    """Return the properties of a GPU of a compute capability, for instance "9.0".

    Raises:
        ValueError: if no GPU of that capability is listed.
    """
    known = {f"{major}.{minor}": (major, minor) for major, minor in GPUS}
    if capability not in known:
        raise ValueError(f"--capability {capability!r} is unknown; use one of {', '.join(known)}.")
    (major, minor), (name, processors, kib) = known[capability], GPUS[known[capability]]
    return SimpleNamespace(
        name=name,
        major=major,
        minor=minor,
        multi_processor_count=processors,
        shared_memory_per_block_optin=kib << 10,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


class Timer:
    """Takes samples of the time of a call.

    Short calls are repeated within a sample until the sample takes 20 ms. On a GPU, a sample is timed by CUDA events
    around replays of a CUDA graph, so that neither Python nor launches count. Calls that a graph cannot capture run one
    by one.

    Args:
        call: the call to time.
        device: where it runs.
        others: the same call with other inputs. All calls run in turn, so that no input stays in a GPU's cache.
        threads: number of PyTorch's CPU threads during the call; None leaves it as it is.
        context: returns the context manager in which the calls run, for instance `torch.no_grad`.
        use_graph: whether to try a CUDA graph.

    Attributes:
        samples_ms: milliseconds per call, one number per sample.
    """

    def __init__(
        self,
        call: Callable[[], object],
        device: torch.device,
        others: Sequence[Callable[[], object]] = (),
        threads: int | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
        use_graph: bool = True,
    ):
        self.calls, self.device, self.threads, self.context = (call, *others), device, threads, context
        self.use_graph = use_graph and device.type == "cuda"
        self.samples_ms: list[float] = []
        self._repeats = 1
        self._run: Callable[[], object] = self._run_eagerly

    def warm_up(self) -> float:
        """Run for a while and choose the number of calls per sample; return the milliseconds of one call."""
        self._set_threads()
        self._elapsed_ms()
        if self.use_graph:
            self._run = self._capture() or self._run_eagerly
        started = time.perf_counter()
        while True:
            took = self._elapsed_ms()
            if took >= SAMPLE_MS and time.perf_counter() - started >= WARM_UP_S:
                return took / (self._repeats * len(self.calls))
            needed = int(SAMPLE_MS * self._repeats / max(took, 1e-6)) + 1
            self._repeats = max(self._repeats, min(2 * self._repeats, needed))

    def sample(self) -> None:
        """Take one sample."""
        if self._set_threads():
            self._run_once()  # starts the threads
        self.samples_ms.append(self._elapsed_ms() / (self._repeats * len(self.calls)))

    def percentile(self, percent: int) -> float:
        """Return a percentile of the samples, in milliseconds per call."""
        return torch.tensor(self.samples_ms, dtype=torch.float64).quantile(percent / 100).item()

    def median_ms(self, samples: int = 15) -> float:
        """Warm up, take samples and return their median."""
        self.warm_up()
        for _ in range(samples):
            self.sample()
        return self.percentile(50)

    def _set_threads(self) -> bool:
        """Set the number of threads; return whether it changed."""
        if self.threads is None or self.threads == torch.get_num_threads():
            return False
        torch.set_num_threads(self.threads)
        return True

    def _run_eagerly(self) -> None:
        for call in self.calls:
            call()

    def _run_once(self) -> None:
        with self.context():
            self._run()

    def _elapsed_ms(self) -> float:
        with self.context():
            if self.device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(self._repeats):
                    self._run()
                end.record()
                end.synchronize()
                return start.elapsed_time(end)
            started = time.perf_counter()
            for _ in range(self._repeats):
                self._run()
            return (time.perf_counter() - started) * 1e3

    def _capture(self) -> Callable[[], object] | None:
        """Return the replay of a CUDA graph of all calls, or None if they cannot be captured."""
        try:
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                self._run_once()
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._run_once()
            graph.replay()
            torch.cuda.synchronize(self.device)
            return graph.replay
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            return None


def schedule(timers: Sequence[Timer], rounds: int, patience_s: float | None = None) -> list[Timer]:
    """Warm up timers and return them in the order in which to sample them.

    In each round, every timer takes one sample, so that a disturbance affects all of them alike. The order rotates, so
    that no timer always follows the same one.

    Args:
        timers: the timers to compare.
        rounds: number of samples of each timer.
        patience_s: a call that takes longer than this many seconds is sampled in proportionally fewer rounds, at least
            3. None: in all rounds.
    """
    turns = {}
    for timer in timers:
        call_s, count = timer.warm_up() / 1e3, rounds
        if patience_s is not None and call_s > patience_s:
            count = min(rounds, max(MIN_SAMPLES, round(rounds * patience_s / call_s)))
        turns[timer] = {turn * rounds // count for turn in range(count)}
    ordered = []
    for turn in range(rounds):
        shift = turn % len(timers)
        ordered += [timer for timer in (*timers[shift:], *timers[:shift]) if turn in turns[timer]]
    return ordered


class Limits:
    """The limits of the machine, measured like everything else: a large matrix product and a large copy.

    On a CPU the product is in float32, in which the CPU kernels compute 16-bit types as well; on a GPU it is in the
    dtype of the problem.

    Args:
        dtype: dtype of the problem.
        device: where it runs.
        threads, context: as for `Timer`.

    Attributes:
        timers: the two timers, to be sampled before the rates are read.
        small_timer: timer of a product that fits into the cache, to be sampled before its rate is read; None on a GPU.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        threads: int | None = None,
        context: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.side = MATRIX_SIDE.get(device.type, MATRIX_SIDE["cuda"])
        self.bytes = COPY_BYTES.get(device.type, COPY_BYTES["cuda"])
        product_dtype = self.product_dtype(dtype, device)

        def product(side: int) -> Timer:
            a, b, out = (torch.randn(side, side, device=device).to(product_dtype) for _ in range(3))
            return Timer(lambda: torch.mm(a, b, out=out), device, threads=threads, context=context)

        source, target = (torch.ones(self.bytes, dtype=torch.uint8, device=device) for _ in range(2))
        copy = Timer(lambda: target.copy_(source), device, threads=threads, context=context)
        self.timers = (product(self.side), copy)
        self.small_timer = product(SMALL_MATRIX_SIDE) if device.type == "cpu" else None

    @staticmethod
    def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
        """Return the dtype of the matrix product that limits a problem of this dtype."""
        return torch.float32 if device.type == "cpu" and dtype.itemsize == 2 else dtype

    @property
    def matmul_gflops(self) -> float:
        """Rate of the matrix product, in 1e9 floating-point operations per second."""
        return 2e-6 * self.side**3 / self.timers[0].percentile(50)

    @property
    def small_matmul_gflops(self) -> float | None:
        """Rate of the small matrix product, in 1e9 floating-point operations per second; None on a GPU."""
        return None if self.small_timer is None else 2e-6 * SMALL_MATRIX_SIDE**3 / self.small_timer.percentile(50)

    @property
    def copy_gb_s(self) -> float:
        """Bytes that the copy reads and writes, in 1e9 per second."""
        return 2e-6 * self.bytes / self.timers[1].percentile(50)

    def percent(self, work: Work, ms: float) -> float:
        """Return the shortest possible time of some work as a percentage of the measured one."""
        return 1e5 * max(work.gflop / self.matmul_gflops, work.gbytes / self.copy_gb_s) / ms


def input_sets(gbytes: float, device: torch.device) -> int:
    """Return how many sets of inputs of that size exceed a GPU's L2 cache, at most 6; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache_gbytes = torch.cuda.get_device_properties(device).L2_cache_size / 1e9
    return max(1, min(_MAX_INPUT_SETS, int(2 * cache_gbytes / max(gbytes, 1e-9)) + 1))


def measure(
    problem: Problem, device: torch.device, backend: str | None, work: dict[str, Work], repeats: int
) -> list[dict[str, float | str]]:
    """Time each pass of a problem, and the limits of the machine in the same rounds.

    Args:
        problem: the call.
        device: where to run it.
        backend: name of a backend, or None for the fastest.
        work: minimal work by pass, from `minimal_work`; its keys are the passes to time.
        repeats: number of samples.

    Returns:
        One row per pass: its name as `pass`, `ms` (median), `ms_p20`, `ms_p80`, `gflops` and `gb_s` (minimal work in
        1e9 per second), `matmul_gflops` and `copy_gb_s` (the limits), and `percent_of_limit`.

    Raises:
        ValueError: if the tensors do not fit into memory.
    """
    try:
        count = input_sets(work["forward"].gbytes, device)
        passes = [_passes(problem, problem.tensors(device), backend, "backward" in work) for _ in range(count)]
        timers = {}
        for name in passes[0]:
            call, *others = (calls[name] for calls in passes)
            # Backward kernels run on the stream of their forward pass, which is not the one that a graph captures.
            timers[name] = Timer(call, device, others, use_graph=name == "forward")
        limits = Limits(problem.dtype, device)
        for timer in schedule([*timers.values(), *limits.timers], repeats):
            timer.sample()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate" in str(error):
            raise ValueError(f"--size or --batch is too large for the memory of {device}; reduce it.") from error
        raise
    return [_row(name, timer, work[name], limits) for name, timer in timers.items()]


def _passes(
    problem: Problem, tensors: dict[str, Tensor], backend: str | None, with_backward: bool
) -> dict[str, Callable[[], object]]:
    @torch.no_grad()
    def forward() -> None:
        problem.call(tensors, backend)

    if not with_backward:
        return {"forward": forward}
    out = problem.call(tensors, backend)
    backward = partial(torch.autograd.grad, out, list(tensors.values()), torch.randn_like(out), retain_graph=True)
    return {"forward": forward, "backward": backward}


def _row(name: str, timer: Timer, work: Work, limits: Limits) -> dict[str, float | str]:
    ms = timer.percentile(50)
    return {
        "pass": name,
        "ms": ms,
        "ms_p20": timer.percentile(20),
        "ms_p80": timer.percentile(80),
        "gflops": 1e3 * work.gflop / ms,
        "gb_s": 1e3 * work.gbytes / ms,
        "matmul_gflops": limits.matmul_gflops,
        "copy_gb_s": limits.copy_gb_s,
        "percent_of_limit": limits.percent(work, ms),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m natten.profiler",
        description=__doc__.split("\n\n")[0],
        epilog="Sizes, kernel sizes, strides and dilations take one value, or one per axis: 56x56, 56,56 or 56 56.",
    )
    per_axis_values: dict[str, Any] = {"type": parse_numbers, "nargs": "+", "metavar": "N"}
    add = parser.add_argument
    add("-i", "--size", **per_axis_values, required=True, help="tokens along each axis, for instance 56x56")
    add("-b", "--batch", type=_positive, default=1, metavar="N", help="batch size (default: 1)")
    add("-n", "--heads", type=_positive, default=1, metavar="N", help="query heads (default: 1)")
    add("--kv-heads", "--heads-kv", type=_positive, metavar="N", help="key and value heads (default: --heads)")
    add("-d", "--head-dim", type=_positive, default=64, metavar="N", help="channels per head (default: 64)")
    add("--value-dim", "--dim-value", type=_positive, metavar="N", help="value channels per head (default: --head-dim)")
    add("-w", "--kernel-size", **per_axis_values, required=True, help="window size")
    add("-s", "--stride", **per_axis_values, default=[(1,)], help="queries per window (default: 1)")
    add("--dilation", **per_axis_values, default=[(1,)], help="step between tokens of a window (default: 1)")
    add("-c", "--causal", type=int, nargs="*", metavar="AXIS", help=CAUSAL_HELP)
    add("--window-padding", choices=WINDOW_PADDINGS, default="shift", help="windows at borders (default: shift)")
    add("--additional", "--add-kv", type=_positive, default=0, metavar="N", help="additional keys and values")
    add("--rpb", action="store_true", help="add a relative position bias, in float32")
    add("--backward", "--backprop", action="store_true", help="include the backward pass")
    add("--dtype", choices=DTYPES, default="float32", help="dtype of query, key and value (default: float32)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda if available")
    add("--backend", choices=backends.NAMES, help="default: the fastest that supports the problem")
    add("--dry-run", action="store_true", help="only print which backend, kernels and tiles would run")
    add("--capability", metavar="X.Y", help="with --dry-run: plan for a GPU of this compute capability")
    add("--repeats", type=_positive, default=20, metavar="N", help="samples per pass (default: 20)")
    add("--json", action="store_true", help="print JSON")
    return parser


def read_problem(args: argparse.Namespace) -> Problem:
    """Return the problem that the options describe. It is validated when it is planned.

    Raises:
        ValueError: if --size or --causal is invalid.
    """
    window = {name: tuple(chain(*getattr(args, name))) for name in ("size", "kernel_size", "stride", "dilation")}
    space = window.pop("size")
    rank = len(space)
    if rank > 3 or min(space) < 1:
        raise ValueError(f"--size {'x'.join(map(str, space))} must be 1 to 3 positive numbers.")
    arguments: dict[str, Any] = {name: values[0] if len(values) == 1 else values for name, values in window.items()}
    arguments["is_causal"] = parse_causal(args.causal, rank)
    arguments["window_padding"] = args.window_padding
    return Problem(
        batch=args.batch,
        space=space,
        heads=args.heads,
        kv_heads=args.kv_heads or args.heads,
        head_dim=args.head_dim,
        value_dim=args.value_dim or args.head_dim,
        additional=args.additional,
        dtype=getattr(torch, args.dtype),
        has_rpb=args.rpb,
        arguments=arguments,
    )


def find_device(args: argparse.Namespace) -> tuple[torch.device, SimpleNamespace | None]:
    """Return where to run and, for a dry run with --capability, the GPU to plan for.

    Raises:
        ValueError: if the device is missing, or --capability does not apply.
    """
    has_gpu = torch.cuda.is_available()
    name = args.device or ("cuda" if has_gpu or args.capability else "cpu")
    if args.capability and (name != "cuda" or not args.dry_run):
        raise ValueError("--capability requires --dry-run and excludes --device cpu.")
    if name == "cuda" and not has_gpu and not args.capability:
        raise ValueError("--device cuda is not available; use --device cpu, or --dry-run with --capability 9.0.")
    return torch.device(name), find_gpu(args.capability) if args.capability else None


def report(problem: Problem, where: str, found: Plan, rows: Sequence[dict]) -> Iterator[str]:
    """Yield the lines of the printed report."""
    size = "x".join(map(str, found.shape[1:-2]))
    heads, dim = found.shape[-2:]
    dtype = str(problem.dtype).removeprefix("torch.")
    yield f"backend {found.backend}: map {size}, heads {heads}, head_dim {dim}, {dtype}, on {where}"
    for name, reason in found.reasons.items():
        yield f"not {name}: {reason}"
    if found.kernels:
        yield from _table(found.kernels, {})
    if rows:
        yield from _table(rows, {"ms": ".3f", "ms_p20": ".3f", "ms_p80": ".3f"})
    else:
        for name, work in found.work.items():
            yield f"minimal work, {name}: {work.gflop:.4g} GFLOP, {1e3 * work.gbytes:.4g} MB"


_TITLES = {
    "gflops": "GFLOP/s",
    "gb_s": "GB/s",
    "matmul_gflops": "matmul GFLOP/s",
    "copy_gb_s": "copy GB/s",
    "percent_of_limit": "% of limit",
}


def _table(rows: Sequence[dict], formats: dict[str, str]) -> Iterator[str]:
    """Yield lines of aligned columns. Floats have one decimal unless `formats` says otherwise."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def show(name: str, value: Any) -> str:
        return format(value, formats.get(name, ".1f")) if isinstance(value, float) else str(value)

    lines = [[_TITLES.get(name, name.replace("_", " ")) for name in names]]
    lines += [[show(name, row[name]) if name in row else "-" for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def _to_json(problem: Problem, where: str, found: Plan, rows: Sequence[dict]) -> str:
    described = problem._asdict() | {"dtype": str(problem.dtype).removeprefix("torch.")}
    content = {
        "problem": described | described.pop("arguments"),
        "device": where,
        "natten": __version__,
        "torch": torch.__version__,
        "backend": found.backend,
        "reasons": found.reasons,
        "query_shape": found.shape,
        "work": {name: work._asdict() for name, work in found.work.items()},
        "kernels": found.kernels,
        "passes": rows,
    }
    return json.dumps(content, indent=1)


def _device_name(device: torch.device, gpu: SimpleNamespace | None) -> str:
    if gpu is not None:
        return f"a GPU of compute capability {gpu.major}.{gpu.minor} ({gpu.name})"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m natten.profiler` with the given arguments, by default those of the command line."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        problem, (device, gpu) = read_problem(args), find_device(args)
        backend = backends.requested(args.backend)
        found = plan(problem, device, backend, args.backward, gpu)
        rows = [] if args.dry_run else measure(problem, device, backend, found.work, args.repeats)
    except ValueError as error:
        parser.error(str(error))
    where = _device_name(device, gpu)
    print(_to_json(problem, where, found, rows) if args.json else "\n".join(report(problem, where, found, rows)))


if __name__ == "__main__":
    main()
