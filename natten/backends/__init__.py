"""The backends that compute neighborhood attention, and the choice among them.

Each backend is a module with the interface of `Backend`. The operators of natten call `choose` at run time: it returns
the first backend of `LADDER` that supports the call. Set ``NATTEN_LOG_LEVEL=DEBUG`` to log each choice.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from natten.backends import cpu, cuda, reference
from natten.geometry import Axis


class Backend(Protocol):
    """The interface of a backend module.

    Shapes: B batch, X the spatial axes, H heads, d head_dim, W keys per window. Fused attention takes heads-last
    tensors [B, X, H, d], unfused attention (`query_key` and `weight_value`) heads-first tensors [B, H, X, d]. In fused
    attention key and value may have fewer heads, and value another head_dim, which is then that of the output.

    Attributes:
        NAME: the name that users pass as `backend=`.
    """

    NAME: str

    def unsupported_reason(self, query: Tensor) -> str | None:
        """Return why this backend cannot run a call with such a query (or value), or None if it can."""

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, axes: Sequence[Axis], scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return the output [B, X, H, d] and the logsumexp of the logits [B, X, H]."""

    def attention_backward(
        self,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rpb: Tensor | None,
        out: Tensor,
        lse: Tensor,
        axes: Sequence[Axis],
        scale: float,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of query, key and value in one tensor, and that of rpb; see `reference.split_grads`."""

    def query_key(self, query: Tensor, key: Tensor, rpb: Tensor | None, axes: Sequence[Axis]) -> Tensor:
        """Return the unscaled logits [B, H, X, W]."""

    def query_key_backward(
        self, grad_attn: Tensor, query: Tensor, key: Tensor, rpb: Tensor | None, axes: Sequence[Axis]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the gradients of query, key and rpb."""

    def weight_value(self, attn: Tensor, value: Tensor, axes: Sequence[Axis]) -> Tensor:
        """Return the weighted sums of values [B, H, X, d]."""

    def weight_value_backward(
        self, grad_out: Tensor, attn: Tensor, value: Tensor, axes: Sequence[Axis]
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of attn and value."""


LADDER: tuple[Backend, ...] = (cpu, cuda, reference)  # fastest first; the reference supports every call
NAMES = tuple(module.NAME for module in LADDER)
# Backend names of NATTEN 0.20 and later. They select among kernels that do not exist here, so they are ignored.
IGNORED_NAMES = ("blackwell-fna", "cutlass-fna", "flex-fna", "hopper-fna")

log = logging.getLogger("natten")


class _Default(threading.local):
    """The default backend of each thread; torch.compile guards on `name` if it is set for each instance."""

    def __init__(self) -> None:
        self.name: str | None = os.environ.get("NATTEN_BACKEND") or None


_default = _Default()


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Set the default backend of the current thread for the duration of a ``with`` block.

    Calls that pass `backend` are not affected. The environment variable NATTEN_BACKEND sets the default for all threads
    of a process.

    Args:
        name: "reference", "cpu" or "cuda"; None selects the fastest backend that supports each call.

    Raises:
        ValueError: if the backend is unknown.
    """
    if name is not None:
        find(name)
    previous, _default.name = _default.name, name
    try:
        yield
    finally:
        _default.name = previous


def requested(backend: str | None) -> str | None:
    """Return the backend that a call (its `backend` argument) or the thread requests, or None if neither does."""
    if backend in IGNORED_NAMES:
        if not torch.compiler.is_compiling():  # torch.compile cannot trace warnings
            _warn_ignored(backend)
        backend = None
    return backend if backend is not None else _default.name


@functools.cache
def _warn_ignored(name: str) -> None:
    warnings.warn(f"backend={name!r} has no effect; natten chooses the backend itself.", UserWarning, stacklevel=2)


def is_plain(backend: str | None) -> bool:
    """Return whether a call runs as ordinary PyTorch operations instead of natten's operators.

    This is the case if the reference backend is requested by name, and in exported programs.
    """
    return backend == reference.NAME or is_exported()


def is_exported() -> bool:
    """Return whether a program is being recorded for runtimes that do not know natten's operators.

    These are ONNX, and torch.export, whose programs may run on a machine without natten.
    """
    # The flag itself: in older releases torch.compiler.is_exporting() is also True under torch.compile.
    if torch.compiler._is_exporting_flag:
        return True
    return torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()  # the TorchScript exporter


def choose(query: Tensor, backend: str | None) -> Backend:
    """Return the backend that runs a call with such a query (for `na*_av`: with such a value).

    Raises:
        ValueError: if `backend` names an unknown backend, or one that does not support this call.
    """
    if backend is not None:
        module = find(backend)
        reason = module.unsupported_reason(query)
        if reason is not None:
            raise ValueError(f"backend={backend!r} does not support this call: {reason}.")
        _log_choice("runs", module, query, "requested by name")
        return module
    for module in LADDER:
        reason = module.unsupported_reason(query)
        if reason is None:
            _log_choice("runs", module, query, "the fastest supported backend")
            return module
        _log_choice("skips", module, query, reason)
    raise AssertionError("the reference backend supports every call")


def _log_choice(verb: str, module: Backend, query: Tensor, reason: str) -> None:
    if not log.isEnabledFor(logging.DEBUG):
        return
    shape = tuple(query.shape)
    log.debug("backend %s %s query %s %s on %s: %s", module.NAME, verb, shape, query.dtype, query.device, reason)


def find(name: str) -> Backend:
    """Return the backend with this name.

    Raises:
        ValueError: if the name is unknown.
    """
    for module in LADDER:
        if name == module.NAME:
            return module
    raise ValueError(f"backend={name!r} is unknown; use one of {', '.join(map(repr, NAMES))}, or None.")


def read_environment() -> None:
    """Check NATTEN_BACKEND and apply NATTEN_LOG_LEVEL.

    Raises:
        ValueError: if either has an invalid value.
    """
    if _default.name is not None and _default.name not in NAMES:
        raise ValueError(f"NATTEN_BACKEND={_default.name!r} is unknown; use one of {', '.join(map(repr, NAMES))}.")
    level = os.environ.get("NATTEN_LOG_LEVEL", "").upper()
    if not level:
        return
    if level not in logging.getLevelNamesMapping():
        raise ValueError(f"NATTEN_LOG_LEVEL={level!r} is unknown; use DEBUG, INFO, WARNING or ERROR.")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("natten %(levelname)s: %(message)s"))
    log.addHandler(handler)
    log.setLevel(level)
