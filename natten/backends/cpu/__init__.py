"""The cpu backend: kernels in C++ (natten/csrc/cpu), compiled for this machine by natten/backends/cpu/build.py.

A call passes two structures to C++: a plan, which describes the problem and the strides of its tensors, and the
addresses of the tensors. Plans are cached, because making one takes longer than solving a small problem. Inputs must be
finite, as for the reference backend.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache
from struct import Struct

import torch
from torch import Tensor

from natten.backends.cpu import build
from natten.backends.kernels import (
    DTYPES,
    TENSORS,
    KernelBackend,
    check_heads_and_dims,
    check_layout,
    unsupported_input,
    warn_fallback,
    with_contiguous_rows,
)
from natten.checks import cached, check_rpb
from natten.geometry import Axis

NAME = "cpu"

# The structures of csrc/cpu/plan.h.
_PLAN = Struct(f"=6q 15q d {len(TENSORS) * 5}q")
_ADDRESSES = Struct(f"{len(TENSORS)}P")
_ARGUMENTS = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
_MAX_DIM = 4096  # largest head_dim; the memory per thread is proportional to it
_NO_AXIS = (1, 1, 1, 1, 0)
_NO_STRIDES = (0,) * 5


def unsupported_reason(query: Tensor) -> str | None:
    """Return why this backend cannot run a call with such a query (or value), or None if it can."""
    if query.device.type != "cpu":
        return f"the tensors are on {query.device}"
    reason = unsupported_input(query, _MAX_DIM)
    if reason is not None:
        return reason
    try:
        build.cpu_library()
    except RuntimeError as error:
        return warn_fallback(str(error))
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Plans and calls
# ---------------------------------------------------------------------------------------------------------------------


def launch(op: str, axes: Sequence[Axis], scale: float, rpb: Tensor | None, **tensors: Tensor) -> Tensor | None:
    """Run one op in C++; see `KernelBackend` for the arguments.

    Returns:
        The gradient of rpb, or None if the op has none.

    Raises:
        MemoryError: if the kernels cannot allocate their workspace.
        RuntimeError: if they fail for another reason.
    """
    shaped = tensors["QUERY"] if "QUERY" in tensors else tensors["VALUE"]
    table = grad_rpb = None
    if rpb is not None:
        table = rpb.float().contiguous()
        if op.endswith("_backward"):
            grad_rpb = rpb.new_empty(rpb.shape, dtype=torch.float32)
    plan = _plan(shaped, axes, scale, rpb, tuple(tensors), *tensors.values())
    given = [tensors.get(name) for name in TENSORS] + [table, grad_rpb]
    *addresses, table_address, grad_address = [0 if x is None else x.data_ptr() for x in given]
    function = _function(build.cpu_library(), op)
    status = function(plan, _ADDRESSES.pack(*addresses), table_address, grad_address, _threads())
    if status == 1:
        raise MemoryError(f"natten's CPU kernels ran out of memory on tensors of shape {tuple(shaped.shape)}.")
    if status:
        raise RuntimeError(
            f"natten's CPU kernels failed on tensors of shape {tuple(shaped.shape)}; use backend='reference'."
        )
    return None if rpb is None or grad_rpb is None else grad_rpb.to(rpb.dtype)


@cache
def _function(library: ctypes.CDLL, op: str) -> Callable[..., int]:
    function = getattr(library, f"natten_{op}")
    function.argtypes, function.restype = _ARGUMENTS, ctypes.c_int
    return function


@cached
def _plan(
    shaped: Tensor, axes: Sequence[Axis], scale: float, rpb: Tensor | None, names: tuple[str, ...], *tensors: Tensor
) -> bytes:
    """Return the plan of a problem whose query (or value) is `shaped`, for the named tensors.

    Raises:
        ValueError: if a tensor does not match `shaped`.
    """
    check_rpb(rpb, axes, shaped.shape[-2], shaped.dtype, shaped.device)
    given = dict(zip(names, tensors, strict=True))
    heads, dim = shaped.shape[-2:]
    kv_heads, value_dim = given.get("KEY", shaped).shape[-2], given.get("VALUE", shaped).shape[-1]
    check_heads_and_dims(heads, kv_heads, dim, value_dim)
    if ("ATTN" in given or "GRAD_ATTN" in given) and any(axis.stride != 1 for axis in axes):
        raise ValueError("stride must be 1 in unfused attention.")
    missing_axes = 3 - len(axes)
    values: list[float] = [DTYPES[shaped.dtype], shaped.shape[0], heads, kv_heads, dim, value_dim]
    values += (*_NO_AXIS * missing_axes, *(int(value) for axis in axes for value in axis))
    values.append(scale)
    for name in TENSORS:
        x = given.get(name)
        if x is None:
            values += _NO_STRIDES
            continue
        check_layout(name, x, shaped, axes, kv_heads, value_dim)
        strides = x.stride()
        values += strides[0], *(0,) * missing_axes, *strides[1 : len(axes) + 2]
    return _PLAN.pack(*values)


_is_forked = False


def _set_forked() -> None:
    global _is_forked
    _is_forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_set_forked)


def _threads() -> int:
    """Return PyTorch's number of threads, or 1 in a forked process, where OpenMP's threads do not exist."""
    return 1 if _is_forked else torch.get_num_threads()


# ---------------------------------------------------------------------------------------------------------------------
# The interface of natten.backends.Backend
# ---------------------------------------------------------------------------------------------------------------------

KERNELS = KernelBackend(launch, with_contiguous_rows, _MAX_DIM)
attention, attention_backward = KERNELS.attention, KERNELS.attention_backward
query_key, query_key_backward = KERNELS.query_key, KERNELS.query_key_backward
weight_value, weight_value_backward = KERNELS.weight_value, KERNELS.weight_value_backward
