"""The parts of tools/gpu_check.sh: correctness, speed of the operator, of the layer and of whole models on a GPU.

    python tools/gpu_check.py operators --seconds 130 --rows output/gpu/rows.txt

Each line that it adds to the file of rows is a row of the table to come: part | what | result. Times are medians of
CUDA events around replays of a CUDA graph (around calls where a graph cannot be made), over several sets of inputs that
together exceed the L2 cache. The floor is the least traffic over the rate of a large copy, or the least work over the
rate of a large bfloat16 matrix product, whichever is longer; both rates are measured first.
`--rehearse` runs all parts on the CPU with tiny shapes, to see that they run.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import natten  # noqa: E402
from natten import dispatch  # noqa: E402
from natten.geometry import make_axes  # noqa: E402

L2_BYTES = 64 << 20
RANDOM_PROBLEMS_PER_RANK = 1000
SOAK_STEPS = 10_000


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


def ceilings(check: Check) -> tuple[float, float]:
    """Bytes and floating-point operations a millisecond: a copy, and a product of bfloat16 matrices."""
    size, side = (1 << 20, 128) if check.rehearse else (1 << 31, 8192)
    source, target = (torch.ones(size, dtype=torch.uint8, device=check.device) for _ in range(2))
    copy_ms = check.milliseconds([lambda: target.copy_(source)])
    a, b = (torch.randn(side, side, device=check.device).bfloat16() for _ in range(2))
    matrix_ms = check.milliseconds([lambda: a @ b])
    check.row("ceilings", "copy", f"{2 * size / copy_ms / 1e9:.2f} TB/s")
    check.row("ceilings", "bf16 matrix product", f"{2 * side**3 / matrix_ms / 1e9:.0f} TFLOP/s")
    return 2 * size / copy_ms, 2 * side**3 / matrix_ms


# ---------------------------------------------------------------------------------------------------------------------
# Correctness
# ---------------------------------------------------------------------------------------------------------------------


def correctness(check: Check) -> None:
    for what, part in (
        ("first call of a specialisation", _first_call),
        ("goldens", _goldens),
        ("same from run to run", _determinism),
        ("CUDA graph", _capture),
        ("another stream", _streams),
        ("bf16 soak", _soak),
        ("random problems", _random_problems),
    ):
        with check.guarded("correctness", what):
            if check.has_time("correctness", what):
                part(check, what)


def _tensors(check: Check, batch, space, heads, dim, kernel_size, dtype=torch.bfloat16, seed=0, has_rpb=True):
    """A packed qkv as the models have it, a bias table or None, and the axes' window."""
    generator = torch.Generator(check.device).manual_seed(seed)
    kernel_size = (kernel_size,) * len(space) if isinstance(kernel_size, int) else kernel_size
    options = {"generator": generator, "device": check.device}
    qkv = torch.randn(batch, *space, 3, heads, dim, **options).to(dtype)
    rpb = torch.randn(heads, *(2 * k - 1 for k in kernel_size), **options) if has_rpb else None
    return qkv, rpb


def _step(check: Check, qkv: Tensor, rpb: Tensor | None, backend: str, *window, seed: int = 1) -> list[Tensor]:
    """Output, logsumexp and the gradients of qkv and rpb."""
    rank = qkv.dim() - 4
    attend = getattr(natten, f"na{rank}d_qkvpacked")
    leaves = [x.detach().requires_grad_() for x in (qkv, rpb) if x is not None]
    bias = leaves[1] if rpb is not None else None
    out, lse = attend(leaves[0], *window, rpb=bias, return_lse=True, backend=backend)
    generator = torch.Generator(check.device).manual_seed(seed)
    sent = [torch.randn(x.shape, generator=generator, device=check.device).to(x.dtype) for x in (out, lse)]
    return [out, lse, *torch.autograd.grad((out, lse), leaves, sent)]


