"""Argument validation: every check of the public functions, layers and commands, and its message.

Checks of calls return the validated problem: the axes, or the window arguments with one value per axis. A failed check
raises ValueError with a message that starts with the offending argument.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from math import prod
from numbers import Integral
from typing import Any, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor

from natten.geometry import Axis, Margin, margin
from natten.tracing import untraced

IntOrTuple = int | Sequence[int]
BoolOrTuple = bool | Sequence[bool]
Window = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]

WINDOW_PADDINGS = ("shift", "zeros", "valid")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

P = ParamSpec("P")
R = TypeVar("R")


# ---------------------------------------------------------------------------------------------------------------------
# Cache
#
# On small maps, validation is a large part of a call: with a 7x7 map and one head it takes 20 us without the cache and
# 5 us with it; the whole call then takes about 30 us.
# ---------------------------------------------------------------------------------------------------------------------

MAX_RESULTS = 4096  # per cached function


def cached(function: Callable[P, R]) -> Callable[P, R]:
    """Cache the results of a function. The key is the values of its arguments and, for tensors, their layout.

    The function takes positional arguments. It may read the dtype, device, shape and strides of its tensors, but not
    their contents, and must not return None. Not cached: errors, calls with symbolic sizes, and calls that
    torch.compile traces. torch.jit.trace does not record what the function does.
    """
    results: dict[tuple, Any] = {}

    @untraced
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        try:
            key = tuple(map(_cache_key, args))
            result = results.get(key)
        except (TypeError, RuntimeError):  # a symbolic size has no hash, a nested tensor no shape
            return function(*args, **kwargs)
        if result is None:
            result = function(*args, **kwargs)
            if len(results) >= MAX_RESULTS:
                results.clear()
            results[key] = result
        return result

    return wrapper


_PLAIN_TYPES = {int, float, bool, str, type(None)}  # looked up first: isinstance(value, Tensor) is slow


def _cache_key(value: Any) -> tuple:
    """Return a hashable key that includes the type, because True == 1."""
    value_type = type(value)
    if value_type in _PLAIN_TYPES:
        return value, value_type
    if isinstance(value, (tuple, list)):
        return tuple(value), tuple(map(type, value))
    if isinstance(value, Tensor):
        return value.dtype, value.device, value.shape, value.stride()
    return value, value_type


# ---------------------------------------------------------------------------------------------------------------------
# Calls
# ---------------------------------------------------------------------------------------------------------------------


@cached
def check_fused(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None,
    dilation: IntOrTuple | None,
    is_causal: BoolOrTuple | None,
) -> tuple[Axis, ...]:
    """Validate a fused call whose query, key and value [B, *space, heads, head_dim] have the same shape."""
    check_tensors(rank, query=query, key=key, value=value)
    axes = make_axes(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    check_rpb(rpb, axes, query.shape[-2], query.dtype, query.device)
    return axes


@cached
def check_packed(
    rank: int,
    qkv: Tensor,
    rpb: Tensor | None,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None,
    dilation: IntOrTuple | None,
    is_causal: BoolOrTuple | None,
) -> tuple[Axis, ...]:
    """Validate a fused call with packed qkv [B, *space, 3, heads, head_dim]."""
    check_packing(rank, qkv)
    query = qkv.select(-3, 0)
    check_tensors(rank, qkv=query)
    axes = make_axes(query.shape[1:-2], kernel_size, stride, dilation, is_causal)
    check_rpb(rpb, axes, query.shape[-2], query.dtype, query.device)
    return axes


@cached
def check_composed(
    rank: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None,
    dilation: IntOrTuple | None,
    is_causal: BoolOrTuple | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    window_padding: str,
) -> tuple[tuple[Axis, ...], tuple[Margin, ...]]:
    """Validate any fused call; return the axes of the padded map and its margins, none for window_padding="shift"."""
    check_window_padding(window_padding)
    check_attention(rank, query, key, value)
    check_additional(additional_keys, additional_values, key, value)
    space: Sequence[int] = query.shape[1:-2]
    margins: tuple[Margin, ...] = ()
    if window_padding != "shift":
        margins = make_margins(space, check_window(rank, kernel_size, stride, dilation, is_causal), window_padding)
        space = [margin.before + length + margin.after for margin, length in zip(margins, space, strict=True)]
    axes = make_axes(space, kernel_size, stride, dilation, is_causal)
    check_rpb(rpb, axes, query.shape[-2], query.dtype, query.device)
    return axes, margins


@cached
def check_qk(
    rank: int,
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None,
    is_causal: BoolOrTuple | None,
    additional_keys: Tensor | None,
) -> tuple[Axis, ...]:
    """Validate a call of na*_qk with query and key [B, heads, *space, head_dim]."""
    check_tensors(rank, query=query, key=key)
    if key.shape != query.shape:
        raise ValueError(
            f"key has shape {tuple(key.shape)}, but query has shape {tuple(query.shape)}; they must be equal."
        )
    check_additional_tokens("additional_keys", additional_keys, "key", key)
    axes = make_axes(query.shape[2:-1], kernel_size, 1, dilation, is_causal)
    check_rpb(rpb, axes, query.shape[1], query.dtype, query.device)
    return axes


@cached
def check_av(
    rank: int,
    attn: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None,
    is_causal: BoolOrTuple | None,
    additional_values: Tensor | None,
) -> tuple[Axis, ...]:
    """Validate a call of na*_av with attn [B, heads, *space, window] and value [B, heads, *space, head_dim].

    The dtype of attn may differ; the call converts it to that of the value.
    """
    check_tensors(rank, attn=attn)
    check_tensors(rank, value=value)
    if attn.device != value.device:
        raise ValueError(f"attn is on {attn.device}, but value is on {value.device}; move one of them.")
    tokens = check_additional_tokens("additional_values", additional_values, "value", value)
    axes = make_axes(value.shape[2:-1], kernel_size, 1, dilation, is_causal)
    expected = (*value.shape[:-1], prod([axis.kernel_size for axis in axes]) + tokens)
    if attn.shape != expected:
        raise ValueError(
            f"attn has shape {tuple(attn.shape)}, but this value and kernel_size require {tuple(expected)}."
        )
    return axes


def check_additional_tokens(name: str, x: Any, like_name: str, like: Tensor) -> int:
    """Check additional keys or values [B, heads, N, head_dim] of an unfused call, and return N; 0 for None.

    Raises:
        ValueError: if it is no tensor or does not fit.
    """
    if x is None:
        return 0
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} = {x!r} must be a tensor; pass is_causal, rpb and backend by name.")
    tokens = x.shape[-2] if x.dim() == 4 else 0
    expected = (*like.shape[:2], tokens, like.shape[-1])
    if tuple(x.shape) != expected:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, but this call requires {tuple(expected)}: batch, heads, tokens and "
            "head_dim."
        )
    _check_same_dtype_and_device(name, x, like_name, like)
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Window
# ---------------------------------------------------------------------------------------------------------------------


def per_axis(value: Any, rank: int, name: str, item_type: type) -> tuple:
    """Return an argument, which is a single value or one value per axis, as a tuple of `rank` values.

    Args:
        value: the argument.
        rank: number of axes.
        name: name of the argument, for the message.
        item_type: int or bool; integers of NumPy and symbolic integers of torch.compile are accepted as int.

    Raises:
        ValueError: if the type or the number of values is wrong.
    """
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank or not all(_has_type(item, item_type) for item in values):
        raise ValueError(
            f"{name} = {value!r} is invalid; use a single {item_type.__name__}, or a sequence of {rank}, one per axis."
        )
    return tuple(item if isinstance(item, torch.SymInt) else item_type(item) for item in values)


def _has_type(value: Any, item_type: type) -> bool:
    if item_type is bool or isinstance(value, bool):  # a bool is an int, but True is no kernel_size
        return item_type is bool and isinstance(value, bool)
    return isinstance(value, (int, torch.SymInt, Integral))


def check_window(
    rank: int,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None,
    dilation: IntOrTuple | None,
    is_causal: BoolOrTuple | None,
) -> Window:
    """Return the four window arguments as tuples with one value per axis.

    None for stride, dilation and is_causal means 1, 1 and False, as in older releases.

    Raises:
        ValueError: if kernel_size < 2, stride < 1, stride > kernel_size, dilation < 1, or the number of values is not
            1 or `rank`.
    """
    kernel_size = per_axis(kernel_size, rank, "kernel_size", int)
    stride = per_axis(1 if stride is None else stride, rank, "stride", int)
    dilation = per_axis(1 if dilation is None else dilation, rank, "dilation", int)
    is_causal = per_axis(False if is_causal is None else is_causal, rank, "is_causal", bool)
    for axis, (k, s, d) in enumerate(zip(kernel_size, stride, dilation, strict=True)):
        if k < 2:
            raise ValueError(f"kernel_size = {k} on axis {axis} is too small; use at least 2.")
        if not 1 <= s <= k:
            raise ValueError(f"stride = {s} on axis {axis} must be between 1 and kernel_size = {k}.")
        if d < 1:
            raise ValueError(f"dilation = {d} on axis {axis} must be at least 1.")
    return kernel_size, stride, dilation, is_causal


def make_axes(
    space: Sequence[int],
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = 1,
    dilation: IntOrTuple | None = 1,
    is_causal: BoolOrTuple | None = False,
) -> tuple[Axis, ...]:
    """Return the validated axes of a problem on a map with the given lengths in tokens.

    Raises:
        ValueError: as `check_window`, or if kernel_size * dilation exceeds the length of an axis.
    """
    window = check_window(len(space), kernel_size, stride, dilation, is_causal)
    axes = tuple(Axis(*values) for values in zip(space, *window, strict=True))
    for index, axis in enumerate(axes):
        if axis.kernel_size * axis.dilation > axis.length:
            raise ValueError(
                f"kernel_size * dilation = {axis.kernel_size} * {axis.dilation} = {axis.kernel_size * axis.dilation} "
                f"exceeds the length {axis.length} of axis {index} (map: {'x'.join(f'{n}' for n in space)}; heads come "
                f"after the map); use a smaller window, or the layer NeighborhoodAttention{len(axes)}D, which pads."
            )
    return axes


def check_window_padding(window_padding: str) -> None:
    """Raise ValueError if `window_padding` is unknown."""
    if window_padding not in WINDOW_PADDINGS:
        raise ValueError(
            f"window_padding = {window_padding!r} is unknown; use one of {', '.join(map(repr, WINDOW_PADDINGS))}."
        )


def make_margins(space: Sequence[int], window: Window, window_padding: str) -> tuple[Margin, ...]:
    """Return the margin of each axis for a validated window and window_padding "zeros" or "valid".

    Raises:
        ValueError: if a stride is above 1, or if an axis is too short to hold a single window.
    """
    margins = []
    for index, axis in enumerate(Axis(*values) for values in zip(space, *window, strict=True)):
        if axis.stride > 1:
            raise ValueError(
                f"stride = {axis.stride} on axis {index} is not supported with window_padding={window_padding!r}; use "
                "stride 1, or window_padding='shift'."
            )
        margins.append(margin(axis, window_padding))
        if margins[-1].queries < 1:
            span = axis.length + 1 - margins[-1].queries
            raise ValueError(
                f"window_padding='valid' leaves no query on axis {index}: a window with kernel_size "
                f"{axis.kernel_size} and dilation {axis.dilation} spans {span} tokens, but the axis has {axis.length}; "
                "use a smaller window."
            )
    return tuple(margins)


# ---------------------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------------------


def check_tensors(rank: int, **tensors: Tensor) -> None:
    """Check that the tensors have rank + 3 dimensions, a common dtype out of `DTYPES` and a common device.

    Raises:
        ValueError: naming the first tensor that does not.
    """
    (first_name, first), *others = tensors.items()
    for name, x in tensors.items():
        require_tensor(name, x)
        if x.dim() != rank + 3:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but {rank}-D neighborhood attention requires {rank + 3} "
                f"dimensions: batch, {rank} spatial, heads and head_dim."
            )
        if x.shape[-1] == 0:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, but its last dimension must not be empty.")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype}; use float16, bfloat16, float32 or float64.")
    for name, x in others:
        _check_same_dtype_and_device(name, x, first_name, first)


def require_tensor(name: str, x: Any) -> None:
    """Raise ValueError if an argument is not a tensor, or a nested one, which has no shape."""
    if not isinstance(x, Tensor):
        raise ValueError(f"{name} is {'None' if x is None else type(x).__name__}; give a tensor.")
    if x.is_nested:
        raise ValueError(f"{name} is a nested tensor, which is not supported; pass the maps of each size separately.")


def _check_same_dtype_and_device(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(
            f"{name} is {x.dtype} on {x.device}, but {like_name} is {like.dtype} on {like.device}; convert one of them."
        )


def check_packing(rank: int, qkv: Tensor) -> None:
    """Raise ValueError unless qkv has the dimensions [B, *space, 3, heads, head_dim]."""
    require_tensor("qkv", qkv)
    if qkv.dim() != rank + 4 or qkv.shape[-3] != 3:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}, but must have {rank + 4} dimensions: batch, {rank} spatial, 3 (query, "
            "key, value), heads and head_dim."
        )


def check_attention(rank: int, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check heads-last query, key and value. Key and value may have fewer heads, and value another head_dim.

    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    check_tensors(rank, query=query, key=key, value=value)
    for name, x in {"key": key, "value": value}.items():
        if x.shape[:-2] != query.shape[:-2]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but query has shape {tuple(query.shape)}; batch and spatial "
                "dimensions must be equal."
            )
    _check_heads_of_tensors(query, key, value)


def check_full_attention(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check query [B, L, heads, head_dim], and key and value [B, M, heads, head_dim].

    Raises:
        ValueError: naming the first tensor that does not fit.
    """
    check_tensors(1, query=query, key=key, value=value)
    if key.shape[0] != query.shape[0]:
        raise ValueError(f"key has batch size {key.shape[0]}, but query has {query.shape[0]}; they must be equal.")
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"value has shape {tuple(value.shape)}, but key has shape {tuple(key.shape)}; batch size and length must "
            "be equal."
        )
    _check_heads_of_tensors(query, key, value)


