"""Problems and precisions that the parts of the run and tests/gpu share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

import natten
from natten.backends.cuda import launches
from natten.backends.cuda.driver import Kernel
from natten.checks import make_axes

FUSED = ("attention", "attention_backward")
UNFUSED = ("query_key", "query_key_backward", "weight_value", "weight_value_backward")


class Machine(NamedTuple):
    """Where a problem runs."""

    device: torch.device
    backend: str

    @property
    def is_rehearsal(self) -> bool:
        return self.device.type == "cpu"


CUDA, REHEARSAL = Machine(torch.device("cuda:0"), "cuda"), Machine(torch.device("cpu"), "cpu")


def machine(is_rehearsal: bool) -> Machine:
    """Return the GPU, or the CPU for a rehearsal."""
    return REHEARSAL if is_rehearsal else CUDA


# dtype, its unit roundoff, and the setting for products of float32 matrices.
PRECISIONS = {
    "bfloat16": (torch.bfloat16, 2.0**-7, "highest"),
    "float16": (torch.float16, 2.0**-10, "highest"),
    "float32": (torch.float32, 2.0**-23, "highest"),
    "tf32": (torch.float32, 2.0**-10, "high"),
}


@contextmanager
def float32_products(setting: str) -> Iterator[None]:
    """Set the precision of float32 matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def kernels_of(ops, shape, window, dtype: torch.dtype, products: str, has_rpb: bool, gpu) -> set[Kernel]:
    """Return the kernels of a problem on a GPU.

    Args:
        ops: FUSED or UNFUSED.
        shape: batch, space, heads and head_dim.
        window: kernel_size, and optionally stride, dilation and is_causal.
        dtype, products: as in PRECISIONS.
        has_rpb: whether there is a bias.
        gpu: properties of the GPU, which need not be present.
    """
    query, axes = torch.empty(shape, dtype=dtype, device="meta"), make_axes(shape[1:-2], *window)
    with float32_products(products):
        return {step.kernel for op in ops for step in launches(op, query, axes, has_rpb, gpu)}


def make_inputs(
    machine: Machine, batch, space, heads, dim, kernel_size, dtype=torch.bfloat16, seed=0, has_rpb=True
) -> tuple[Tensor, Tensor | None]:
    """Return a random packed qkv [batch, *space, 3, heads, dim] and a bias table in float32 or None."""
    generator = torch.Generator(machine.device).manual_seed(seed)
    kernel_size = (kernel_size,) * len(space) if isinstance(kernel_size, int) else kernel_size
    options = {"generator": generator, "device": machine.device}
    qkv = torch.randn(batch, *space, 3, heads, dim, **options).to(dtype)
    rpb = torch.randn(heads, *(2 * k - 1 for k in kernel_size), **options) if has_rpb else None
    return qkv, rpb


def run_step(qkv: Tensor, rpb: Tensor | None, backend: str, *window, seed: int = 1) -> list[Tensor]:
    """Return output, logsumexp and the gradients of qkv and rpb."""
    attend = getattr(natten, f"na{qkv.dim() - 4}d_qkvpacked")
    leaves = [x.detach().requires_grad_() for x in (qkv, rpb) if x is not None]
    bias = leaves[1] if rpb is not None else None
    out, lse = attend(leaves[0], *window, rpb=bias, return_lse=True, backend=backend)
    generator = torch.Generator(qkv.device).manual_seed(seed)
    grads = [torch.randn(x.shape, generator=generator, device=qkv.device).to(x.dtype) for x in (out, lse)]
    return [out, lse, *torch.autograd.grad((out, lse), leaves, grads)]


def kernel_size_of(rank: int, window: tuple) -> tuple[int, ...]:
    """Return the kernel_size of a window with one value per axis."""
    return tuple(axis.kernel_size for axis in make_axes((1 << 20,) * rank, *window))


