"""Times a problem of neighborhood attention, or says which kernels would serve it.

    python -m natten.profiler --size 56x56 --batch 8 --heads 2 --head-dim 32 --kernel-size 7 --rpb --backward
    python -m natten.profiler --size 56x56 --head-dim 32 --kernel-size 7 --dtype bfloat16 --dry-run --capability 9.0

Work is the least that the problem takes: the products of queries with the keys of their windows (and of what
natten/ops.py adds around the map), and each tensor moved once a pass. Its limit is the longer of two times: of
that arithmetic at the rate of a matrix product of the same dtype, and of a copy that moves as many bytes. Both are
measured beside it, in turns.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import natten.flops  # noqa: F401  teaches FlopCounterMode
from natten import __version__, backends, functional
from natten.backends import cuda, reference
from natten.backends.kernels import unsupported_input
from natten.checks import WINDOW_PADDINGS, make_axes, per_axis
from natten.command_line import Parser, causal_axes, numbers
from natten.geometry import Axis

DTYPES = ("float32", "float16", "bfloat16", "float64")
_WARM_UP_S = 0.3
_SAMPLE_S = 0.02  # shorter calls are repeated within a sample until it takes this long
_GEMM_SIDE = {"cpu": 2048, "cuda": 8192}  # rows and columns of the matrices whose product is the limit of arithmetic

# By compute capability a GPU that has it: name, multiprocessors, KiB of shared memory that a block may have.
_GPUS = {
    (7, 0): ("V100", 80, 96),
    (7, 5): ("T4", 40, 64),
    (8, 0): ("A100", 108, 163),
    (8, 6): ("RTX 3090", 82, 99),
    (8, 9): ("L40S", 142, 99),
    (9, 0): ("H100 or H200", 132, 227),
    (10, 0): ("B200", 148, 227),
    (12, 0): ("RTX 5090", 170, 99),
}


class Problem(NamedTuple):
    """A call of na1d, na2d or na3d: its shapes, and the rest of its arguments."""

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

    def tensors(self, device: torch.device | str) -> dict[str, Tensor]:
        """Random tensors by the names of the function's arguments; they take gradients."""
        maps = {"query": (self.heads, self.head_dim), "key": (self.kv_heads, self.head_dim)}
        maps["value"] = self.kv_heads, self.value_dim
        shapes = {name: (self.batch, *self.space, *last) for name, last in maps.items()}
        if self.additional:
            for name in ("key", "value"):
                shapes[f"additional_{name}s"] = self.batch, self.additional, *maps[name]
        made = {name: torch.randn(shape, device=device).to(self.dtype) for name, shape in shapes.items()}
        if self.has_rpb:
            sizes = (2 * k - 1 for k in per_axis(self.arguments["kernel_size"], len(self.space), "", int))
            made["rpb"] = torch.randn(self.heads, *sizes, device=device)
        return {name: x.requires_grad_() for name, x in made.items()}

    def call(self, tensors: dict[str, Tensor], backend: str | None) -> Tensor:
        return getattr(functional, f"na{len(self.space)}d")(**tensors, **self.arguments, backend=backend)


class Work(NamedTuple):
    """What a pass takes at least: 1e9 floating-point operations, 1e9 bytes."""

    gflop: float
    gbytes: float


class Plan(NamedTuple):
    """What would run.

    Attributes:
        backend: the backend's name.
        reasons: why those before it in the ladder cannot take the call.
        shape: the query as the backend gets it.
        axes: the axes as the backend gets them.
        work: of each pass.
        kernels: of the cuda backend, in order; empty for others.
    """

    backend: str
    reasons: dict[str, str]
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    work: dict[str, Work]
    kernels: list[dict[str, Any]]


# ---------------------------------------------------------------------------------------------------------------------
# What would run
# ---------------------------------------------------------------------------------------------------------------------


class _OperatorCalls(TorchDispatchMode):
    """Notes the arguments of fused attention: the problem as the backend gets it."""

    def __init__(self):
        super().__init__()
        self.arguments: list[tuple] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.natten.attention_forward.default:
            self.arguments.append(args)
        return operator(*args, **(kwargs or {}))


