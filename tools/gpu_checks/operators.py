"""Times of the operator on a GPU, beside what its traffic and its work take at least, and beside flex_attention."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from benchmarks import ops
from benchmarks.entry import Entry, Setting

from natten import backends

from .check import PRECISIONS, Check, float32_products, make_inputs

L2_BYTES = 64 << 20


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
_TINY_CASES = (("b1_9x9_h2_d8_k3", True), ("b1_9x9_h2_d8_k3_norpb", False), ("b1_40_h1_d8_k7", False))


def operators(check: Check) -> None:
    copy_rate, matrix_rate = ceilings(check)
    times: dict[str, tuple[float, float]] = {}  # milliseconds of forward and backward
    cases = _TINY_CASES if check.rehearse else _CASES
    for name, has_flex in cases:
        with check.guarded("operator", name):
            if check.has_time("operator", name):
                times[name] = _time_operator(check, name, copy_rate, matrix_rate)
        for precision in ("float32", "tf32") if name == cases[0][0] else ():
            with check.guarded("operator", f"{name} {precision}"), float32_products(PRECISIONS[precision][2]):
                if check.has_time("operator", f"{name} {precision}"):
                    _time_operator(check, name, copy_rate, matrix_rate, precision)
        if has_flex and name in times:
            _compare_flex(check, name, *times[name])
    _compare_bias(check, times)


def operator_calls(check: Check, case, dtype: torch.dtype) -> tuple[list[Callable[[], object]], ...]:
    """Forward and backward passes of the operator, on several inputs that together exceed the L2 cache."""
    kernel_size = tuple(axis.kernel_size for axis in case.axes)
    shape = (case.batch, case.space, case.heads, case.head_dim, kernel_size)
    bytes_of_qkv = 3 * case.batch * case.heads * case.head_dim * dtype.itemsize * math.prod(case.space)
    scale, forward, backward = case.head_dim**-0.5, [], []
    for seed in range(max(2, min(6, -(-2 * L2_BYTES // bytes_of_qkv)))):
        qkv, rpb = make_inputs(check, *shape, dtype, seed, case.has_rpb)
        given = (*qkv.unbind(-3), rpb)
        module = backends.choose(given[0], check.backend)
        out, lse = module.attention(*given, case.axes, scale)
        forward.append(lambda module=module, given=given: module.attention(*given, case.axes, scale))
        saved = (torch.randn_like(out), None, *given, out, lse)
        backward.append(lambda module=module, saved=saved: module.attention_backward(*saved, case.axes, scale))
    return forward, backward


def _time_operator(
    check: Check, name: str, copy_rate: float, matrix_rate: float, precision: str = "bfloat16"
) -> tuple[float, float]:
    case = ops.parse(name)
    dtype = torch.float32 if check.rehearse else PRECISIONS[precision][0]
    numbers = case.batch * math.prod(case.space) * case.heads * case.head_dim
    tokens, pairs = numbers * dtype.itemsize, numbers * math.prod(axis.kernel_size for axis in case.axes)
    label = name if precision == "bfloat16" else f"{name} {precision}"
    times = []
    for pass_name, calls, tensors, products in zip(
        ("forward", "backward"), operator_calls(check, case, dtype), (4, 8), (4, 10), strict=True
    ):
        floor = max(tensors * tokens / copy_rate, products * pairs / matrix_rate)
        ms = check.milliseconds(calls)
        share = products * pairs / matrix_rate / ms
        result = f"{ms * 1e3:.0f} us = {ms / floor:.2f} x floor ({floor * 1e3:.0f} us), {share:.0%} of matrix rate"
        check.row("operator", f"{label} {pass_name}", result)
        times.append(ms)
    return times[0], times[1]


def _compare_flex(check: Check, name: str, forward: float, backward: float) -> None:
    passes = {"forward": forward, "forward+backward": forward + backward}
    setting = Setting("float32" if check.rehearse else "bfloat16", 1, str(check.device))
    if check.rehearse:
        del passes["forward+backward"]  # which flex_attention has not on CPUs
    for pass_name, ours in passes.items():
        what = f"{name} {pass_name}"
        with check.guarded("flex_attention", what):
            if check.has_time("flex_attention", what, 25):
                entry = Entry("ops", name, name, "flex_attention", pass_name, setting)
                ms = check.milliseconds([ops.make(entry).run], graph=False)
                check.row("flex_attention", what, f"{ms * 1e3:.0f} us = {ms / ours:.2f} x natten's time")


def _compare_bias(check: Check, times: dict[str, tuple[float, float]]) -> None:
    for name in times:
        if f"{name}_norpb" in times:
            ratios = (on / off for on, off in zip(times[name], times[f"{name}_norpb"], strict=True))
            forward, backward = (f"{ratio:.2f}" for ratio in ratios)
            check.row("operator", f"{name} bias on over off", f"forward {forward} x, backward {backward} x")
