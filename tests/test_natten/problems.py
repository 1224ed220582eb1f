"""Random problems with seeds, and helpers that several test files share."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from brute_force import Window
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import natten

RANKS = (1, 2, 3)

# By rank: largest kernel_size, dilation and number of tokens beyond kernel_size * dilation.
_LIMITS = {1: (9, 4, 9), 2: (5, 3, 4), 3: (4, 2, 2)}


def function(rank: int, suffix: str = "") -> Callable:
    """Return the public function na{rank}d{suffix}."""
    return getattr(natten, f"na{rank}d{suffix}")


class Problem(NamedTuple):
    """One call, without its data."""

    batch: int
    space: tuple[int, ...]
    heads: int
    head_dim: int
    window: Window
    has_rpb: bool
    layout: str
    seed: int

    @property
    def rank(self) -> int:
        return len(self.space)


def random_problem(
    rank: int, seed: int, with_stride: bool = True, max_dim: int = 6, spare: int | None = None
) -> Problem:
    """Return the random problem with this seed, the same on every machine.

    Args:
        with_stride: whether the window may have a stride above 1.
        max_dim: largest head_dim.
        spare: largest number of tokens of an axis beyond kernel_size * dilation; default: by rank.
    """
    rng = random.Random(f"{rank}-{seed}")
    max_kernel, max_dilation, max_spare = _LIMITS[rank]
    kernel_size = tuple(rng.randint(2, max_kernel) for _ in range(rank))
    stride = tuple(rng.randint(1, k) if with_stride and rng.random() < 0.4 else 1 for k in kernel_size)
    dilation = tuple(rng.choice((1, rng.randint(1, max_dilation))) for _ in range(rank))
    is_causal = tuple(rng.random() < 0.3 for _ in range(rank))
    spares = [rng.randint(0, max_spare if spare is None else spare) for _ in range(rank)]
    return Problem(
        batch=rng.randint(1, 2),
        space=tuple(k * d + extra for k, d, extra in zip(kernel_size, dilation, spares, strict=True)),
        heads=rng.randint(1, 3),
        head_dim=rng.randint(1, max_dim),
        window=Window(kernel_size, stride, dilation, is_causal),
        has_rpb=rng.random() < 0.6,
        layout=rng.choice(("contiguous", "contiguous", "heads first", "every other", "packed")),
        seed=seed,
    )


def make_qkv(problem: Problem, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return query, key and value [B, *space, H, d] in the memory layout of the problem, requiring gradients."""
    generator = torch.Generator().manual_seed(problem.seed)
    shape = (problem.batch, *problem.space, problem.heads, problem.head_dim)
    qkv = torch.randn(3, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return [_lay_out(x, problem.layout).requires_grad_() for x in qkv]


def _lay_out(x: Tensor, layout: str) -> Tensor:
    """Return a copy with another memory layout."""
    if layout == "heads first":
        return x.movedim(-2, 1).contiguous().movedim(1, -2)
    if layout == "every other":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    if layout == "packed":
        return torch.stack((x, x, x), dim=-3).unbind(-3)[1].detach()
    return x.clone()


def make_rpb(problem: Problem, dtype: torch.dtype = torch.float64) -> Tensor | None:
    """Return the bias table of a problem, requiring a gradient, or None."""
    if not problem.has_rpb:
        return None
    generator = torch.Generator().manual_seed(problem.seed + 1)
    shape = (problem.heads, *(2 * k - 1 for k in problem.window.kernel_size))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def cotangents(out: Tensor, lse: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return random gradients of output and logsumexp."""
    generator = torch.Generator().manual_seed(seed + 2)
    return tuple(torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (out, lse))


def gradients(
    outputs: tuple[Tensor, ...], inputs: list[Tensor | None], grad_outputs: tuple[Tensor, ...]
) -> list[Tensor]:
    """Return the gradients of all inputs that are not None, given the gradients of the outputs."""
    return list(torch.autograd.grad(outputs, [x for x in inputs if x is not None], grad_outputs))


class Recorder(TorchDispatchMode):
    """Records the names of all operators that run."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.names.append(str(operator))
        return operator(*args, **(kwargs or {}))


def runs_fused_operator(call: Callable) -> bool:
    """Return whether a call runs an operator of natten instead of only PyTorch operations."""
    with Recorder() as recorder:
        call()
    return any(name.startswith("natten.") for name in recorder.names)