def _check_heads_of_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key has head_dim {key.shape[-1]}, but query has {query.shape[-1]}; they must be equal.")
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if value.shape[-2] != kv_heads:
        raise ValueError(f"value has {value.shape[-2]} heads, but key has {kv_heads}; they must be equal.")
    if heads != kv_heads and (0 in (heads, kv_heads) or heads % kv_heads):
        raise ValueError(
            f"key and value have {kv_heads} heads, but query has {heads}; the heads of the query must be a multiple of "
            "those."
        )


def check_additional(
    additional_keys: Tensor | None, additional_values: Tensor | None, key: Tensor, value: Tensor
) -> None:
    """Check additional keys and values [B, N, heads, head_dim] against the key and value of the map.

    Raises:
        ValueError: naming the tensor that does not fit or is missing.
    """
    if additional_keys is None and additional_values is None:
        return
    if additional_keys is None or additional_values is None:
        missing = "additional_keys" if additional_keys is None else "additional_values"
        raise ValueError(f"{missing} is missing; give additional_keys and additional_values together, or neither.")
    require_tensor("additional_keys", additional_keys)
    require_tensor("additional_values", additional_values)
    tokens = additional_keys.shape[1] if additional_keys.dim() > 1 else 0
    pairs = {"additional_keys": (additional_keys, key), "additional_values": (additional_values, value)}
    for name, (x, like) in pairs.items():
        expected = (like.shape[0], tokens, *like.shape[-2:])
        if tuple(x.shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, but this call requires {tuple(expected)}: batch, tokens, heads "
                "and head_dim."
            )
        _check_same_dtype_and_device(name, x, "key", like)


