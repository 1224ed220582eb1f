"""The operator: every implementation on the map sizes of real models, and natten under varied settings.

A shape is written b8_56x56_h2_d32_k7_dil8_causal_norpb: batch, tokens along each axis, heads, head_dim, kernel_size and
dilation (one value, or one per axis), and optionally causal or without a relative position bias.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

import natten
from benchmarks import rivals
from benchmarks.entry import Entry, LeftOut, Setting, Subject, check_providers
from natten import profiler
from natten.checks import make_axes
from natten.geometry import Axis
from natten.profiler import Work

_MAIN = "b8_56x56_h2_d32_k7"
SHAPES = (  # the fast ones first
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
# Largest error relative to the largest number. Implementations differ in the order of sums and may round weights.
_TOLERANCE = {"float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 4e-2}


# ---------------------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """The shape of a problem; the notation is described at the top of this file."""

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

    def work(self, pass_name: str, dtype: torch.dtype) -> Work:
        """Return the minimal work of a pass."""
        window = {"kernel_size": self.kernel_size, "dilation": self.dilation, "is_causal": self.is_causal}
        work = profiler.minimal_work(
            profiler.Problem(
                batch=self.batch,
                space=self.space,
                heads=self.heads,
                kv_heads=self.heads,
                head_dim=self.head_dim,
                value_dim=self.head_dim,
                additional=0,
                dtype=dtype,
                has_rpb=self.has_rpb,
                arguments=window,
            ),
            with_backward=pass_name != "forward",
        )
        return work["forward"] if pass_name == "forward" else work["forward"].plus(work["backward"])


def parse(name: str) -> Case:
    """Parse a shape.

    Raises:
        ValueError: if the notation is wrong, or the windows do not fit into the map.
    """
    per_axis = r"\d+(?:x\d+)*"
    found = re.fullmatch(
        rf"b(\d+)_({per_axis})_h(\d+)_d(\d+)_k({per_axis})(?:_dil({per_axis}))?(_causal)?(_norpb)?", name
    )
    if not found:
        raise ValueError(f"case {name!r} is unknown; use a name from --list or a shape such as {_MAIN}_dil8.")
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
        raise ValueError(f"case {name!r} must have 1 to 3 axes, and a positive batch, heads and head_dim.")
    try:
        make_axes(case.space, case.kernel_size, 1, case.dilation, case.is_causal)
    except ValueError as error:
        raise ValueError(f"case {name!r} is invalid: {error}") from error
    return case


def _one_or_all(text: str) -> int | tuple[int, ...]:
    values = tuple(map(int, text.split("x")))
    return values[0] if len(values) == 1 else values


# ---------------------------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """natten under varied settings; the first run is the baseline.

    Attributes:
        runs: returns shapes and settings, given the requested setting.
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
    """Return the entries of a group, for all providers of the device by default.

    Raises:
        ValueError: if the group or a provider is unknown.
    """
    check_providers(providers or (), PROVIDERS)
    ours = f"natten-{setting.backend}"
    if group in COMPARISONS:
        runs, passes = COMPARISONS[group]
        chosen = [(name, provider, s) for name, s in runs(setting) for provider in providers or [ours]]
    else:
        passes = ("forward", "forward+backward")
        default = [ours, "natten-reference", *rivals.RIVALS]
        chosen = [(group, provider, setting) for provider in providers or default]
    for name, *_ in chosen:
        parse(name)
    entries = (Entry("ops", group, name, provider, pass_, s) for pass_ in passes for name, provider, s in chosen)
    return list(dict.fromkeys(entries))


# ---------------------------------------------------------------------------------------------------------------------
# Subjects
# ---------------------------------------------------------------------------------------------------------------------


def _make_problem(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> rivals.Problem:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    axes, maps = case.axes, (case.heads, case.head_dim)
    return rivals.Problem(
        axes=axes,
        qkv_BX3Hd=random(case.batch, *case.space, 3, *maps),
        rpb=random(case.heads, *(2 * axis.kernel_size - 1 for axis in axes)) if case.has_rpb else None,
        grad_BXHd=random(case.batch, *case.space, *maps),
    )


# All providers compute the same problem.
_shared_problem = lru_cache(maxsize=1)(partial(_make_problem, seed=0))


def _make_natten(problem: rivals.Problem, pass_name: str, backend: str) -> rivals.Implementation:
    """natten as the layers call it, on one packed tensor."""
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
    """Return the output heads-first, and the gradients of query, key, value and rpb."""
    out = [rivals.heads_first(out_BXHd)]
    if grad_BX3Hd is not None:
        out += [rivals.heads_first(x) for x in grad_BX3Hd.unbind(-3)]
    return out if grad_rpb is None else [*out, grad_rpb]


PROVIDERS = {
    "natten-cpu": partial(_make_natten, backend="cpu"),
    "natten-cuda": partial(_make_natten, backend="cuda"),
    "natten-reference": partial(_make_natten, backend="reference"),
    **rivals.RIVALS,
}


@lru_cache(maxsize=2)
def _expected(case: Case, dtype: torch.dtype, device: torch.device, pass_name: str) -> list[Tensor]:
    """Return the reference's results in float32, for inputs rounded to `dtype`."""
    problem = _shared_problem(case, dtype, device)
    problem = problem._replace(**{name: x.float() for name, x in problem._asdict().items() if torch.is_tensor(x)})
    implementation = _make_natten(problem, pass_name, "reference")
    with torch.enable_grad():
        return implementation.unpack(*implementation.call(pass_name)())


def make(entry: Entry) -> Subject:
    """Return the code of an entry.

    Raises:
        LeftOut, ValueError, RuntimeError: if the provider does not support the case.
    """
    case, dtype, device = parse(entry.case), entry.dtype, entry.device
    provider = PROVIDERS[entry.provider]
    implementation = provider(_shared_problem(case, dtype, device), entry.pass_name)
    work = case.work(entry.pass_name, dtype)
    others = [
        provider(_make_problem(case, dtype, device, seed), entry.pass_name).call(entry.pass_name)
        for seed in range(1, profiler.input_sets(work.gbytes, device))
    ]

    def check(result: tuple[Tensor, ...]) -> None:
        right = _expected(case, dtype, device, entry.pass_name)
        for ours, theirs in zip(right, implementation.unpack(*result), strict=False):  # rpb may have no gradient
            error = ((theirs.float() - ours).abs().max() / ours.abs().max()).item()
            if not error <= _TOLERANCE[entry.setting.dtype]:
                raise LeftOut(f"wrong result: the error is {error:.1e} of the largest number")

    call = implementation.call(entry.pass_name)
    return Subject(call, work, entry.pass_name != "forward", check, others=tuple(others))
