"""The operator on maps of real models, by every implementation that there is, and against itself where it may be slow.

A shape is written b8_56x56_h2_d32_k7_dil8_causal_norpb: batch, tokens of each axis, heads, head_dim, kernel_size and
dilation (one value or one an axis), and whether it is causal or has no relative position bias.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache, partial
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

import natten
from benchmarks import rivals
from benchmarks.entry import Entry, LeftOut, Setting, Subject, check_providers
from benchmarks.windows import axis_windows
from natten.checks import make_axes
from natten.geometry import Axis

_MAIN = "b8_56x56_h2_d32_k7"
SHAPES = (  # the cheap ones first
    "b8_7x7_h16_d32_k7",
    "b8_14x14_h8_d32_k7",
    "b8_14x14_h8_d32_k7_dil2",
    "b8_28x28_h4_d32_k7",
    "b8_28x28_h4_d32_k7_dil4",
    _MAIN,
    "b8_56x56_h2_d32_k7_dil8",
    "b8_56x56_h2_d64_k7",
    "b1_200x304_h2_d32_k7",
    "b1_200x304_h2_d32_k7_dil8",
    "b8_56x56_h2_d32_k13",
    "b8_4096_h4_d32_k63",
    "b1_16x32x32_h4_d32_k5x7x7",
)
# Largest error, as a part of the largest number. Implementations sum in other orders, and may round weights to dtype.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """The shape of a problem; see the head of this file for how it is written."""

    batch: int
    space: tuple[int, ...]
    heads: int
    head_dim: int
    kernel_size: int | tuple[int, ...]
    dilation: int | tuple[int, ...]
    is_causal: bool
    has_rpb: bool

    @property
    def axes(self) -> tuple[Axis, ...]:
        return make_axes(self.space, self.kernel_size, 1, self.dilation, self.is_causal)

    def work(self, pass_name: str, itemsize: int) -> tuple[float, float]:
        """The least GFLOP, with logits computed again in backward; the least GB, with each tensor moved once a pass."""
        pairs = prod(
            [int((bias < 2 * axis.kernel_size - 1).sum()) for axis in self.axes for _, bias in [axis_windows(axis)]]
        )
        channels = self.batch * self.heads * self.head_dim
        products, maps = (2, 4) if pass_name == "forward" else (7, 12)
        return 2e-9 * products * channels * pairs, 1e-9 * maps * channels * prod(self.space) * itemsize


def parse(name: str) -> Case:
    """Reads a shape.

    Raises:
        ValueError: if it is not written as it must be, or no window of it exists.
    """
    per_axis = r"\d+(?:x\d+)*"
    found = re.fullmatch(
        rf"b(\d+)_({per_axis})_h(\d+)_d(\d+)_k({per_axis})(?:_dil({per_axis}))?(_causal)?(_norpb)?", name
    )
    if not found:
        raise ValueError(f"case {name!r} is unknown: name one of --list, or write a shape like {_MAIN}_dil8.")
    batch, space, heads, head_dim, kernel_size, dilation, causal, norpb = found.groups()
    case = Case(
        int(batch),
        tuple(map(int, space.split("x"))),
        int(heads),
        int(head_dim),
        _one_or_all(kernel_size),
        _one_or_all(dilation or "1"),
        causal is not None,
        norpb is None,
    )
    if not 1 <= len(case.space) <= 3 or 0 in (case.batch, case.heads, case.head_dim):
        raise ValueError(f"case {name!r} must have 1 to 3 axes, and a batch, heads and head_dim of at least 1.")
    try:
        make_axes(case.space, case.kernel_size, 1, case.dilation, case.is_causal)
    except ValueError as error:
        raise ValueError(f"case {name!r} does not exist: {error}") from error
    return case


def _one_or_all(text: str) -> int | tuple[int, ...]:
    values = tuple(map(int, text.split("x")))
    return values[0] if len(values) == 1 else values


# ---------------------------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Our own operator against itself; the first of `runs` is what the others are compared with.

    Attributes:
        runs: gives shapes and settings, from the setting asked for.
        passes: what is timed.
    """

    runs: Callable[[Setting], list[tuple[str, Setting]]]
    passes: tuple[str, ...] = ("forward", "forward+backward")


COMPARISONS = {
    "call": Comparison(lambda s: [("b1_7x7_h1_d32_k7", s), ("b1_7x7_h16_d32_k7", s)], ("forward",)),
    "dtype": Comparison(lambda s: [(_MAIN, s._replace(dtype=dtype)) for dtype in ("float32", "bfloat16")]),
    "rpb": Comparison(lambda s: [(_MAIN + "_norpb", s), (_MAIN, s)]),
    "threads": Comparison(lambda s: [(_MAIN, s), (_MAIN, s._replace(threads=1))]),
    "tokens": Comparison(lambda s: [(_MAIN, s), ("b8_112x112_h2_d32_k7", s)]),
}
GROUPS = (*COMPARISONS, *SHAPES)