def _first_call(check: Check, what: str) -> None:
    qkv, rpb = _tensors(check, 2, (20, 20), 2, 32, 7)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        with torch.no_grad():
            natten.na2d_qkvpacked(qkv, 7, rpb=rpb, backend=check.backend)
        check.synchronize()
        times.append(time.perf_counter() - start)
        if not check.rehearse:
            from natten import cuda_driver

            cuda_driver._functions.clear()  # the next finds it in the cache
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
            qkv, rpb = _tensors(check, *shape)
            one, other = (_step(check, qkv, rpb, check.backend, shape[4]) for _ in range(2))
            results.append(all(torch.equal(x, y) for x, y in zip(one, other, strict=True)))
    finally:
        torch.use_deterministic_algorithms(False)
    check.failed |= not all(results)
    check.row("correctness", what, f"bit-equal: small table {results[0]}, large table {results[1]}")


def _capture(check: Check, what: str) -> None:
    if check.rehearse:
        return
    qkv, rpb = _tensors(check, 2, (24, 24), 2, 32, 5)
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
    problems = [_tensors(check, 8, (28, 28), 4, 32, 7, seed=seed) for seed in range(4)]
    expected = [_step(check, *problem, "cuda", 7) for problem in problems]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in problems], []
    for stream, problem in zip(streams, problems, strict=True):
        with torch.cuda.stream(stream):
            found.append(_step(check, *problem, "cuda", 7))
    torch.cuda.synchronize()
    pairs = [(x, y) for one, other in zip(expected, found, strict=True) for x, y in zip(one, other, strict=True)]
    is_equal = all(torch.equal(x, y) for x, y in pairs)
    check.failed |= not is_equal
    check.row("correctness", what, f"four streams at once, equal: {is_equal}")


def _soak(check: Check, what: str) -> None:
    steps, done = 3 if check.rehearse else SOAK_STEPS, 0
    qkv, rpb = _tensors(check, 2, (14, 14), 2, 32, 7)
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


# Dtype, its rounding, and what PyTorch may do to products of float32 matrices.
_PRECISIONS = {
    "bfloat16": (torch.bfloat16, 2.0**-7, "highest"),
    "float16": (torch.float16, 2.0**-10, "highest"),
    "float32": (torch.float32, 2.0**-23, "highest"),
    "tf32": (torch.float32, 2.0**-10, "high"),
}