def plan(problem: Problem, device: torch.device, backend: str | None, with_backward: bool, gpu=None) -> Plan:
    """Which backend would take a problem, and what it would do; nothing is computed.

    Args:
        gpu: properties of a GPU that need not be here, in place of `device`; see natten.backends.cuda.launches.

    Raises:
        ValueError: if there is no such problem, or the backend asked for cannot take it.
    """
    tensors = problem.tensors("meta")
    with backends.use_backend(None), _OperatorCalls() as calls, FlopCounterMode(display=False) as forward:
        out = problem.call(tensors, None)
    work = {"forward": Work(forward.get_total_flops() / 1e9, _gbytes(out, *tensors.values()))}
    if with_backward:
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        moved = _gbytes(out, out, *tensors.values(), *tensors.values())
        work["backward"] = Work(backward.get_total_flops() / 1e9, moved)
    query, _, _, rpb, *window = calls.arguments[0]
    kernel_size, stride, dilation, is_causal = window[:4]
    axes = make_axes(query.shape[1:-2], kernel_size, stride, dilation, [bool(causal) for causal in is_causal])

    if gpu is None:
        name, reasons = _choose(torch.empty(1, dtype=problem.dtype, device=device).expand(query.shape), backend)
        gpu = torch.cuda.get_device_properties(device) if name == cuda.NAME else None
    else:
        name, reasons = _choose_for(query, gpu, backend)
    kernels = []
    if name == cuda.NAME:
        kinds = ("attention", "attention_backward")[: len(work)]
        kernels = [_describe(step) for kind in kinds for step in cuda.launches(kind, query, axes, rpb is not None, gpu)]
    return Plan(name, reasons, tuple(query.shape), axes, work, kernels)


def _gbytes(*tensors: Tensor) -> float:
    return sum(x.numel() * x.element_size() for x in tensors) / 1e9


def _choose(query: Tensor, backend: str | None) -> tuple[str, dict[str, str]]:
    """The backend that takes a query on its device, and why those before it do not."""
    chosen = backends.choose(query, backend)
    before = backends.LADDER[: backends.LADDER.index(chosen)] if backend is None else ()
    return chosen.NAME, {module.NAME: module.unsupported_reason(query) for module in before}


def _choose_for(query: Tensor, gpu, backend: str | None) -> tuple[str, dict[str, str]]:
    """The same on a GPU that is not here."""
    if backend == reference.NAME:
        return reference.NAME, {}
    if backend not in (None, cuda.NAME):
        raise ValueError(f"backend {backend!r} cannot take this call: the tensors are on cuda.")
    reason = unsupported_input(query) or cuda.unsupported_capability((gpu.major, gpu.minor))
    if reason is None:
        return cuda.NAME, {}
    if backend is not None:
        raise ValueError(f"backend {backend!r} cannot take this call: {reason}.")
    return reference.NAME, {cuda.NAME: reason}


def _describe(step: cuda.Step) -> dict[str, Any]:
    """A launch in words: its tile is queries (or keys) on each axis, against so many columns a row."""
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
    """Properties of a GPU of that compute capability, for instance "9.0".

    Raises:
        ValueError: if none is known.
    """
    known = {f"{major}.{minor}": (major, minor) for major, minor in _GPUS}
    if capability not in known:
        raise ValueError(f"--capability is {capability!r}, but must be one of {', '.join(known)}.")
    (major, minor), (name, processors, kib) = known[capability], _GPUS[known[capability]]
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


