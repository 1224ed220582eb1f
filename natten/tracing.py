"""What the library needs in programs that are recorded for any size: by torch.jit.trace, torch.export and torch.fx.

While torch.jit.trace records, the sizes of tensors are tensors. While torch.export records a dynamic axis, its length
is a symbolic integer, and a condition on it restricts the program to lengths for which it has the same result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor, fx, nn

P = ParamSpec("P")
R = TypeVar("R")


def is_recorded() -> bool:
    """Return whether torch.jit.trace records a module.

    fvcore records too, but counts autograd functions instead; ONNX export does, but does not know natten's operators.
    """
    is_module_trace = torch.jit._trace._trace_module_map is not None and torch.jit.is_tracing()
    return is_module_trace and not torch.onnx.is_in_onnx_export()


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Keep torch.jit.trace from recording what a function does: it sees sizes as plain integers, not as tensors."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if torch.compiler.is_compiling() or not torch.jit.is_tracing():
            return function(*args, **kwargs)
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]

    return wrapper


def is_unknown(sizes: Iterable[Any]) -> bool:
    """Return whether sizes are not numbers, because the recorded program takes any size."""
    unknown = torch.SymInt if torch.compiler.is_exporting() else Tensor
    return any(isinstance(size, unknown) for size in sizes)


def no_size_guards() -> AbstractContextManager:
    """Return a context in which views do not restrict the lengths of an exported program."""
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        return torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    return nullcontext()


def resize(x_BXC: Tensor, space: Sequence[Any]) -> Tensor:
    """Crop or zero-pad the spatial axes of a map with unknown lengths, without a condition on them."""
    for axis, length in enumerate(space, start=1):
        position = torch.arange(length, device=x_BXC.device)
        is_new = position >= x_BXC.shape[axis]
        x_BXC = x_BXC.index_select(axis, position.masked_fill(is_new, 0))
        x_BXC = x_BXC.masked_fill(is_new.view(-1, *[1] * (x_BXC.dim() - axis - 1)), 0.0)
    return x_BXC


def fix_lengths(x: Tensor, first: int, lengths: Sequence[int]) -> Tensor:
    """Make a program of ONNX's TorchScript exporter fail on maps of another size, whose windows it does not know.

    Args:
        x: the map.
        first: the first spatial axis.
        lengths: the lengths of the spatial axes.
    """
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
        for axis, length in enumerate(lengths, start=first):
            (x,) = x.split_with_sizes([length], axis)
    return x


def record_call(layer: nn.Module, x: fx.Proxy) -> Any:
    """Return the output of a layer for torch.fx, which records the layer as one node, like the layers of torch.nn."""
    tracer: Any = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), (x,), {})


def refuse_script(module: nn.Module) -> NoReturn:
    """Raise ValueError; called by the method `__prepare_scriptable__`, which torch.jit.script calls first."""
    raise ValueError(f"{type(module).__name__} does not support torch.jit.script; use torch.jit.trace.")