def plan(group: str, providers: list[str] | None, setting: Setting) -> list[Entry]:
    """The entries of a group; all providers unless given, the compiled backend alone where it is compared with itself.

    Raises:
        ValueError: on an unknown group or provider.
    """
    check_providers(providers or (), PROVIDERS)
    if group in COMPARISONS:
        runs, passes = COMPARISONS[group]
        chosen = [(name, provider, s) for name, s in runs(setting) for provider in providers or ["natten-cpu"]]
    else:
        passes = ("forward", "forward+backward")
        chosen = [(group, provider, setting) for provider in providers or PROVIDERS]
    for name, *_ in chosen:
        parse(name)
    entries = (Entry("ops", group, name, provider, pass_, s) for pass_ in passes for name, provider, s in chosen)
    return list(dict.fromkeys(entries))


# ---------------------------------------------------------------------------------------------------------------------
# Subjects
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def make_problem(case: Case, dtype: torch.dtype, device: torch.device) -> rivals.Problem:
    """The same random numbers for every provider."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    axes, maps = case.axes, (case.heads, case.head_dim)
    return rivals.Problem(
        axes=axes,
        qkv_BX3Hd=random(case.batch, *case.space, 3, *maps),
        rpb=random(case.heads, *(2 * axis.kernel_size - 1 for axis in axes)) if case.has_rpb else None,
        grad_BXHd=random(case.batch, *case.space, *maps),
    )


def make_natten(problem: rivals.Problem, pass_name: str, backend: str) -> rivals.Implementation:
    """Our operator as the layers call it, on one packed tensor."""
    function = getattr(natten, f"na{len(problem.axes)}d_qkvpacked")
    window = tuple(zip(*(axis[1:] for axis in problem.axes), strict=True))
    qkv_BX3Hd = problem.qkv_BX3Hd.clone().requires_grad_()
    rpb = None if problem.rpb is None else problem.rpb.clone().requires_grad_()
    return rivals.Implementation(
        forward=lambda: function(qkv_BX3Hd, *window, rpb=rpb, backend=backend),
        inputs=[x for x in (qkv_BX3Hd, rpb) if x is not None],
        grad_out=problem.grad_BXHd,
        unpack=_unpack,
    )


def _unpack(out_BXHd: Tensor, grad_BX3Hd: Tensor | None = None, grad_rpb: Tensor | None = None) -> list[Tensor]:
    """Heads-first output, gradients of query, key and value, and that of rpb."""
    out = [rivals.heads_first(out_BXHd)]
    if grad_BX3Hd is not None:
        out += [rivals.heads_first(x) for x in grad_BX3Hd.unbind(-3)]
    return out if grad_rpb is None else [*out, grad_rpb]


PROVIDERS = {
    "natten-cpu": partial(make_natten, backend="cpu"),
    "natten-reference": partial(make_natten, backend="reference"),
    **rivals.RIVALS,
}


@lru_cache(maxsize=2)
def expected(case: Case, dtype: torch.dtype, device: torch.device, pass_name: str) -> list[Tensor]:
    """What the reference gives in float32 for the numbers that `dtype` can hold."""
    problem = make_problem(case, dtype, device)
    problem = problem._replace(**{name: x.float() for name, x in problem._asdict().items() if torch.is_tensor(x)})
    implementation = make_natten(problem, pass_name, "reference")
    return implementation.unpack(*implementation.call(pass_name)())


def make(entry: Entry) -> Subject:
    """The code behind an entry.

    Raises:
        LeftOut, ValueError, RuntimeError: if the provider cannot take it.
    """
    case = parse(entry.case)
    implementation = PROVIDERS[entry.provider](make_problem(case, entry.dtype, entry.device), entry.pass_name)

    def check(result: tuple[Tensor, ...]) -> None:
        right = expected(case, entry.dtype, entry.device, entry.pass_name)
        for ours, theirs in zip(right, implementation.unpack(*result), strict=False):  # some have no gradient of rpb
            error = ((theirs.float() - ours).abs().max() / ours.abs().max()).item()
            if not error <= _TOLERANCE[entry.dtype]:
                raise LeftOut(f"its result is wrong, by {error:.1e} of the largest number")

    gflop, gbytes = case.work(entry.pass_name, entry.dtype.itemsize)
    return Subject(implementation.call(entry.pass_name), gflop, gbytes, entry.pass_name != "forward", check)
