"""Helpers of natten.utils in NATTEN 0.15 to 0.21: argument checks, tensors, dtypes, devices, logging."""

from __future__ import annotations

import enum
import logging
import os
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from natten import checks
from natten.compat.types import KernelSchedule

# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


def check_all_args(na_dim: int, kernel_size: Any, *window: Any) -> tuple[tuple, ...]:
    """Return validated window arguments as tuples with one value per axis.

    Args:
        na_dim: number of axes.
        kernel_size: window size.
        *window: dilation and is_causal, as in NATTEN 0.17, or stride, dilation and is_causal, as since 0.20.

    Returns:
        The arguments in the same order.

    Raises:
        TypeError: if there are fewer or more arguments.
        ValueError: naming the argument that does not fit.
    """
    if len(window) not in (2, 3):
        raise TypeError(
            f"check_all_args takes 4 arguments (na_dim, kernel_size, dilation, is_causal), or 5 with stride before "
            f"dilation; got {2 + len(window)}."
        )
    kernel_size, stride, *others = checks.check_window(na_dim, kernel_size, *(1, *window)[-3:])
    return (kernel_size, stride, *others) if len(window) == 3 else (kernel_size, *others)


def check_kernel_size_arg(na_dim: int, kernel_size: Any) -> tuple[int, ...]:
    """Return kernel_size with one value per axis."""
    return checks.check_window(na_dim, kernel_size, 1, 1, False)[0]


def check_stride_arg(na_dim: int, stride: Any) -> tuple[int, ...]:
    """Return stride with one value per axis; 1 for None."""
    return checks.per_axis(1 if stride is None else stride, na_dim, "stride", int)


def check_dilation_arg(na_dim: int, dilation: Any) -> tuple[int, ...]:
    """Return dilation with one value per axis; 1 for None."""
    return checks.check_window(na_dim, 2, 1, dilation, False)[2]


def check_causal_arg(na_dim: int, is_causal: Any) -> tuple[bool, ...]:
    """Return is_causal with one value per axis; False for None."""
    return checks.check_window(na_dim, 2, 1, 1, is_causal)[3]


def check_input_size_arg(na_dim: int, input_size: Any) -> tuple[int, ...]:
    """Return the lengths of the axes with one value per axis."""
    return checks.per_axis(input_size, na_dim, "input_size", int)


def check_args_against_input(
    input_tensor: Tensor, kernel_size: Any, stride: Any, dilation: Any, is_causal: Any
) -> None:
    """Raise ValueError if a window does not fit into the map of a tensor [B, *space, heads, head_dim]."""
    checks.make_axes(input_tensor.shape[1:-2], kernel_size, stride, dilation, is_causal)


def is_self_attention(
    input_tensor: Tensor, kernel_size: Sequence[int], is_causal: Sequence[bool], has_additional_attention: bool = False
) -> bool:
    """Return whether each window of a tensor [B, *space, heads, head_dim] is the whole map."""
    space = input_tensor.shape[1:-2]
    if len(space) == 1 and not has_additional_attention:
        return kernel_size[0] == space[0]
    return tuple(kernel_size) == tuple(space) and not any(is_causal)


def get_num_na_weights(kernel_size: Sequence[int]) -> int:
    """Return the number of keys per window."""
    return prod(kernel_size)


def check_tiling_config(na_dim: int, tiling_config: Any) -> Any:
    """Return the argument; it tunes kernels that do not exist here."""
    return tiling_config


check_backward_tiling_config = check_tiling_config


def check_tile_shape(tile_shape: Sequence[int]) -> tuple[int, ...]:
    """Return the argument as a tuple; it tunes kernels that do not exist here."""
    return tuple(tile_shape)


def check_kernel_schedule(kernel_schedule: str | KernelSchedule | None) -> KernelSchedule | None:
    """Return a kernel schedule by its name ("non", "coop" or "pp"), which tunes kernels that do not exist here."""
    names = dict(zip(("non", "coop", "pp"), KernelSchedule, strict=True))
    if kernel_schedule is None or isinstance(kernel_schedule, KernelSchedule):
        return kernel_schedule
    if kernel_schedule not in names:
        raise ValueError(f"kernel_schedule = {kernel_schedule!r} is unknown; use one of {', '.join(names)}.")
    return names[kernel_schedule]


# ---------------------------------------------------------------------------------------------------------------------
# Tensors
# ---------------------------------------------------------------------------------------------------------------------


def na_tensor_checks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    must_match_head_dims: bool = False,
    supports_gqa_mqa: bool = True,
    raise_error: bool = True,
    backend_name: str | None = None,
) -> bool:
    """Return whether query, key and value [B, *space, heads, head_dim] fit together.

    Raises:
        ValueError: naming the tensor that does not fit, if raise_error.
    """

    def check() -> None:
        checks.require_tensor("query", query)
        checks.check_attention(query.dim() - 3, query, key, value)
        _check_restrictions(query, key, value, must_match_head_dims, supports_gqa_mqa)

    return _passes(check, raise_error)


def fmha_tensor_checks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    must_match_head_dims: bool = False,
    supports_gqa_mqa: bool = True,
    raise_error: bool = True,
    backend_name: str | None = None,
) -> bool:
    """Return whether query [B, L, heads, head_dim], key and value [B, M, heads, head_dim] fit together.

    Raises:
        ValueError: naming the tensor that does not fit, if raise_error.
    """

    def check() -> None:
        checks.check_full_attention(query, key, value)
        _check_restrictions(query, key, value, must_match_head_dims, supports_gqa_mqa)

    return _passes(check, raise_error)