class _Timer:
    """Times a call again and again."""

    def __init__(self, call: Callable[[], object], device: torch.device):
        self.call, self.device, self.number = call, device, 1
        self.samples_ms: list[float] = []

    def warm_up(self) -> None:
        """Runs for a while, and finds how many calls make a sample."""
        self._elapsed_s()
        started = time.perf_counter()
        while (took := self._elapsed_s()) < _SAMPLE_S or time.perf_counter() - started < _WARM_UP_S:
            self.number = max(self.number, min(2 * self.number, int(_SAMPLE_S * self.number / took) + 1))

    def sample(self) -> None:
        self.samples_ms.append(1e3 * self._elapsed_s() / self.number)

    def percentile(self, percent: int) -> float:
        return torch.tensor(self.samples_ms, dtype=torch.float64).quantile(percent / 100).item()

    def _elapsed_s(self) -> float:
        self._wait()
        started = time.perf_counter()
        for _ in range(self.number):
            self.call()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    problem: Problem, device: torch.device, backend: str | None, work: dict[str, Work], repeats: int
) -> list[dict[str, float | str]]:
    """Times each pass, and the machine's limits in the same rounds.

    Returns:
        For each pass its name, `ms` (median), `ms_p20`, `ms_p80`, `gflops` and `gb_s` (of the least work, in 1e9 a
        second), `matmul_gflops` and `copy_gb_s` (the machine's) and `percent_of_limit`.

    Raises:
        ValueError: if the tensors do not fit into memory.
    """
    try:
        tensors = problem.tensors(device)
        calls = _passes(problem, tensors, backend, "backward" in work)
        timers = {name: _Timer(call, device) for name, call in calls.items()}
        limits = {"matmul": _Timer(_matmul(problem.dtype, device), device)}
        limits |= {name: _Timer(_copy(work[name].gbytes, device), device) for name in timers}
        everyone = [*timers.values(), *limits.values()]
        for timer in everyone:
            timer.warm_up()
        for _ in range(repeats):
            for timer in everyone:
                timer.sample()
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate" in str(error):
            raise ValueError(f"the problem does not fit into the memory of {device}: make it smaller.") from error
        raise
    side = _GEMM_SIDE[device.type]
    matmul_gflops = 2e-6 * side**3 / limits["matmul"].percentile(50)
    return [_row(name, timer, work[name], matmul_gflops, limits[name]) for name, timer in timers.items()]


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