def check_rpb(rpb: Tensor | None, axes: Sequence[Axis], heads: int, dtype: torch.dtype, device: torch.device) -> None:
    """Check a relative position bias of shape [heads, 2K-1 per axis], in float32 or the query's dtype.

    Raises:
        ValueError: if its shape, dtype or device does not fit.
    """
    if rpb is None:
        return
    require_tensor("rpb", rpb)
    expected = (heads, *(2 * axis.kernel_size - 1 for axis in axes))
    if tuple(rpb.shape) != expected:
        raise ValueError(
            f"rpb has shape {tuple(rpb.shape)}, but {heads} heads and this kernel_size require {expected}."
        )
    if rpb.dtype not in (dtype, torch.float32):
        raise ValueError(f"rpb has dtype {rpb.dtype}; use float32 or the dtype of the query, {dtype}.")
    if rpb.device != device:
        raise ValueError(f"rpb is on {rpb.device}, but query is on {device}; move one of them.")


def is_default_scale(scale: Any) -> bool:
    """Return whether a factor on the logits means head_dim ** -0.5: None, False and 0, as in older releases."""
    if scale is None or not isinstance(scale, (int, float)):
        return scale is None
    if torch.compiler.is_compiling() and not has_static_value(scale):
        return False  # a scale that varies; comparing it would compile a graph for each value
    return scale == 0