def errors(
    machine: Machine, precision: str, shape: tuple, window: tuple, seed: int, has_rpb: bool = True
) -> list[tuple]:
    """Compare output, logsumexp and gradients of a problem to the reference in float64.

    Args:
        shape: batch, space, heads and head_dim.
        window: kernel_size, and optionally stride, dilation and is_causal.

    Returns:
        For each result, its error and that of the reference in the same precision: root mean squares in units of
        rounding of its largest number.
    """
    dtype, eps, products = PRECISIONS[precision]
    size = kernel_size_of(len(shape[1]), window)
    qkv, rpb = make_inputs(machine, *shape, size, dtype, seed, has_rpb)
    exact = run_step(qkv.double(), None if rpb is None else rpb.double(), "reference", *window, seed=seed)
    with float32_products(products):
        peers = run_step(qkv, rpb, "reference", *window, seed=seed)
        found = run_step(qkv, rpb, machine.backend, *window, seed=seed)
    result = []
    for x, peer, expected in zip(found, peers, exact, strict=True):
        rounding = eps * expected.abs().max().clamp(min=1)
        result.append(tuple(((y - expected).square().mean().sqrt() / rounding).item() for y in (x, peer)))
    return result


def is_good(error: float, peer_error: float) -> bool:
    """Return whether the error of one result is like that of the reference in the same precision. NaN is not."""
    return error <= max(8 * peer_error, 1.0)


# Problems that run every kernel once, for compute-sanitizer, with a batch of 1 and 2 heads.
_SMALL_PRECISIONS = ("bfloat16", "float32", "tf32")
_SMALL = (  # map, head_dim and window
    ((11, 13), 32, (5, 1, (1, 2), False)),
    ((9, 17), 24, ((3, 4), 2, 1, (True, False))),
    ((100,), 16, (70,)),
    ((4, 5, 9), 16, (3,)),
    ((5, 20, 20), 32, (5,)),
)
_SMALL_UNFUSED = (  # dtype, map, kernel_size and dilation, with a head_dim of 8
    # Tiles are partial, and the weights of most tokens do not begin at a multiple of 16 bytes.
    (torch.bfloat16, (13, 22), 7, (1, 2)),
    (torch.float32, (9, 11), 3, 2),
)


def small_kernels(gpu) -> set[Kernel]:
    """Return the kernels of `small_calls` on a GPU."""
    problems = [
        (FUSED, (1, *space, 2, dim), window, PRECISIONS[name][0], PRECISIONS[name][2])
        for name in _SMALL_PRECISIONS
        for space, dim, window in _SMALL
    ]
    problems += [
        (UNFUSED, (1, *space, 2, 8), (kernel_size, 1, dilation), dtype, "highest")
        for dtype, space, kernel_size, dilation in _SMALL_UNFUSED
    ]
    return {kernel for given in problems for kernel in kernels_of(*given, True, gpu)}


def small_calls(machine: Machine) -> None:
    """Run every kernel once on a small problem."""
    for precision in _SMALL_PRECISIONS:
        dtype, _, products = PRECISIONS[precision]
        for space, dim, window in _SMALL:
            qkv, rpb = make_inputs(machine, 1, space, 2, dim, kernel_size_of(len(space), window), dtype)
            with float32_products(products):
                run_step(qkv, rpb, machine.backend, *window)
    for dtype, space, kernel_size, dilation in _SMALL_UNFUSED:
        q, k, v = (torch.randn(1, 2, *space, 8, device=machine.device).to(dtype).requires_grad_() for _ in range(3))
        rpb = torch.randn(2, *(2 * kernel_size - 1,) * 2, device=machine.device, requires_grad=True)
        attn = natten.na2d_qk(q, k, kernel_size, dilation, rpb=rpb, backend=machine.backend).softmax(-1)
        natten.na2d_av(attn, v, kernel_size, dilation, backend=machine.backend).sum().backward()
    if not machine.is_rehearsal:
        torch.cuda.synchronize()
