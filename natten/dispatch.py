"""Which backend takes a call, and why the others did not.

A backend is a module of natten.backends with

- `NAME`, what a caller writes in `backend=`;
- `refuses(query) -> str | None`: why it cannot take a call with such a query, or None if it can;
- `attention(query, key, value, rpb, axes, scale) -> (out, lse)`, heads-last;
- `attention_backward(grad_out, grad_lse, query, key, value, rpb, out, lse, axes, scale) -> (grad_qkv, grad_rpb)`;
- the halves, heads-first: `query_key(query, key, rpb, axes) -> attn`, `weight_value(attn, value, axes) -> out`,
  `query_key_backward(grad_attn, query, key, rpb, axes) -> (grad_query, grad_key, grad_rpb)` and
  `weight_value_backward(grad_out, attn, value, axes) -> (grad_attn, grad_value)`.

These run inside the operators of natten/operators.py, at run time.

`NATTEN_LOG_LEVEL=DEBUG` tells which backend took each call.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from natten.backends import cpu, cuda, reference
from natten.context import known_backend

LADDER: tuple[ModuleType, ...] = (
    cpu,
    cuda,
    reference,
)  # the fastest first; the reference, which takes every call, last
NAMES = tuple(module.NAME for module in LADDER)

log = logging.getLogger("natten")

# A plain global rather than a context variable, so that torch.compile can guard on it.
_default: str | None = os.environ.get("NATTEN_BACKEND") or None


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Makes `name` the backend of every call that names none, in all threads, until the block ends.

    Args:
        name: "reference", "cpu" or "cuda", or None to let the fastest usable backend take each call. The environment
            variable NATTEN_BACKEND sets the same for a whole process.

    Raises:
        ValueError: if there is no such backend here.
    """
    global _default
    if name is not None:
        find(name)
    previous, _default = _default, name
    try:
        yield
    finally:
        _default = previous


def requested(backend: str | None) -> str | None:
    """The backend that a call or the process asks for; None if neither does."""
    backend = known_backend(backend)
    return backend if backend is not None else _default


def is_plain(backend: str | None) -> bool:
    """Whether a call runs as ordinary PyTorch operations rather than through the fused operators.

    So it does when the reference is asked for by name, and while a model is exported, since neither ONNX nor a machine
    without natten knows our operators.
    """
    # The flag rather than torch.compiler.is_exporting(), which older versions of torch.compile take for True.
    if backend == reference.NAME or torch.compiler._is_exporting_flag:
        return True
    return torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()  # the older way of exporting


def choose(query: Tensor, backend: str | None) -> ModuleType:
    """The backend that takes a call with such a query (of `na*_av`: such a value).

    Raises:
        ValueError: if `backend` names one that does not exist here or that cannot take this call.
    """
    if backend is not None:
        module = find(backend)
        reason = module.refuses(query)
        if reason is not None:
            raise ValueError(f"backend {backend!r} cannot take this call: {reason}.")
        _tell("takes", module, query, "it was asked for")
        return module
    for module in LADDER:
        reason = module.refuses(query)
        if reason is None:
            _tell("takes", module, query, "it is the fastest that can")
            return module
        _tell("does not take", module, query, reason)
    raise AssertionError("the reference takes every call")


def _tell(verb: str, module: ModuleType, query: Tensor, reason: str) -> None:
    shape = tuple(query.shape)
    log.debug("%s %s query %s %s on %s: %s", module.NAME, verb, shape, query.dtype, query.device, reason)


def find(name: str) -> ModuleType:
    """The backend of that name.

    Raises:
        ValueError: if the name is unknown.
    """
    for module in LADDER:
        if name == module.NAME:
            return module
    here = ", ".join(map(repr, NAMES))
    raise ValueError(f"backend {name!r} is unknown: use one of {here}, or None to let natten choose.")


def obey_environment() -> None:
    """Checks NATTEN_BACKEND and obeys NATTEN_LOG_LEVEL.

    Raises:
        ValueError: naming the variable whose value is not one of those possible.
    """
    if _default is not None and _default not in NAMES:
        raise ValueError(f"NATTEN_BACKEND is {_default!r}, but must be one of {', '.join(map(repr, NAMES))}.")
    level = os.environ.get("NATTEN_LOG_LEVEL", "").upper()
    if not level:
        return
    if level not in logging.getLevelNamesMapping():
        raise ValueError(f"NATTEN_LOG_LEVEL is {level!r}, but must be DEBUG, INFO, WARNING or ERROR.")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("natten %(levelname)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(level)
