"""The cpu backend: fused kernels in C++ (natten/csrc/cpu), compiled for this machine by natten/build.py.

Python passes a plan, which describes a problem down to the strides of its tensors, and the tensors' addresses. Plans
are kept, since making one costs more than a small problem takes. Inputs must be finite, as for the reference.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache
from struct import Struct
from types import ModuleType

import torch
from torch import Tensor

from natten.backends.compiled import (
    DTYPES,
    TENSORS,
    Problems,
    check_layout,
    refuses_kind,
    warn,
    with_contiguous_rows,
)
from natten.geometry import Axis, check_rpb
from natten.memo import remember

NAME = "cpu"

_PLAN = Struct(f"=4q 15q d {len(TENSORS) * 5}q")
_ADDRESSES = Struct(f"{len(TENSORS)}P")
_ARGUMENTS = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
_NO_AXIS = (1, 1, 1, 1, 0)
_NO_STRIDES = (0,) * 5


def refuses(query: Tensor) -> str | None:
    """Why this backend cannot take a call with such a query (or value), or None if it can."""
    if query.device.type != "cpu":
        return f"the tensors are on {query.device}"
    reason = refuses_kind(query)
    if reason is not None:
        return reason
    try:
        _library()
    except RuntimeError as error:
        return warn(str(error).removesuffix("."))
    return None


def _library() -> ctypes.CDLL:
    return _build().cpu_library()


@cache
def _build() -> ModuleType:
    """natten.build, imported late so that `python -m natten.build` is not imported before it runs."""
    from natten import build

    return build


# ---------------------------------------------------------------------------------------------------------------------
# Plans and calls
# ---------------------------------------------------------------------------------------------------------------------


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _run(kind: str, axes: Sequence[Axis], scale: float, rpb: Tensor | None, **tensors: Tensor | None) -> Tensor | None:
    """Solves a problem on heads-last tensors, named as in TensorName; returns rpb's gradient if it has one."""
    shaped = tensors["QUERY"] if "QUERY" in tensors else tensors["VALUE"]
    table = grad_rpb = None
    if rpb is not None:
        table = rpb.float().contiguous()
        if kind.endswith("_backward"):
            grad_rpb = rpb.new_empty(rpb.shape, dtype=torch.float32)
    plan = _plan(shaped, axes, scale, rpb, tuple(tensors), *tensors.values())
    addresses = _ADDRESSES.pack(*[_address(tensors.get(name)) for name in TENSORS])
    failed = _function(_library(), kind)(plan, addresses, _address(table), _address(grad_rpb), _threads())
    if failed == 1:
        raise MemoryError(f"natten's CPU kernels ran out of memory on tensors of shape {tuple(shaped.shape)}.")
    if failed:
        raise RuntimeError(
            f"natten's CPU kernels failed on tensors of shape {tuple(shaped.shape)}: set backend='reference'."
        )
    return None if grad_rpb is None else grad_rpb.to(rpb.dtype)


@cache
def _function(library: ctypes.CDLL, name: str) -> Callable[..., int]:
    function = getattr(library, f"natten_{name}")
    function.argtypes, function.restype = _ARGUMENTS, ctypes.c_int
    return function


@remember
def _plan(
    shaped: Tensor, axes: tuple[Axis, ...], scale: float, rpb: Tensor | None, names: tuple, *tensors: Tensor | None
) -> bytes:
    """A plan for the named tensors, on a map whose query or value is `shaped`.

    Raises:
        ValueError: if one does not go with that: an operator called past the public functions, which check first.
    """
    check_rpb(rpb, axes, shaped.shape[-2], shaped.dtype, shaped.device)
    no_axes = 3 - len(axes)
    values = [DTYPES[shaped.dtype], shaped.shape[0], shaped.shape[-2], shaped.shape[-1]]
    values += (*_NO_AXIS * no_axes, *(int(value) for axis in axes for value in axis))
    values.append(scale)
    given = dict(zip(names, tensors, strict=True))
    for name in TENSORS:
        x = given.get(name)
        if x is None:
            values += _NO_STRIDES
            continue
        check_layout(name, x, shaped, axes)
        strides = x.stride()
        values += strides[0], *(0,) * no_axes, *strides[1 : len(axes) + 2]
    return _PLAN.pack(*values)


_is_forked = False


def _note_fork() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _threads() -> int:
    """PyTorch's number; one in a forked process, which OpenMP's threads did not follow."""
    return 1 if _is_forked else torch.get_num_threads()


# ---------------------------------------------------------------------------------------------------------------------
# What natten/dispatch.py asks for
# ---------------------------------------------------------------------------------------------------------------------

_problems = Problems(_run, with_contiguous_rows)
attention, attention_backward = _problems.attention, _problems.attention_backward
query_key, query_key_backward = _problems.query_key, _problems.query_key_backward
weight_value, weight_value_backward = _problems.weight_value, _problems.weight_value_backward