def _matmul(dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    side = _GEMM_SIDE[device.type]
    a, b, out = (torch.randn(side, side, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out)


def _copy(gbytes: float, device: torch.device) -> Callable[[], object]:
    """A copy that reads and writes that many bytes together."""
    source, target = (torch.ones(int(gbytes * 1e9 / 2) + 1, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def _row(name: str, timer: _Timer, work: Work, matmul_gflops: float, copy: _Timer) -> dict[str, float | str]:
    ms = timer.percentile(50)
    limit_ms = max(1e3 * work.gflop / matmul_gflops, copy.percentile(50))
    return {
        "pass": name,
        "ms": ms,
        "ms_p20": timer.percentile(20),
        "ms_p80": timer.percentile(80),
        "gflops": 1e3 * work.gflop / ms,
        "gb_s": 1e3 * work.gbytes / ms,
        "matmul_gflops": matmul_gflops,
        "copy_gb_s": 1e3 * work.gbytes / copy.percentile(50),
        "percent_of_limit": 100 * limit_ms / ms,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


_positive.__name__ = "positive number"  # which argparse shows


def _parser() -> Parser:
    description = __doc__.split("\n\n")[0]
    parser = Parser(prog="python -m natten.profiler", description=description)
    window = {"type": numbers, "nargs": "+", "metavar": "N"}
    parser.add_argument("-i", "--size", **window, required=True, help="tokens of the map, such as 56x56")
    parser.add_argument("-b", "--batch", type=_positive, default=1, metavar="N", help="images (default: 1)")
    parser.add_argument("-n", "--heads", type=_positive, default=1, metavar="N", help="heads of the query (default: 1)")
    parser.add_argument(
        "--kv-heads", "--heads-kv", type=_positive, metavar="N", help="heads of key and value, if fewer"
    )
    parser.add_argument("-d", "--head-dim", type=_positive, default=64, metavar="N", help="head_dim (default: 64)")
    parser.add_argument("--value-dim", "--dim-value", type=_positive, metavar="N", help="head_dim of value, if another")
    parser.add_argument("-w", "--kernel-size", **window, required=True, help="tokens that a window has on each axis")
    parser.add_argument("-s", "--stride", **window, default=[(1,)], help="queries that share a window")
    parser.add_argument("--dilation", **window, default=[(1,)], help="distance between the tokens of a window")
    parser.add_argument(
        "-c", "--causal", type=int, nargs="*", metavar="AXIS", help="causal axes, from 0; all of them unless named"
    )
    parser.add_argument(
        "--window-padding", choices=WINDOW_PADDINGS, default="shift", help="at borders (default: shift)"
    )
    parser.add_argument("--additional", "--add-kv", type=_positive, default=0, metavar="N", help="additional tokens")
    parser.add_argument("--rpb", action="store_true", help="with relative position bias, in float32")
    parser.add_argument("--backward", "--backprop", action="store_true", help="the backward pass too")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cuda where there is a GPU)")
    parser.add_argument("--backend", choices=backends.NAMES, help="(default: the fastest that can)")
    parser.add_argument("--dry-run", action="store_true", help="only say which backend, kernels and tiles would run")
    parser.add_argument("--capability", metavar="X.Y", help="with --dry-run: for a GPU of this compute capability")
    parser.add_argument("--repeats", type=_positive, default=20, metavar="N", help="samples (default: 20)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def read_problem(args: argparse.Namespace) -> Problem:
    """The problem that the options describe; natten checks it when it is planned.

    Raises:
        ValueError: if the map has no axis, or more than three, or a causal axis is none of its own.
    """
    window = {name: sum(getattr(args, name), ()) for name in ("size", "kernel_size", "stride", "dilation")}
    space = window.pop("size")
    rank = len(space)
    if rank > 3 or min(space) < 1:
        raise ValueError(f"--size is {'x'.join(map(str, space))}, but must be 1 to 3 positive numbers.")
    causal = causal_axes(args.causal, rank)
    arguments = {name: values[0] if len(values) == 1 else values for name, values in window.items()}
    arguments |= {"is_causal": causal, "window_padding": args.window_padding}
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
    """Where to run, and for a dry run the GPU that is asked for in its place.

    Raises:
        ValueError: if there is no such device here, or --capability is of no use.
    """
    has_gpu = torch.cuda.is_available()
    name = args.device or ("cuda" if has_gpu or args.capability else "cpu")
    if args.capability and (name != "cuda" or not args.dry_run):
        raise ValueError("--capability goes with --dry-run, and not with --device cpu.")
    if name == "cuda" and not has_gpu and not args.capability:
        raise ValueError("there is no CUDA device here: use --device cpu, or --dry-run with --capability, such as 9.0.")
    return torch.device(name), find_gpu(args.capability) if args.capability else None


def report(problem: Problem, where: str, found: Plan, rows: Sequence[dict]) -> Iterator[str]:
    """The lines of a report for people."""
    shape = "x".join(map(str, found.shape[1:-2])), found.shape[-2], found.shape[-1]
    yield f"{found.backend} takes a map of {{}} with {{}} heads of {{}}, {problem.dtype}, on {where}".format(*shape)
    for name, reason in found.reasons.items():
        yield f"not {name}: {reason}"
    if found.kernels:
        yield from _table(found.kernels, {})
    if not rows:
        for name, work in found.work.items():
            yield f"{name}: at least {work.gflop:.4g} GFLOP, {1e3 * work.gbytes:.4g} MB"
        return
    yield from _table(rows, {"ms": ".3f", "ms_p20": ".3f", "ms_p80": ".3f"})


def _table(rows: Sequence[dict], formats: dict[str, str]) -> Iterator[str]:
    """Lines of aligned columns; floats as `formats` has them, with one digit unless it does."""
    names = list(dict.fromkeys(name for row in rows for name in row))

    def show(name: str, value: Any) -> str:
        return format(value, formats.get(name, ".1f")) if isinstance(value, float) else str(value)

    lines = [[name.replace("_", " ") for name in names]]
    lines += [[show(name, row[name]) if name in row else "-" for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def _to_json(problem: Problem, where: str, found: Plan, rows: Sequence[dict]) -> str:
    problem_json = problem._asdict() | {"dtype": str(problem.dtype).removeprefix("torch.")}
    told = {
        "problem": problem_json | problem_json.pop("arguments"),
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
    return json.dumps(told, indent=1)


def _name_device(device: torch.device, gpu: SimpleNamespace | None) -> str:
    if gpu is not None:
        return f"a GPU of compute capability {gpu.major}.{gpu.minor}, such as {gpu.name}"
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def main(argv: Sequence[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        problem, (device, gpu) = read_problem(args), find_device(args)
        backend = backends.requested(args.backend)
        found = plan(problem, device, backend, args.backward, gpu)
        rows = [] if args.dry_run else measure(problem, device, backend, found.work, args.repeats)
    except ValueError as error:
        parser.error(str(error))
    where = _name_device(device, gpu)
    print(_to_json(problem, where, found, rows) if args.json else "\n".join(report(problem, where, found, rows)))


if __name__ == "__main__":
    main()
