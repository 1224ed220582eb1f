"""The operator: every implementation on the map sizes of real models, and natten under varied settings.

A shape is written b8_56x56_h2_d32_k7_dil8_causal_norpb: batch, tokens along each axis, heads, head_dim, kernel_size and
dilation (one value, or one per axis), and optionally causal or without a relative position bias. Fewer key heads and
another head_dim of the value are written b8_28x28_h8_kv2_d32_v64_k7. An ending _qk or _av selects an unfused operator.
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
    "b8_56x56_h2_d64_k13",
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
    kv_heads: int
    head_dim: int
    value_dim: int
    kernel_size: int | tuple[int, ...]
    dilation: int | tuple[int, ...]
    is_causal: bool
    has_rpb: bool
    part: str

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
                kv_heads=self.kv_heads,
                head_dim=self.head_dim,
                value_dim=self.value_dim,
                additional=0,
                dtype=dtype,
                has_rpb=self.has_rpb,
                arguments=window,
                part=self.part,
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
        rf"b(\d+)_({per_axis})_h(\d+)(?:_kv(\d+))?_d(\d+)(?:_v(\d+))?_k({per_axis})(?:_dil({per_axis}))?"
        r"(_causal)?(_norpb)?(?:_(qk|av))?",
        name,
    )
    if not found:
        raise ValueError(f"case {name!r} is unknown; use a name from --list or a shape such as {_MAIN}_dil8.")
    batch, space, heads, kv_heads, head_dim, value_dim, kernel_size, dilation, causal, norpb, part = found.groups()
    case = Case(
        int(batch),
        tuple(map(int, space.split("x"))),
        int(heads),
        int(kv_heads or heads),
        int(head_dim),
        int(value_dim or head_dim),
        _one_or_all(kernel_size),
        _one_or_all(dilation or "1"),
        causal is not None,
        norpb is None,
        part or "",
    )
    sizes = (case.batch, case.heads, case.kv_heads, case.head_dim, case.value_dim)
    if not 1 <= len(case.space) <= 3 or 0 in sizes:
        raise ValueError(f"case {name!r} must have 1 to 3 axes, and a positive batch, heads and head_dim.")
    if case.heads % case.kv_heads:
        raise ValueError(f"case {name!r} must have a multiple of the key heads as heads.")
    if part and (kv_heads or value_dim):
        raise ValueError(f"case {name!r} is unfused, which excludes _kv and _v.")
    try:
        make_axes(case.space, case.kernel_size, 1, case.dilation, case.is_causal)
    except ValueError as error:
        raise ValueError(f"case {name!r} is invalid: {error}") from error
    return case


def parse_plain(name: str) -> Case:
    """Parse the shape of fused attention with query, key and value of one shape.

    Raises:
        ValueError: if the notation is wrong, or the shape is another one.
    """
    case = parse(name)
    if case.part or (case.kv_heads, case.value_dim) != (case.heads, case.head_dim):
        raise ValueError(f"case {name!r} must not have _kv, _v, _qk or _av.")
    return case


def _one_or_all(text: str) -> int | tuple[int, ...]:
    values = tuple(map(int, text.split("x")))
    return values[0] if len(values) == 1 else values


# ---------------------------------------------------------------------------------------------------------------------
# Groups
# ---------------------------------------------------------------------------------------------------------------------


Runs = list[tuple[str, Setting]]  # shapes and settings; the first is the baseline


class Comparison(NamedTuple):
    """natten under varied settings. All runs of a comparison are timed together.

    Attributes:
        runs: returns what is compared, given the requested setting: one list of runs, or several by name.
        passes: what is timed.
    """

    runs: Callable[[Setting], Runs | dict[str, Runs]]
    passes: tuple[str, ...] = ("forward", "forward+backward")


def _head_dims(setting: Setting) -> dict[str, Runs]:
    """Return head_dims that are no multiples of 8, as in published models, each against the next multiple."""
    dims = {dim: (-(-dim // 8) * 8, dim) for dim in (10, 14, 20, 28, 36)}
    return {str(dim): [(f"b8_28x28_h4_d{d}_k7", setting) for d in pair] for dim, pair in dims.items()}


def _grouped(setting: Setting) -> dict[str, Runs]:
    """Return fewer key heads, and another value head_dim, against equal ones with the same arithmetic forward."""
    shapes = {"heads": ("h8_d32", "h8_kv2_d32"), "value": ("h4_d48", "h4_d32_v64")}
    return {name: [(f"b8_28x28_{shape}_k7", setting) for shape in pair] for name, pair in shapes.items()}


def _unfused(setting: Setting) -> dict[str, Runs]:
    """Return the unfused operators against fused attention."""
    shapes = ("b8_7x7_h16_d32_k7", "b8_14x14_h8_d32_k7", "b8_28x28_h4_d32_k7", _MAIN)
    return {shape: [(shape + part, setting) for part in ("", "_qk", "_av")] for shape in shapes}


COMPARISONS = {
    "call": Comparison(lambda s: [("b1_7x7_h1_d32_k7", s), ("b1_7x7_h16_d32_k7", s)], ("forward",)),
    "dtype": Comparison(lambda s: [(_MAIN, s._replace(dtype=dtype)) for dtype in ("float32", "bfloat16")]),
    "rpb": Comparison(lambda s: [(_MAIN + "_norpb", s), (_MAIN, s)]),
    "threads": Comparison(lambda s: [(_MAIN, s), (_MAIN, s._replace(threads=1))]),
    "tokens": Comparison(lambda s: [(_MAIN, s), ("b8_112x112_h2_d32_k7", s)]),
    "head_dim": Comparison(_head_dims),
    "gqa": Comparison(_grouped),
    "qk_av": Comparison(_unfused),
}
GROUPS = (*COMPARISONS, *SHAPES)


def plan(group: str, providers: list[str] | None, setting: Setting) -> list[Entry]:
    """Return the entries of a group, for all providers of the device by default.

    Comparisons run only those providers that are natten, if there are any. The entries of a comparison of several lists
    of runs have the name of the list in their group.

    Raises:
        ValueError: if the group or a provider is unknown.
    """
    check_providers(providers or (), PROVIDERS)
    ours = f"natten-{setting.backend}"
    if group in COMPARISONS:
        passes = COMPARISONS[group].passes
        runs = COMPARISONS[group].runs(setting)
        lists = {group: runs} if isinstance(runs, list) else {f"{group} {name}": x for name, x in runs.items()}
        chosen = [name for name in providers or [ours] if name.startswith("natten-")] or providers
    else:
        passes = ("forward", "forward+backward")
        lists = {group: [(group, setting)]}
        chosen = providers or [ours, "natten-reference", *rivals.RIVALS]
    entries = [
        Entry("ops", title, name, provider, pass_name, run_setting)
        for title, runs in lists.items()
        for pass_name in passes
        for name, run_setting in runs
        for provider in chosen
    ]
    for entry in entries:
        parse(entry.case)
    return list(dict.fromkeys(entries))


# ---------------------------------------------------------------------------------------------------------------------
# Subjects
# ---------------------------------------------------------------------------------------------------------------------


def _make_problem(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> rivals.Problem:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    axes, maps = case.axes, (case.batch, *case.space)
    window = prod([axis.kernel_size for axis in axes])
    return rivals.Problem(
        axes=axes,
        query=random(*maps, case.heads, case.head_dim),
        key=random(*maps, case.kv_heads, case.head_dim),
        value=random(*maps, case.kv_heads, case.value_dim),
        rpb=random(case.heads, *(2 * axis.kernel_size - 1 for axis in axes)) if case.has_rpb else None,
        grad=random(*maps, case.heads, window if case.part == "qk" else case.value_dim),
        attn=random(*maps, case.heads, window).softmax(-1) if case.part == "av" else None,
        part=case.part,
    )


# All providers compute the same problem.
_shared_problem = lru_cache(maxsize=1)(partial(_make_problem, seed=0))


def _make_natten(problem: rivals.Problem, pass_name: str, backend: str) -> rivals.Implementation:
    """natten as the layers call it, on one packed tensor; on separate tensors where they differ in shape."""
    if problem.part:
        return _make_unfused(problem, backend)
    tensors: tuple[Tensor, ...] = (problem.query, problem.key, problem.value)
    if problem.is_uniform:
        tensors = (torch.stack(tensors, -3),)
    function = getattr(natten, f"na{len(problem.axes)}d" + ("_qkvpacked" if problem.is_uniform else ""))
    window = tuple(zip(*(axis[1:] for axis in problem.axes), strict=True))
    qkv = [x.clone().requires_grad_() for x in tensors]
    rpb = None if problem.rpb is None else problem.rpb.clone().requires_grad_()
    return rivals.Implementation(
        forward=lambda: function(*qkv, *window, rpb=rpb, backend=backend),
        inputs=[x for x in (*qkv, rpb) if x is not None],
        grad_out=problem.grad,
        unpack=partial(_unpack, problem.is_uniform),
    )


def _unpack(is_packed: bool, out_BXHd: Tensor, *grads: Tensor) -> list[Tensor]:
    """Return the output heads-first, and the gradients of query, key, value and rpb."""
    if grads and is_packed:
        grads = (*grads[0].unbind(-3), *grads[1:])
    return [*map(rivals.heads_first, (out_BXHd, *grads[:3])), *grads[3:]]


def _make_unfused(problem: rivals.Problem, backend: str) -> rivals.Implementation:
    """na*d_qk or na*d_av, on contiguous heads-first tensors."""
    function = getattr(natten, f"na{len(problem.axes)}d_{problem.part}")
    kernel_size, _, dilation, is_causal = zip(*(axis[1:] for axis in problem.axes), strict=True)
    names = (problem.query, problem.key) if problem.part == "qk" else (problem.attn, problem.value)
    tensors = [x.movedim(-2, 1).contiguous().requires_grad_() for x in names if x is not None]
    options: dict[str, Tensor] = {}
    if problem.part == "qk" and problem.rpb is not None:
        options["rpb"] = problem.rpb.clone().requires_grad_()
    return rivals.Implementation(
        forward=lambda: function(*tensors, kernel_size, dilation, is_causal=is_causal, **options, backend=backend),
        inputs=[*tensors, *options.values()],
        grad_out=problem.grad.movedim(-2, 1).contiguous(),
    )


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
            is_finite = ours.isfinite()  # logits before the map are not
            ours, theirs = ours[is_finite], theirs[is_finite]
            error = ((theirs.float() - ours).abs().max() / ours.abs().max()).item()
            if not error <= _TOLERANCE[entry.setting.dtype]:
                raise LeftOut(f"wrong result: the error is {error:.1e} of the largest number")

    call = implementation.call(entry.pass_name)
    return Subject(call, work, entry.pass_name != "forward", check, others=tuple(others))