def additional_kv_tensor_checks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    add_key: Tensor | None = None,
    add_value: Tensor | None = None,
    must_match_head_dims: bool = False,
    supports_gqa_mqa: bool = True,
) -> None:
    """Raise ValueError if additional keys and values [B, N, heads, head_dim] do not fit to key and value."""
    checks.check_additional(add_key, add_value, key, value)
    _check_restrictions(query, key, value, must_match_head_dims, supports_gqa_mqa)


def _check_restrictions(
    query: Tensor, key: Tensor, value: Tensor, must_match_head_dims: bool, supports_gqa_mqa: bool
) -> None:
    if must_match_head_dims and value.shape[-1] != query.shape[-1]:
        raise ValueError(f"value has head_dim {value.shape[-1]}, but query has {query.shape[-1]}; they must be equal.")
    if not supports_gqa_mqa and key.shape[-2] != query.shape[-2]:
        raise ValueError(f"key has {key.shape[-2]} heads, but query has {query.shape[-2]}; they must be equal.")


def _passes(check: Callable[[], None], raise_error: bool) -> bool:
    try:
        check()
    except ValueError as error:
        if raise_error:
            raise
        logging.getLogger("natten").debug("%s", error)
        return False
    return True


def log_or_raise_error(msg: str, raise_error: bool = False, exception: type[Exception] = RuntimeError) -> None:
    """Raise an exception with a message, or log the message."""
    if raise_error:
        raise exception(msg)
    logging.getLogger("natten").debug("%s", msg)


def make_attn_tensor_from_input(input_tensor: Tensor, attention_dim: int) -> Tensor:
    """Return an empty tensor for the attention weights of a query [B, heads, *space, head_dim]."""
    return input_tensor.new_empty((*input_tensor.shape[:-1], attention_dim), requires_grad=input_tensor.requires_grad)


def check_additional_keys(input_tensor: Tensor, additional_keys: Tensor | None) -> int:
    """Return the number of additional keys [B, heads, N, head_dim] of an unfused call."""
    return checks.check_additional_tokens("additional_keys", additional_keys, "query", input_tensor)


def check_additional_values(
    attn_tensor: Tensor, additional_values: Tensor | None, value: Tensor, expected_attn_weights: int
) -> int:
    """Return the number of additional values [B, heads, N, head_dim] of an unfused call."""
    tokens = checks.check_additional_tokens("additional_values", additional_values, "value", value)
    if attn_tensor.shape[-1] != expected_attn_weights + tokens:
        raise ValueError(
            f"attn has {attn_tensor.shape[-1]} weights per query, but {expected_attn_weights} keys per window and "
            f"{tokens} additional values require {expected_attn_weights + tokens}."
        )
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Tuples, dtypes, devices, environment variables
# ---------------------------------------------------------------------------------------------------------------------


def ceil_div_int(x: int, y: int) -> int:
    """Return x / y, rounded up."""
    return -(-x // y)


def ceil_div_tuple(x: Sequence[int], y: Sequence[int]) -> tuple[int, ...]:
    """Return the quotients of two tuples, rounded up."""
    return tuple(map(ceil_div_int, x, y))


def mul_tuple(x: Sequence[int], y: Sequence[int]) -> tuple[int, ...]:
    """Return the products of two tuples."""
    return tuple(a * b for a, b in zip(x, y, strict=True))


def sub_tuple(x: Sequence[int], y: Sequence[int]) -> tuple[int, ...]:
    """Return the differences of two tuples."""
    return tuple(a - b for a, b in zip(x, y, strict=True))


def is_full(dtype: torch.dtype) -> bool:
    """Return whether a dtype is float32."""
    return dtype == torch.float32


def is_half(dtype: torch.dtype) -> bool:
    """Return whether a dtype is float16 or bfloat16."""
    return dtype in (torch.float16, torch.bfloat16)


def is_fp8(dtype: torch.dtype) -> bool:
    """Return whether a dtype is one of the float8 types that NATTEN's kernels take."""
    return dtype in (torch.float8_e5m2, torch.float8_e4m3fn)


def is_cuda(device: torch.device) -> bool:
    """Return whether a device is an NVIDIA GPU."""
    return device.type == "cuda" and torch.version.cuda is not None


def is_rocm(device: torch.device) -> bool:
    """Return whether a device is an AMD GPU."""
    return device.type == "cuda" and torch.version.hip is not None


def is_cpu(device: torch.device) -> bool:
    """Return whether a device is a CPU."""
    return device.type == "cpu"


def parse_env_flag(env_var: str, default: bool) -> bool:
    """Return whether an environment variable is 1; the default if it is neither 0 nor 1."""
    return {"0": False, "1": True}.get(os.environ.get(env_var, ""), default)


def parse_env_int(env_var: str, default: int) -> int:
    """Return an environment variable as a number; the default if it is none."""
    try:
        return int(os.environ.get(env_var, default))
    except ValueError:
        return default


def parse_env_str(env_var: str, default: str) -> str:
    """Return an environment variable, or the default."""
    return os.environ.get(env_var, default)


def is_torch_compiling() -> bool:
    """Return whether torch.compile traces the call."""
    return torch.compiler.is_compiling()


# ---------------------------------------------------------------------------------------------------------------------
# Logging
# ---------------------------------------------------------------------------------------------------------------------

log_format = "natten %(levelname)s: %(message)s"


class LogLevel(enum.Enum):
    """Levels of NATTEN's loggers; NATTEN_LOG_LEVEL sets the level here."""

    Default = 0
    Debug = 1
    Info = 2
    Warnings = 3
    Errors = 4
    Critical = 5


NattenLogger = logging.Logger


def get_logger(name: str) -> logging.Logger:
    """Return a logger; NATTEN's own wrote to the terminal, this one follows the configuration of `logging`."""
    return logging.getLogger(name)