def has_static_value(number: float) -> bool:
    """Return whether a number is the same in each call that torch.compile traces now."""
    return torch.fx.experimental.symbolic_shapes.has_static_value(number)  # importing this module takes 0.4 s


def check_scale(scale: Any) -> float:
    """Return the factor on the logits as a float.

    Raises:
        ValueError: if it is not a single number, or a tensor whose gradient would be lost.
    """
    if isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "scale is a tensor that requires grad, but scale has no gradient; multiply the query by it and pass "
            "scale=1.0, or pass scale.item()."
        )
    try:
        return float(scale)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"scale = {scale!r} is invalid; use a single number.") from error


def check_merged(outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor]) -> None:
    """Check the arguments of `merge_attentions`.

    Raises:
        ValueError: naming the tensor that does not fit.
    """
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        raise ValueError(
            f"outputs and lse_tensors have {len(outputs)} and {len(lse_tensors)} items; give two or more of each, and "
            "equally many."
        )
    first = outputs[0]
    for index, (output, lse) in enumerate(zip(outputs, lse_tensors, strict=True)):
        if (output.shape, output.dtype, output.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"outputs[{index}] is {output.dtype} of shape {tuple(output.shape)} on {output.device}, but outputs[0] "
                f"is {first.dtype} of shape {tuple(first.shape)} on {first.device}; they must match."
            )
        if lse.shape != output.shape[:-1] or lse.device != output.device:
            raise ValueError(
                f"lse_tensors[{index}] has shape {tuple(lse.shape)} on {lse.device}, but its output requires "
                f"{tuple(output.shape[:-1])} on {output.device}."
            )


