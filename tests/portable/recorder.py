"""Write problems for the CPU kernels, with the results of the reference backend and the goldens, to a file.

The file is independent of the kernels' C interface. It is little-endian, and every number in it is an int64 unless
another type is given. Strings are a length and bytes.

    file    "NATTEN01", cases
    case    name, op, dtype, threads, scale (float64), number of axes, axes, number of tensors, tensors
    axis    length, kernel_size, stride, dilation, is_causal
    tensor  name, is_output, dtype, offset, tolerance (float64), rounding (float64), rank, sizes, strides, data

Ops are methods, and tensors arguments, of `natten.backends.Backend`. Tensors are heads-last and have the names of
`TENSORS` in natten/backends/kernels.py, or RPB and GRAD_RPB. `offset` is the distance of the first element from an
aligned address, in elements like the strides. The data are contiguous: values of inputs in their dtype, and expected
values of outputs in float64. `tolerance` is the largest error allowed, and `rounding` the unit in which errors are
printed: the dtype's epsilon times the largest expected value, or 1 if that is smaller.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from test_natten import test_goldens
from test_natten.problems import RANKS, Problem, make_qkv, make_rpb, random_problem
from torch import Tensor

from natten.backends import reference
from natten.backends.kernels import DTYPES, with_contiguous_rows
from natten.backends.reference import shape_of_grads, split_grads
from natten.checks import make_axes
from natten.geometry import Axis

THREADS = (1, 2, 3, 7)  # of a case, by chance; the number decides how a problem is cut
_SPARE = {1: 70, 2: 24, 3: 7}  # tokens per axis beyond kernel_size * dilation, enough for several vectors of queries
_GRADS = ("GRAD_QUERY", "GRAD_KEY", "GRAD_VALUE")
_FLOAT32 = ("LSE", "GRAD_RPB")  # results in float32, whatever the dtype of the others
_FEWEST_ROUNDINGS = {torch.float32: 24, torch.bfloat16: 2, torch.float16: 2}
_HEAD_DIMS = (8, 10, 16, 32, 1, 7, 12, 20, 36, 40, 64, 72, 264)

Tensors = dict[str, Tensor]


class Recorder:
    """Writes cases to a file.

    Args:
        file: the file, opened for writing.

    Attributes:
        cases: the number of cases written.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.cases = 0
        self._file = file
        self._rng = random.Random(0)
        file.write(b"NATTEN01")

    def add(
        self,
        name: str,
        op: str,
        axes: Sequence[Axis],
        inputs: Mapping[str, Tensor | None],
        layouts: Mapping[str, Tensor] | None = None,
        scale: float = 1.0,
        golden: Mapping[str, Tensor] | None = None,
    ) -> Tensors:
        """Add a call of one op.

        Args:
            name: the name of the case in messages.
            op: a method of `natten.backends.Backend`.
            axes: the axes.
            inputs: the tensors that it reads, by name; None where the call has none.
            layouts: tensors whose strides outputs get, by name; other outputs are contiguous.
            scale: the scale of the logits.
            golden: results to expect instead of those of the reference.

        Returns:
            The results of the reference in the dtypes of the kernels, by name.
        """
        given = {name: x.detach() for name, x in inputs.items() if x is not None}
        dtype = given["QUERY" if "QUERY" in given else "VALUE"].dtype
        exact = _compute(op, axes, scale, {name: x.double() for name, x in given.items()})
        peers = _compute(op, axes, scale, given)
        threads = self._rng.choice(THREADS)
        content = [_text(name), _text(op), _ints(DTYPES[dtype], threads), _floats(scale), _ints(len(axes))]
        content += [*(_ints(*axis) for axis in axes), _ints(len(given) + len(exact))]
        content += [_tensor(name, x, x.dtype, x) for name, x in given.items()]
        for result, expected in exact.items():
            kept = torch.float32 if result in _FLOAT32 else dtype
            tolerance, rounding = _tolerance(expected, peers[result], kept)
            if golden is not None:
                expected, tolerance = golden[result].double(), test_goldens.TOLERANCE
            layout = (layouts or {}).get(result, expected)
            content.append(_tensor(result, layout, kept, expected, tolerance, rounding))
        self._file.write(b"".join(content))
        self.cases += 1
        return {name: x.to(torch.float32 if name in _FLOAT32 else dtype) for name, x in exact.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The format
# ---------------------------------------------------------------------------------------------------------------------


def _ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _floats(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}d", *values)


def _text(text: str) -> bytes:
    return _ints(len(text.encode())) + text.encode()


def _tensor(
    name: str, layout: Tensor, dtype: torch.dtype, data: Tensor, tolerance: float | None = None, rounding: float = 0.0
) -> bytes:
    """Return a tensor with the strides of `layout`. Those with a tolerance are outputs."""
    numbers = _ints(tolerance is not None, DTYPES[dtype], layout.storage_offset() % 16) + _floats(
        tolerance or 0.0, rounding
    )
    shape = _ints(layout.dim(), *layout.shape, *layout.stride())
    return _text(name) + numbers + shape + data.contiguous().view(torch.uint8).numpy().tobytes()


# ---------------------------------------------------------------------------------------------------------------------
# Expected results
# ---------------------------------------------------------------------------------------------------------------------


def _tolerance(expected: Tensor, peer: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest error allowed, and the size of one rounding.

    The error may be four times the largest of the reference in the same dtype. Where that is almost exact by chance, it
    may be 24 roundings in float32, for another order of summation, and 2 in the other dtypes.
    """
    is_finite = expected.isfinite()
    expected, peer = expected[is_finite], peer.double()[is_finite]
    if not expected.numel():
        return 0.0, 1.0
    rounding = torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
    return max(4 * (peer - expected).abs().max().item(), _FEWEST_ROUNDINGS[dtype] * rounding), rounding


def _compute(op: str, axes: Sequence[Axis], scale: float, inputs: Tensors) -> Tensors:
    """Return the results of the reference, heads-last."""
    get = inputs.get
    q, k, v, rpb = (get(name) for name in ("QUERY", "KEY", "VALUE", "RPB"))
    if op == "attention":
        out, lse = reference.attention(q, k, v, rpb, axes, scale)
        return {"OUT": out, "LSE": lse}
    if op == "attention_backward":
        grads, grad_rpb = reference.attention_backward(
            inputs["GRAD_OUT"], get("GRAD_LSE"), q, k, v, rpb, inputs["OUT"], inputs["LSE"], axes, scale
        )
        results = dict(zip(_GRADS, split_grads(grads, q, k, v), strict=True))
        return results if grad_rpb is None else results | {"GRAD_RPB": grad_rpb}
    q, k, v, attn, grad_out, grad_attn = (
        None if x is None else x.movedim(-2, 1) for x in (q, k, v, get("ATTN"), get("GRAD_OUT"), get("GRAD_ATTN"))
    )
    if op == "query_key":
        found = {"ATTN": reference.query_key(q, k, rpb, axes)}
    elif op == "query_key_backward":
        grad_q, grad_k, grad_rpb = reference.query_key_backward(grad_attn, q, k, rpb, axes)
        found = {"GRAD_QUERY": grad_q, "GRAD_KEY": grad_k}
    elif op == "weight_value":
        found = {"OUT": reference.weight_value(attn, v, axes)}
    else:
        grad_attn, grad_v = reference.weight_value_backward(grad_out, attn, v, axes)
        found = {"GRAD_ATTN": grad_attn, "GRAD_VALUE": grad_v}
    results = {name: x.movedim(1, -2) for name, x in found.items()}
    if op == "query_key_backward" and grad_rpb is not None:
        results["GRAD_RPB"] = grad_rpb
    return results


# ---------------------------------------------------------------------------------------------------------------------
# Problems
# ---------------------------------------------------------------------------------------------------------------------

_PUBLISHED = (  # space, heads, head_dim, kernel_size, dilation: stages of NAT and DiNAT, and large windows
    ((56, 56), 1, 32, 7, 1),
    ((56, 56), 1, 32, 7, 8),
    ((28, 28), 2, 32, 7, 4),
    ((14, 14), 3, 32, 7, 2),
    ((7, 7), 4, 32, 7, 1),
    ((31, 29), 1, 64, 13, 1),
    ((700,), 1, 32, 63, 1),
    ((8, 12, 14), 1, 32, (5, 7, 7), 1),
)
_GROUPED = (
    (8, 2, 32, 64),
    (4, 1, 10, 20),
    (3, 3, 36, 14),
    (6, 2, 16, 16),
)  # heads, key heads, head_dim, value head_dim


def record(path: Path, is_quick: bool = False) -> int:
    """Write problems of all kinds to a file.

    Args:
        path: the file.
        is_quick: whether to write only a few problems of each kind.

    Returns:
        The number of cases.
    """
    with path.open("wb") as file:
        recorder = Recorder(file)
        add_goldens(recorder)
        for rank in RANKS:
            for seed in range(4 if is_quick else 30):
                for dtype in DTYPES if seed % 2 == 0 else [torch.float32]:
                    add_random(recorder, rank, seed, dtype)
            for sizes in _GROUPED:
                add_grouped(recorder, rank, *sizes)
        for problem in () if is_quick else _PUBLISHED:
            add_published(recorder, *problem)
        return recorder.cases


def add_goldens(recorder: Recorder) -> None:
    """Add the fused goldens."""
    for case in test_goldens.CASES:
        qkv, rpb, grad_out = test_goldens.make_inputs(case)
        golden = test_goldens.load(case["tag"])
        q, k, v, grad_out = (x.detach().movedim(1, -2) for x in (*qkv, grad_out))
        out, lse = golden["out"].movedim(1, -2), golden["lse"].movedim(1, -1)
        axes, scale = make_axes(case["shape"], case["kernel"], 1, case["dilation"], case["causal"]), case["d"] ** -0.5
        name, inputs = f"golden {case['tag']}", {"QUERY": q, "KEY": k, "VALUE": v, "RPB": rpb}
        recorder.add(name, "attention", axes, inputs, None, scale, {"OUT": out, "LSE": lse})
        grads = {name: golden[short].movedim(1, -2) for name, short in zip(_GRADS, ("dq", "dk", "dv"), strict=True)}
        if rpb is not None:
            grads["GRAD_RPB"] = golden["drpb"]
        inputs |= {"OUT": out, "LSE": lse, "GRAD_OUT": grad_out}
        recorder.add(name, "attention_backward", axes, inputs, None, scale, grads)


def add_random(recorder: Recorder, rank: int, seed: int, dtype: torch.dtype) -> None:
    """Add the random problem with this seed, fused and, where it has no stride, unfused."""
    rng, generator = random.Random(f"portable-{rank}-{seed}"), torch.Generator().manual_seed(seed)
    problem = random_problem(rank, seed, spare=rng.choice((0, 4, _SPARE[rank])))
    problem = problem._replace(head_dim=_HEAD_DIMS[seed % len(_HEAD_DIMS)])
    layout = _misaligned if rng.random() < 0.3 else with_contiguous_rows
    qkv, rpb = [layout(x.detach()) for x in make_qkv(problem, dtype)], make_rpb(problem, torch.float32)
    _add_fused(recorder, f"random {rank}-{seed}", _axes(problem), qkv, rpb, generator, layout)
    if max(problem.window.stride) == 1:
        _add_unfused(recorder, f"random {rank}-{seed}", _axes(problem), qkv, rpb, generator, layout)


def add_grouped(recorder: Recorder, rank: int, heads: int, key_heads: int, dim: int, value_dim: int) -> None:
    """Add a fused problem with fewer key heads, or another head_dim of the value."""
    generator = torch.Generator().manual_seed(dim)
    problem = random_problem(rank, dim)._replace(batch=1, heads=heads, has_rpb=True)
    shapes = (heads, dim), (key_heads, dim), (key_heads, value_dim)
    qkv = [_randn(generator, 1, *problem.space, *last) for last in shapes]
    rpb = make_rpb(problem, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        name = f"grouped {rank}-{heads}-{key_heads}-{dim}-{value_dim}"
        _add_fused(recorder, name, _axes(problem), [x.to(dtype) for x in qkv], rpb, generator)


def add_published(
    recorder: Recorder,
    space: tuple[int, ...],
    heads: int,
    dim: int,
    kernel_size: int | tuple[int, ...],
    dilation: int,
) -> None:
    """Add a fused problem without stride, in all dtypes."""
    generator = torch.Generator().manual_seed(0)
    axes = make_axes(space, kernel_size, 1, dilation, False)
    qkv = [_randn(generator, 1, *space, heads, dim) for _ in range(3)]
    rpb = _randn(generator, heads, *(2 * axis.kernel_size - 1 for axis in axes))
    for dtype in DTYPES:
        name = f"published {'x'.join(map(str, space))} {kernel_size} {dilation}"
        _add_fused(recorder, name, axes, [x.to(dtype) for x in qkv], rpb, generator)


def _axes(problem: Problem) -> tuple[Axis, ...]:
    return make_axes(problem.space, *problem.window)


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _misaligned(x: Tensor) -> Tensor:
    """Return a copy whose rows start at odd addresses and have gaps between them."""
    return x.new_empty((*x.shape[:-1], x.shape[-1] + 4))[..., 1:-3].copy_(x)


def _add_fused(
    recorder: Recorder,
    name: str,
    axes: Sequence[Axis],
    qkv: Sequence[Tensor],
    rpb: Tensor | None,
    generator: torch.Generator,
    layout: Callable[[Tensor], Tensor] = with_contiguous_rows,
) -> None:
    q, k, v = qkv
    inputs, scale = {"QUERY": q, "KEY": k, "VALUE": v, "RPB": rpb}, q.shape[-1] ** -0.5
    like_out = {"OUT": layout(v.new_empty((*q.shape[:-1], v.shape[-1])))}
    results = recorder.add(name, "attention", axes, inputs, like_out, scale)
    grad_out = layout(_randn(generator, *results["OUT"].shape).to(q.dtype))
    grad_lse = _randn(generator, *results["LSE"].shape) if recorder.cases % 3 == 0 else None
    like_grads = split_grads(q.new_empty(shape_of_grads(q, k, v)), q, k, v)  # packed, as the backend returns them
    layouts = dict(zip(_GRADS, like_grads, strict=True))
    inputs |= {"OUT": layout(results["OUT"]), "LSE": results["LSE"], "GRAD_OUT": grad_out, "GRAD_LSE": grad_lse}
    recorder.add(name, "attention_backward", axes, inputs, layouts, scale)


def _add_unfused(
    recorder: Recorder,
    name: str,
    axes: Sequence[Axis],
    qkv: Sequence[Tensor],
    rpb: Tensor | None,
    generator: torch.Generator,
    layout: Callable[[Tensor], Tensor],
) -> None:
    q, k, v = qkv
    qk = {"QUERY": q, "KEY": k, "RPB": rpb}
    like_attn = layout(q.new_empty((*q.shape[:-1], prod([axis.kernel_size for axis in axes]))))
    logits = recorder.add(name, "query_key", axes, qk, {"ATTN": like_attn})["ATTN"]
    attn = layout(logits.float().softmax(-1).to(q.dtype))
    grad_attn = layout(_randn(generator, *attn.shape).to(q.dtype).masked_fill(logits.isinf(), 0.0))
    layouts = {name: layout(torch.empty_like(x)) for name, x in zip(_GRADS, qkv, strict=True)}
    recorder.add(name, "query_key_backward", axes, qk | {"GRAD_ATTN": grad_attn}, layouts)
    av = {"ATTN": attn, "VALUE": v}
    recorder.add(name, "weight_value", axes, av, {"OUT": layout(torch.empty_like(v))})
    grad_out = layout(_randn(generator, *v.shape).to(v.dtype))
    recorder.add(name, "weight_value_backward", axes, av | {"GRAD_OUT": grad_out}, layouts | {"GRAD_ATTN": like_attn})