@contextmanager
def _float32_products(setting: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _kernels(cells, gpu) -> set:
    """What problems of all cells launch."""
    from natten.backends import cuda

    kernels, (batch, heads) = set(), _BATCHES[0]  # the others have as many maps, so the same tiles
    for _, window, space, dim, precision, has_rpb in cells:
        dtype, _, products = _PRECISIONS[precision]
        query = torch.empty(batch, *space, heads, dim, dtype=dtype, device="meta")
        with _float32_products(products):
            for kind in ("attention", "attention_backward"):
                kernels |= {step.kernel for step in cuda.launches(kind, query, make_axes(space, *window), has_rpb, gpu)}
    return kernels


def _compile_ahead(check: Check, cells) -> None:
    """Compiles the kernels of all cells on all cores, where one problem after another would wait for its own."""
    from natten import cuda_driver, profiler

    if check.rehearse:
        print(f"{len(_kernels(cells, profiler.find_gpu('9.0')))} kernels would be compiled")
        return
    start, gpu = time.monotonic(), torch.cuda.get_device_properties(0)
    kernels = _kernels(cells, gpu)
    cuda_driver.machine_codes(kernels, (gpu.major, gpu.minor))
    check.row("correctness", "compilation", f"{len(kernels)} kernels in {time.monotonic() - start:.0f} s, on all cores")


def _random_problems(check: Check, what: str) -> None:
    """Errors, against float64, of ours and of the reference with the same numbers."""
    precisions = ("float32",) if check.rehearse else tuple(_PRECISIONS)
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
        dtype, eps, products = _PRECISIONS[name]
        batch, heads = _BATCHES[count // len(cells) % len(_BATCHES)]
        count += 1
        counts[rank] += 1
        kernel_size = make_axes((1 << 20,) * rank, *window)
        kernel_size = tuple(axis.kernel_size for axis in kernel_size)
        qkv, rpb = _tensors(check, batch, space, heads, dim, kernel_size, dtype, count, has_rpb)
        exact = _step(check, qkv.double(), None if rpb is None else rpb.double(), "reference", *window, seed=count)
        with _float32_products(products):
            peers = _step(check, qkv, rpb, "reference", *window, seed=count)
            found = _step(check, qkv, rpb, check.backend, *window, seed=count)
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


def sanitizer(check: Check) -> None:
    """Small calls of every kind of kernel, to be run under compute-sanitizer."""
    for precision in ("bfloat16", "float32", "tf32"):
        dtype = torch.float32 if check.rehearse else _PRECISIONS[precision][0]
        for space, dim, window in (
            ((11, 13), 32, (5, 1, (1, 2), False)),
            ((9, 17), 24, ((3, 4), 2, 1, (True, False))),
            ((100,), 16, (70,)),
            ((4, 5, 9), 16, (3,)),
            ((5, 20, 20), 32, (5,)),
        ):
            kernel_size = tuple(axis.kernel_size for axis in make_axes((1 << 20,) * len(space), *window))
            qkv, rpb = _tensors(check, 1, space, 2, dim, kernel_size, dtype)
            with _float32_products(_PRECISIONS[precision][2]):
                _step(check, qkv, rpb, check.backend, *window)
    q, k, v = (torch.randn(1, 2, 9, 11, 8, device=check.device, requires_grad=True) for _ in range(3))
    rpb = torch.randn(2, 5, 5, device=check.device, requires_grad=True)
    attn = natten.na2d_qk(q, k, 3, 2, rpb=rpb, backend=check.backend).softmax(-1)
    natten.na2d_av(attn, v, 3, 2, backend=check.backend).sum().backward()
    check.synchronize()


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------

# Name, as tools/benchmark.py writes shapes, and whether flex_attention is timed too.
_CASES = (
    ("b128_56x56_h2_d32_k7", True),
    ("b128_56x56_h2_d32_k7_norpb", True),
    ("b128_28x28_h4_d32_k7", False),
    ("b128_14x14_h8_d32_k7", True),
    ("b128_7x7_h16_d32_k7", False),
    ("b128_56x56_h2_d32_k7_dil8", False),
    ("b128_28x28_h4_d32_k7_dil4", False),
    ("b128_14x14_h8_d32_k7_dil2", False),
    ("b8_200x304_h2_d32_k7", False),
    ("b128_56x56_h2_d32_k13", False),
    ("b128_56x56_h2_d64_k7", False),
    ("b64_56x56_h2_d128_k7", False),
    ("b1_32768_h4_d64_k2047", False),
    ("b4_16x32x32_h4_d32_k5x7x7", False),
)
_TINY_CASES = (("b1_9x9_h2_d8_k3", True), ("b1_40_h1_d8_k7", False))


def operators(check: Check) -> None:
    from benchmarks import ops

    copy_rate, matrix_rate = ceilings(check)
    cases = _TINY_CASES if check.rehearse else _CASES
    for name, has_flex in cases:
        with check.guarded("operator", name):
            if check.has_time("operator", name):
                _time_operator(check, ops.parse(name), name, copy_rate, matrix_rate)
        for precision in ("float32", "tf32") if name == cases[0][0] else ():
            with check.guarded("operator", f"{name} {precision}"), _float32_products(_PRECISIONS[precision][2]):
                if check.has_time("operator", f"{name} {precision}"):
                    _time_operator(check, ops.parse(name), name, copy_rate, matrix_rate, precision)
        if has_flex:
            for pass_name in ("forward",) if check.rehearse else ("forward", "forward+backward"):
                with check.guarded("flex_attention", name):
                    if check.has_time("flex_attention", name, 25):
                        _time_flex(check, name, pass_name)


def operator_calls(check: Check, case, dtype: torch.dtype) -> tuple[list[Callable[[], object]], ...]:
    """Forward and backward passes of the operator, on several inputs that together exceed the L2 cache."""
    kernel_size = tuple(axis.kernel_size for axis in case.axes)
    shape = (case.batch, case.space, case.heads, case.head_dim, kernel_size)
    bytes_of_qkv = 3 * case.batch * case.heads * case.head_dim * dtype.itemsize * math.prod(case.space)
    scale, forward, backward = case.head_dim**-0.5, [], []
    for seed in range(max(2, min(6, -(-2 * L2_BYTES // bytes_of_qkv)))):
        qkv, rpb = _tensors(check, *shape, dtype, seed, case.has_rpb)
        given = (*qkv.unbind(-3), rpb)
        module = dispatch.choose(given[0], check.backend)
        out, lse = module.attention(*given, case.axes, scale)
        forward.append(lambda module=module, given=given: module.attention(*given, case.axes, scale))
        saved = (torch.randn_like(out), None, *given, out, lse)
        backward.append(lambda module=module, saved=saved: module.attention_backward(*saved, case.axes, scale))
    return forward, backward


def _time_operator(check: Check, case, name: str, copy_rate: float, matrix_rate: float, precision="bfloat16") -> None:
    dtype = torch.float32 if check.rehearse else _PRECISIONS[precision][0]
    forward, backward = operator_calls(check, case, dtype)
    numbers = case.batch * math.prod(case.space) * case.heads * case.head_dim
    tokens, pairs = numbers * dtype.itemsize, numbers * math.prod(axis.kernel_size for axis in case.axes)
    for pass_name, calls, tensors, products in (("forward", forward, 4, 4), ("backward", backward, 8, 10)):
        floor = max(tensors * tokens / copy_rate, products * pairs / matrix_rate)
        ms = check.milliseconds(calls)
        share = products * pairs / matrix_rate / ms
        result = f"{ms * 1e3:.0f} us = {ms / floor:.2f} x floor ({floor * 1e3:.0f} us), {share:.0%} of matrix rate"
        label = "" if precision == "bfloat16" else f" {precision}"
        check.row("operator", f"{name}{label} {pass_name}", result)


def _time_flex(check: Check, name: str, pass_name: str) -> None:
    from benchmarks import ops
    from benchmarks.entry import Entry, Setting

    dtype = "float32" if check.rehearse else "bfloat16"
    entry = Entry("ops", name, name, "flex_attention", pass_name, Setting(dtype, 1, str(check.device)))
    subject = ops.make(entry)
    ms = check.milliseconds([subject.run], graph=False)
    check.row("flex_attention", f"{name} {pass_name}", f"{ms * 1e3:.0f} us")


def layers(check: Check) -> None:
    from benchmarks import layers as benched
    from benchmarks import ops

    batch = 1 if check.rehearse else 128
    for side, heads in ((14, 2),) if check.rehearse else ((56, 2), (28, 4), (14, 8), (7, 16)):
        name = f"b{batch}_{side}x{side}_h{heads}_d32_k7"
        case, results = ops.parse(name), {}
        for what, make in (
            ("natten", lambda case=case: benched.make_natten(case, check.backend)),
            ("window", lambda case=case: benched.make_swin(case, False)),
            ("shifted", lambda case=case: benched.make_swin(case, True)),
        ):
            if what == "shifted" and side == 7:
                continue
            with check.guarded("layer", f"{name} {what}"):
                if check.has_time("layer", f"{name} {what}"):
                    results[what] = _time_layer(check, case, *make())
        if "natten" not in results:
            continue
        ours, our_peak = results["natten"]
        for what, (ms, peak) in results.items():
            ratio = f", {ms / ours:.2f} x natten's time, natten's peak {our_peak / max(peak, 1e-9):.2f} x this"
            text = f"{ms:.3f} ms, peak {peak:.0f} MB" + (ratio if what != "natten" else "")
            check.row("layer", f"{side}x{side} forward+backward {what}", text)


def _time_layer(check: Check, case, module, layer) -> tuple[float, float]:
    """Milliseconds of forward and backward, and peak memory in MB beyond what was there before."""
    dtype = torch.float32 if check.rehearse else torch.bfloat16
    parameters = list(module.to(check.device, dtype).parameters())
    inputs = []
    for _ in range(3):
        x = torch.randn(case.batch, *case.space, case.heads * case.head_dim, device=check.device).to(dtype)
        inputs.append(x.requires_grad_())
    grad = torch.randn_like(inputs[0])

    def step(x: Tensor) -> None:
        torch.autograd.grad(layer(x), [x, *parameters], grad)

    ms = check.milliseconds([lambda x=x: step(x) for x in inputs])
    if check.rehearse:
        return ms, 1.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(inputs[0])
    torch.cuda.synchronize()
    return ms, (torch.cuda.max_memory_allocated() - before) / 1e6


def models(check: Check) -> None:
    """nat_tiny against swin_tiny: compiled inference, latency of one image, training steps."""
    batch, side = (1, 64) if check.rehearse else (128, 224)
    for what, measure, better in (
        ("inference, compiled, images/s", _inference, "higher"),
        ("batch 1, CUDA graph, ms", _latency, "lower"),
        ("training step, eager, images/s", _training, "higher"),
        ("training step, compiled, images/s", _compiled_training, "higher"),
    ):
        results = {}
        for name in ("nat_tiny", "swin_tiny_patch4_window7_224"):
            with check.guarded("model", f"{what} {name}"):
                if check.has_time("model", f"{what} {name}", 25):
                    results[name] = measure(check, _model(check, name, side), batch, side)
            if not check.rehearse:
                torch.cuda.empty_cache()
        if len(results) < 2:
            continue
        (ours, our_peak), (theirs, their_peak) = results.values()
        text = f"{ours:.4g} against {theirs:.4g} = {ours / theirs:.2f} x ({better} is better)"
        if their_peak:
            text += f", peak memory {our_peak / their_peak:.2f} x"
        check.row("model", what, text)


def _model(check: Check, name: str, side: int):
    import timm

    import natzoo  # noqa: F401  registers our models

    torch._dynamo.reset()
    torch.manual_seed(0)
    options = {"img_size": side} if name.startswith("swin") and side != 224 else {}
    model = timm.create_model(name, **options).to(check.device)
    return model if check.rehearse else model.to(memory_format=torch.channels_last)


def _images(check: Check, batch: int, side: int) -> Tensor:
    return torch.randn(batch, 3, side, side, device=check.device)


@torch.inference_mode()
def _inference(check: Check, model, batch: int, side: int) -> tuple[float, float]:
    dtype = torch.float32 if check.rehearse else torch.bfloat16
    model = model.eval().to(dtype)
    run = model if check.rehearse else torch.compile(model)
    x = _images(check, batch, side).to(dtype)
    return batch / check.milliseconds([lambda: run(x)], graph=False) * 1e3, 0.0


@torch.inference_mode()
def _latency(check: Check, model, batch: int, side: int) -> tuple[float, float]:
    dtype = torch.float32 if check.rehearse else torch.bfloat16
    model, x = model.eval().to(dtype), _images(check, 1, side).to(dtype)
    return check.milliseconds([lambda: model(x)]), 0.0


def _training(check: Check, model, batch: int, side: int, compiled: bool = False) -> tuple[float, float]:
    model.train()
    run = torch.compile(model) if compiled and not check.rehearse else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x, target = _images(check, batch, side), torch.arange(batch, device=check.device)

    def step() -> None:
        with torch.autocast(check.device.type, torch.bfloat16, enabled=not check.rehearse):
            loss = torch.nn.functional.cross_entropy(run(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if not check.rehearse:
        torch.cuda.reset_peak_memory_stats()
    rate = batch / check.milliseconds([step], repeats=8, graph=False) * 1e3
    return rate, 0.0 if check.rehearse else float(torch.cuda.max_memory_allocated())


def _compiled_training(check: Check, model, batch: int, side: int) -> tuple[float, float]:
    return _training(check, model, batch, side, compiled=True)


PARTS = {part.__name__: part for part in (correctness, sanitizer, operators, layers, models)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--seconds", type=float, default=600.0, help="about how long it may take")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="file to add rows to")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    args = parser.parse_args(argv)
    if not args.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --rehearse runs on the CPU")
    check = Check(args.seconds, args.rows, args.rehearse)
    PARTS[args.part](check)
    return int(check.failed)


if __name__ == "__main__":
    sys.exit(main())