@untraced
def have_one_shape(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether three arguments have the same shape.

    Raises:
        ValueError: naming the first that is not a tensor.
    """
    for name, x in {"query": query, "key": key, "value": value}.items():
        require_tensor(name, x)
    return query.shape == key.shape == value.shape


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------


def check_heads(dim: int, num_heads: int, order: str) -> None:
    """Raise ValueError unless num_heads divides dim.

    Args:
        order: the order of the layer's arguments, for the message; it was different up to NATTEN 0.14.4.
    """
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads = {num_heads} does not divide dim = {dim}; the order of arguments is {order}.")


def check_layer_options(stride: Sequence[int], attn_drop: float, window_padding: str) -> None:
    """Raise ValueError if options of a layer cannot be combined, or if window_padding is unknown."""
    has_stride = any(s > 1 for s in stride)
    if attn_drop > 0 and has_stride:
        raise ValueError(
            f"attn_drop = {attn_drop} is not supported with a stride above 1; use attn_drop=0, or stride 1."
        )
    check_window_padding(window_padding)
    if window_padding != "shift" and (attn_drop > 0 or has_stride):
        raise ValueError(
            f"window_padding={window_padding!r} supports neither a stride above 1 nor attn_drop; use 'shift'."
        )


@untraced
def check_layer_input(x: Tensor, rank: int, dim: int) -> None:
    """Raise ValueError unless x has shape [B, *space, dim]."""
    require_tensor("input", x)
    if x.dim() != rank + 2 or x.shape[-1] != dim:
        raise ValueError(
            f"input has shape {tuple(x.shape)}, but this layer takes {rank + 2} dimensions, channels last: batch, "
            f"{rank} spatial and {dim} channels."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Arguments of other releases
# ---------------------------------------------------------------------------------------------------------------------

# Keyword arguments of fused functions since NATTEN 0.17.4, which tune kernels that do not exist here.
TUNING = frozenset(
    (
        "attention_kwargs",
        "backward_kv_splits",
        "backward_kv_tile_size",
        "backward_kv_tile_shape",
        "backward_q_tile_shape",
        "backward_q_tile_size",
        "backward_use_pt_reduction",
        "kernel_schedule",
        "kv_tile_shape",
        "kv_tile_size",
        "q_tile_shape",
        "q_tile_size",
        "run_persistent_kernel",
        "torch_compile",
        "try_fuse_additional_kv",
        "xformers_kwargs",
    )
)


def ignore_tuning(function: str, names: Iterable[str]) -> None:
    """Ignore the keyword arguments in `TUNING`, with one warning for each.

    Raises:
        TypeError: for any other keyword argument.
    """
    for name in names:
        if name not in TUNING:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        if not torch.compiler.is_compiling():  # torch.compile cannot trace warnings
            _warn_ignored(name)


def merge_first_axis(name: str, value: Any, first: int | None) -> Any:
    """Return a 3-D window argument, of which NATTEN 0.15 took the value for the first axis separately.

    Args:
        name: name of the argument, for the message.
        value: the argument.
        first: the value for the first axis, or None if it was not given separately.

    Raises:
        ValueError: if both say something about the first axis.
    """
    if first is None:
        return value
    if not isinstance(value, int) or not isinstance(first, int):
        raise ValueError(f"{name}_d = {first!r} requires that {name} is an int, not {value!r}; give {name} per axis.")
    return first, value, value


def order_3d(arguments: tuple, kernel_size_d: int | None, dilation_d: int | None) -> tuple[Any, ...]:
    """Return the arguments of an unfused 3-D function in its own order, or in that of NATTEN 0.15.

    Args:
        arguments: kernel_size, dilation, additional tokens, is_causal and the argument that follows. In NATTEN 0.15,
            these were kernel_size_d, kernel_size, dilation_d, dilation and additional tokens.
        kernel_size_d, dilation_d: the values for the first axis, if given by name.

    Raises:
        ValueError: as `merge_first_axis`.
    """
    kernel_size, dilation, additional, is_causal, last = arguments
    if isinstance(additional, int) and not isinstance(additional, bool):
        kernel_size_d, kernel_size, dilation_d, dilation = kernel_size, dilation, additional, is_causal
        additional, is_causal, last = last, False, None
    kernel_size = merge_first_axis("kernel_size", kernel_size, kernel_size_d)
    dilation = merge_first_axis("dilation", dilation, dilation_d)
    return kernel_size, dilation, additional, is_causal, last


@functools.cache
def _warn_ignored(name: str) -> None:
    warnings.warn(f"{name} has no effect; natten chooses its kernels itself.", UserWarning, stacklevel=2)


# ---------------------------------------------------------------------------------------------------------------------
# Command lines of natten.build, natten.geometry and natten.profiler
# ---------------------------------------------------------------------------------------------------------------------


CAUSAL_HELP = "causal axes, counted from 0 (default: none; all if no axis follows)"


class CommandParser(argparse.ArgumentParser):
    """A parser that reports an error in one line, without the usage, and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse_numbers(text: str) -> tuple[int, ...]:
    """Parse a single number, or one per axis, such as "7" or "56x56".

    Raises:
        argparse.ArgumentTypeError: if the text is neither.
    """
    try:
        return tuple(int(word) for word in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or numbers such as 12x12") from None


def parse_causal(axes: Sequence[int] | None, rank: int) -> tuple[bool, ...]:
    """Return is_causal per axis for the option ``--causal [AXIS ...]``.

    Args:
        axes: the causal axes; empty for all axes, None without the option.
        rank: number of axes.

    Raises:
        ValueError: if an axis does not exist.
    """
    if axes and not set(axes) <= set(range(rank)):
        raise ValueError(f"--causal {axes} names an axis that --size lacks; use axes 0 to {rank - 1}.")
    return tuple(axes is not None and (not axes or axis in axes) for axis in range(rank))
