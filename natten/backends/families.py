"""Kernel families, and a small problem for each, whose results are compared with those of the reference.

A family is a set of kernels that share their source, their instructions and their dtype, and differ only in sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import inf, isnan, nan, prod
from typing import NamedTuple

import torch
from torch import Tensor

from natten.backends import reference
from natten.backends.kernels import KernelBackend
from natten.backends.reference import split_grads
from natten.geometry import Axis

PASSES = ("forward", "backward", "unfused")


class Precision(NamedTuple):
    """How the kernels of a family compute.

    Attributes:
        dtype: of the tensors.
        limit: of errors, relative to the largest number of a result: several roundings of the dtype. A single column
            too many or too few exceeds it.
    """

    dtype: torch.dtype
    limit: float


PRECISIONS = {
    "float32": Precision(torch.float32, 2e-5),
    "tf32": Precision(torch.float32, 4e-3),
    "bfloat16": Precision(torch.bfloat16, 2e-2),
    "float16": Precision(torch.float16, 3e-3),
}

# A problem with borders on all sides, partial tiles, two residue classes of different lengths, and a causal axis: 4
# images of 21 x 17 tokens, 2 heads.
_BATCH, _HEADS, _DIM = 4, 2, 16
_AXES = (Axis(21, 4, 1, 2, False), Axis(17, 3, 1, 1, True))
_SCALE = _DIM**-0.5


class Family(NamedTuple):
    """A kernel family.

    Attributes:
        pass_name: one of PASSES; "unfused" includes both directions.
        precision: a key of PRECISIONS.
        has_matrix_instructions: whether the kernels use tensor cores.
    """

    pass_name: str
    precision: str
    has_matrix_instructions: bool = False

    def __str__(self) -> str:
        return f"{self.pass_name} {self.precision}{', matrix instructions' if self.has_matrix_instructions else ''}"


def families(precisions: tuple[str, ...] = ("float32", "bfloat16", "float16")) -> list[Family]:
    """Return the families without matrix instructions in these precisions."""
    return [Family(*choice) for choice in product(PASSES, precisions)]


class Verdict(NamedTuple):
    """The outcome of a check.

    Attributes:
        problem: what is wrong with the kernels, or None if nothing is.
        error: the largest error of a result, relative to its largest number; None if there are no results.
    """

    problem: str | None
    error: float | None = None


def check(
    kernels: KernelBackend, family: Family, device: torch.device, wait: Callable[[], None] | None = None
) -> Verdict:
    """Run the small problem of a family and compare the results to those of the reference.

    For TF32, PyTorch's settings must allow it.

    Args:
        wait: waits for the device; by default, PyTorch waits when it copies the results.

    Raises:
        torch.OutOfMemoryError: if the device has no memory left.
        Unsupported: if the kernels cannot be compiled.
    """
    try:
        error = _largest_error(kernels, family, device, wait)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as failure:
        return Verdict(str(failure).partition("\n")[0])
    limit = PRECISIONS[family.precision].limit
    if error <= limit:
        return Verdict(None, error)
    return Verdict(
        f"a result differs from the reference by {error:.2g} of its largest number, more than {limit}", error
    )


def _largest_error(kernels, family: Family, device: torch.device, wait: Callable[[], None] | None) -> float:
    """Return the largest difference from the reference in float64 on the CPU, relative to the largest number.

    It is NaN if a result has a NaN, or an infinity that the reference does not have.
    """
    dtype = PRECISIONS[family.precision].dtype
    generator = torch.Generator().manual_seed(0)
    space = tuple(axis.length for axis in _AXES)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)

    query, key, value, grad_out = (draw(_BATCH, *space, _HEADS, _DIM) for _ in range(4))
    rpb = draw(_HEADS, *(2 * axis.kernel_size - 1 for axis in _AXES), dtype=torch.float32)
    # Matrix instructions take only positive scales, and those of unfused attention only multiples of 8 as head_dim.
    # Others select the kernels without them. A multiple of 4 lets these load and store several numbers at a time.
    scale = _SCALE if family.has_matrix_instructions else -_SCALE
    tensors: tuple[Tensor, ...]
    run: Callable[..., list[Tensor]]
    with torch.no_grad():
        if family.pass_name == "unfused":
            dim = _DIM if family.has_matrix_instructions else _DIM - 4
            attn = draw(_BATCH, _HEADS, *space, prod(axis.kernel_size for axis in _AXES))
            tensors = (*(x[..., :dim].movedim(-2, 1) for x in (query, key, value, grad_out)), attn, rpb)
            run = _run_unfused
        elif family.pass_name == "forward":
            tensors, run = (query, key, value, rpb), _run_forward
        else:
            out, lse = _run_forward(reference, scale, *(x.double() for x in (query, key, value, rpb)))
            grad_lse = draw(_BATCH, *space, _HEADS, dtype=torch.float32)
            tensors, run = (query, key, value, rpb, out.to(dtype), lse.float(), grad_out, grad_lse), _run_backward
        results = run(kernels, scale, *(x.to(device) for x in tensors))
        if wait is not None:
            wait()
        found = [x.cpu() for x in results]
        expected = run(reference, scale, *(x.double() for x in tensors))
    errors = [_relative_error(x, y) for x, y in zip(found, expected, strict=True)]
    return max(errors, key=lambda error: inf if isnan(error) else error)


def _run_forward(backend, scale: float, query, key, value, rpb) -> list[Tensor]:
    return list(backend.attention(query, key, value, rpb, _AXES, scale))


def _run_backward(backend, scale: float, query, key, value, rpb, out, lse, grad_out, grad_lse) -> list[Tensor]:
    grads, grad_rpb = backend.attention_backward(grad_out, grad_lse, query, key, value, rpb, out, lse, _AXES, scale)
    return [*split_grads(grads, query, key, value), grad_rpb]


def _run_unfused(backend, scale: float, query, key, value, grad_out, attn, rpb) -> list[Tensor]:
    return [
        backend.query_key(query, key, rpb, _AXES),
        *backend.query_key_backward(attn, query, key, rpb, _AXES),
        backend.weight_value(attn, value, _AXES),
        *backend.weight_value_backward(grad_out, attn, value, _AXES),
    ]


def _relative_error(found: Tensor, expected: Tensor) -> float:
    is_finite = expected.isfinite()
    if not torch.equal(found.isfinite(), is_finite):
        return nan
    found, expected = found[is_finite].double(), expected[is_finite]
    return ((found - expected).abs().max() / expected.abs().max()).item()
