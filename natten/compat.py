"""Names, argument orders and switches of older NATTEN releases.

All names in `__all__` can be imported from natten, natten.functional and this module, the switches also from
natten.context. `import natten` installs them there (`install`).
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from natten import functional, ops
from natten.checks import IntOrTuple, check_heads
from natten.modules import NeighborhoodAttention1D, NeighborhoodAttention2D

log = logging.getLogger("natten")


# ---------------------------------------------------------------------------------------------------------------------
# Unfused attention
#
# Up to 0.14.4 the kernel size followed from the shape of the bias table or of the attention weights. The 3-D functions
# took separate arguments for the first axis. The number of arguments identifies the order.
# ---------------------------------------------------------------------------------------------------------------------


def natten1dqk(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na1d_qk` with (query, key, kernel_size, dilation)."""
    return _qk("natten1dqk", 1, None, args, kwargs)


def natten2dqk(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na2d_qk` with (query, key, kernel_size, dilation)."""
    return _qk("natten2dqk", 2, None, args, kwargs)


def natten3dqk(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na3d_qk` with (query, key, kernel_size, dilation).

    Also accepts (query, key, kernel_size_d, kernel_size, dilation_d, dilation).
    """
    return _qk("natten3dqk", 3, None, args, kwargs)


def natten1dqkrpb(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na1d_qk` with (query, key, rpb, kernel_size, dilation) or (query, key, rpb, dilation)."""
    return _qk("natten1dqkrpb", 1, "rpb", args, kwargs)


def natten2dqkrpb(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na2d_qk` with (query, key, rpb, kernel_size, dilation) or (query, key, rpb, dilation)."""
    return _qk("natten2dqkrpb", 2, "rpb", args, kwargs)


def natten3dqkrpb(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na3d_qk` with (query, key, rpb, kernel_size, dilation) or (query, key, rpb, dilation).

    Also accepts (query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation).
    """
    return _qk("natten3dqkrpb", 3, "rpb", args, kwargs)


def na1d_qk_with_bias(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na1d_qk` with (query, key, bias, kernel_size, dilation) or (query, key, bias, dilation)."""
    return _qk("na1d_qk_with_bias", 1, "bias", args, kwargs)


def na2d_qk_with_bias(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na2d_qk` with (query, key, bias, kernel_size, dilation) or (query, key, bias, dilation)."""
    return _qk("na2d_qk_with_bias", 2, "bias", args, kwargs)


def na3d_qk_with_bias(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na3d_qk` with (query, key, bias, kernel_size, dilation) or (query, key, bias, dilation).

    Also accepts (query, key, bias, kernel_size_d, kernel_size, dilation_d, dilation).
    """
    return _qk("na3d_qk_with_bias", 3, "bias", args, kwargs)


def natten1dav(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na1d_av` with (attn, value, kernel_size, dilation) or (attn, value, dilation)."""
    return _av("natten1dav", 1, args, kwargs)


def natten2dav(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na2d_av` with (attn, value, kernel_size, dilation) or (attn, value, dilation)."""
    return _av("natten2dav", 2, args, kwargs)


def natten3dav(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na3d_av` with (attn, value, kernel_size, dilation) or (attn, value, dilation).

    Also accepts (attn, value, kernel_size_d, kernel_size, dilation_d, dilation).
    """
    return _av("natten3dav", 3, args, kwargs)


_NEW_QK = {1: functional.na1d_qk, 2: functional.na2d_qk, 3: functional.na3d_qk}
_NEW_AV = {1: functional.na1d_av, 2: functional.na2d_av, 3: functional.na3d_av}


def _qk(name: str, rank: int, bias: str | None, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Compute logits; `bias` is the name of the function's bias argument, None if it has none."""
    tensors = ("query", "key") if bias is None else ("query", "key", bias)
    given = _sort_arguments(name, _orders(rank, tensors, infers_kernel_size=bias is not None), args, kwargs)
    rpb = None if bias is None else given[bias]
    if "kernel_size" not in given:
        given["kernel_size"] = _kernel_size_of_rpb(rpb, rank)
    if name.startswith("natten"):  # up to 0.14, autocast applied
        given["query"], given["key"] = ops.apply_autocast(given["query"], given["key"])
    return _NEW_QK[rank](given["query"], given["key"], given["kernel_size"], given["dilation"], rpb=rpb)


def _av(name: str, rank: int, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    given = _sort_arguments(name, _orders(rank, ("attn", "value"), infers_kernel_size=True), args, kwargs)
    if "kernel_size" not in given:
        given["kernel_size"] = _kernel_size_of_attn(given["attn"], rank)
    given["attn"], given["value"] = ops.apply_autocast(given["attn"], given["value"])  # as up to 0.14
    return _NEW_AV[rank](**given)


def _orders(rank: int, tensors: tuple[str, ...], infers_kernel_size: bool) -> list[tuple[str, ...]]:
    """Return the supported argument orders, each with a different length."""
    orders = [(*tensors, "kernel_size", "dilation")]
    if infers_kernel_size:
        orders.append((*tensors, "dilation"))
    if rank == 3:
        orders.append((*tensors, "kernel_size_d", "kernel_size", "dilation_d", "dilation"))
    return orders


def _sort_arguments(name: str, orders: Sequence[Sequence[str]], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by name, with kernel_size_d and dilation_d merged into kernel_size and dilation.

    Raises:
        TypeError: if the arguments do not follow any of the orders.
    """
    for order in orders:
        if len(order) == len(args) + len(kwargs) and set(order[len(args) :]) == set(kwargs):
            break
    else:
        given = ", ".join(["..."] * len(args) + [f"{key}=..." for key in kwargs])
        expected = " or ".join(f"{name}({', '.join(order)})" for order in orders)
        raise TypeError(f"{name}({given}) is not supported; call {expected}.")
    arguments = dict(zip(order[: len(args)], args, strict=True)) | kwargs
    for argument in ("kernel_size", "dilation"):
        if f"{argument}_d" in arguments:
            arguments[argument] = (arguments.pop(f"{argument}_d"), arguments[argument], arguments[argument])
    return arguments


def _kernel_size_of_rpb(rpb: Any, rank: int) -> IntOrTuple:
    if not isinstance(rpb, Tensor) or rpb.dim() != rank + 1:
        found = f"has shape {tuple(rpb.shape)}" if isinstance(rpb, Tensor) else f"is {rpb!r}"
        raise ValueError(
            f"kernel_size is missing and cannot be inferred: the bias table {found} instead of "
            f"[heads{', 2K-1' * rank}]; give kernel_size before dilation."
        )
    return tuple((size + 1) // 2 for size in rpb.shape[1:])


def _kernel_size_of_attn(attn: Tensor, rank: int) -> int:
    weights = attn.shape[-1]
    kernel_size = round(weights ** (1 / rank))
    if kernel_size**rank != weights:
        raise ValueError(
            f"kernel_size is missing and cannot be inferred: attn has {weights} weights per query, which is not a "
            f"window with {rank} equal sides; give kernel_size before dilation."
        )
    return kernel_size


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------

NeighborhoodAttention = NeighborhoodAttention2D  # the name up to 0.12


class LegacyNeighborhoodAttention1D(NeighborhoodAttention1D):
    """Neighborhood attention over one axis on the reference backend: [B, L, dim] -> [B, L, dim].

    Args:
        dim: number of channels, a multiple of num_heads.
        kernel_size: window size in tokens, at least 2. Note that it comes before num_heads.
        num_heads: number of attention heads.
        mode: 0 or 1; ignored.
        qkv_bias, qk_scale, attn_drop, proj_drop, **options: see `NeighborhoodAttention2D`.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: IntOrTuple,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        mode: int = 1,
        **options: Any,
    ):
        _check_legacy(dim, num_heads, mode)
        drop = {"attn_drop": attn_drop, "proj_drop": proj_drop}
        options |= {"qkv_bias": qkv_bias, "qk_scale": qk_scale, "backend": "reference", **drop}
        super().__init__(dim, num_heads, kernel_size, **options)


class LegacyNeighborhoodAttention2D(NeighborhoodAttention2D):
    """Neighborhood attention over two axes on the reference backend: [B, H, W, dim] -> [B, H, W, dim].

    Args:
        dim: number of channels, a multiple of num_heads.
        kernel_size: window size in tokens, at least 2. Note that it comes before num_heads.
        num_heads: number of attention heads.
        mode: 0 or 1; ignored.
        qkv_bias, qk_scale, attn_drop, proj_drop, **options: see `NeighborhoodAttention2D`.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: IntOrTuple,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        mode: int = 1,
        **options: Any,
    ):
        _check_legacy(dim, num_heads, mode)
        drop = {"attn_drop": attn_drop, "proj_drop": proj_drop}
        options |= {"qkv_bias": qkv_bias, "qk_scale": qk_scale, "backend": "reference", **drop}
        super().__init__(dim, num_heads, kernel_size, **options)


def _check_legacy(dim: int, num_heads: int, mode: int) -> None:
    check_heads(dim, num_heads, "(dim, kernel_size, num_heads)")
    if mode not in (0, 1):
        raise ValueError(f"mode = {mode!r} must be 0 or 1.")


# ---------------------------------------------------------------------------------------------------------------------
# Switches that have an effect, and getters that report real facts
# ---------------------------------------------------------------------------------------------------------------------

HAS_LIBNATTEN = False  # NATTEN's own compiled library


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Switch PyTorch's deterministic algorithms, which natten also follows. Operators without one warn.

    To make them raise an error instead, call torch.use_deterministic_algorithms.
    """
    if mode != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(mode, warn_only=True)


def are_deterministic_algorithms_enabled() -> bool:
    """Return whether PyTorch's deterministic algorithms are enabled."""
    return torch.are_deterministic_algorithms_enabled()


def has_cuda(device_index: Any = None) -> bool:
    """Return whether a CUDA device is available, on which natten supports all floating-point dtypes."""
    return torch.cuda.is_available()


def has_fused_na(device_index: Any = None) -> bool:
    """Return True: fused attention works on all devices."""
    return True


def has_gemm(device_index: Any = None) -> bool:
    """Return False: NATTEN's GEMM kernels, which `use_gemm_na` selected, do not exist here."""
    return False


has_half = has_bfloat = has_cuda
has_fna = has_fused_na
has_tf32_gemm = has_fp32_gemm = has_fp64_gemm = has_gemm


# ---------------------------------------------------------------------------------------------------------------------
# Switches without effect
#
# In NATTEN 0.15 to 0.21 they selected among kernels and tuners that do not exist here. They change no result. A switch
# only stores settings, which its getters return. The defaults are those of the last release that had the setting.
# ---------------------------------------------------------------------------------------------------------------------


class MemoryUsagePreference(Enum):
    """The values of `get_memory_usage_preference`."""

    Default = "default"
    Strict = "strict"
    Unrestricted = "unrestricted"


_DEFAULTS: dict[str, Any] = {
    "autotuner_backward": False,
    "autotuner_forward": False,
    "autotuner_thorough_backward": False,
    "autotuner_thorough_forward": False,
    "flex_compile": False,
    "flex_compile_backprop": False,
    "force_flex": False,
    "fused_na": False,
    "gemm_na": True,
    "kv_parallelism": True,
    "memory": MemoryUsagePreference.Default,
    "tf32": True,
    "tiled_na": True,
    "use_flex": False,
}
_settings = dict(_DEFAULTS)
_without_effect: list[str] = []  # the names of all switches and getters below


class NattenContext:
    """The class that held the settings in NATTEN 0.15 to 0.17. Only `reset` is supported."""

    @staticmethod
    def reset() -> None:
        """Reset all switches without effect to their defaults."""
        _settings.update(_DEFAULTS)


AutotunerContext = NattenContext


def _fused_na(
    mode: bool = True, kv_parallel: bool = True, use_flex_attention: bool = False, force_flex_attention: bool = False
) -> dict[str, Any]:
    return {
        "fused_na": mode,
        "kv_parallelism": mode and kv_parallel,
        "use_flex": mode and use_flex_attention,
        "force_flex": mode and force_flex_attention,
    }


def _autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> dict[str, Any]:
    given = {
        "autotuner_forward": forward_pass,
        "autotuner_backward": backward_pass,
        "autotuner_thorough_forward": thorough_mode_forward,
        "autotuner_thorough_backward": thorough_mode_backward,
    }
    return {name: value for name, value in given.items() if value is not None}


def _memory_usage(pref: str = "default") -> dict[str, Any]:
    names = [preference.value for preference in MemoryUsagePreference]
    if pref not in names:
        raise ValueError(f"pref = {pref!r} is unknown; use one of {', '.join(map(repr, names))}.")
    return {"memory": MemoryUsagePreference(pref)}


def _flex_compile(mode: bool = True, backprop: bool = False) -> dict[str, Any]:
    return {"flex_compile": mode, "flex_compile_backprop": mode and backprop}


def _switch(name: str, settings: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Return a switch with the signature of `settings`, which returns the settings that it changes."""

    @functools.wraps(settings)
    def switch(*args: Any, **kwargs: Any) -> None:
        _settings.update(settings(*args, **kwargs))
        log.debug("%s has no effect; it is a switch of an older NATTEN release", name)

    switch.__name__ = switch.__qualname__ = name
    switch.__doc__ = "Switch of an older NATTEN release; changes no result."
    _without_effect.append(name)
    return switch


def _getter(name: str, setting: str, value: Any = None) -> Callable[[], Any]:
    """Return a function that returns a setting or, if a value is given, whether the setting has this value."""

    def getter() -> Any:
        return _settings[setting] if value is None else _settings[setting] == value

    getter.__name__ = getter.__qualname__ = name
    getter.__doc__ = "Return the last value of a switch that changes no result."
    _without_effect.append(name)
    return getter


allow_flex_compile = _switch("allow_flex_compile", _flex_compile)
allow_flex_compile_backprop = _switch("allow_flex_compile_backprop", lambda mode=True: {"flex_compile_backprop": mode})
disable_autotuner = _switch("disable_autotuner", lambda: _autotuner(False, False, False, False))
disable_flex_compile = _switch("disable_flex_compile", lambda: _flex_compile(False))
disable_flex_compile_backprop = _switch("disable_flex_compile_backprop", lambda: {"flex_compile_backprop": False})
disable_gemm_na = _switch("disable_gemm_na", lambda: {"gemm_na": False})
disable_tf32 = _switch("disable_tf32", lambda: {"tf32": False})
disable_tiled_na = _switch("disable_tiled_na", lambda: {"tiled_na": False})
enable_gemm_na = _switch("enable_gemm_na", lambda: {"gemm_na": True})
enable_tf32 = _switch("enable_tf32", lambda: {"tf32": True})
enable_tiled_na = _switch("enable_tiled_na", lambda: {"tiled_na": True})
force_flex_attention = _switch("force_flex_attention", lambda: _fused_na(True, True, True, True))
set_memory_usage_preference = _switch("set_memory_usage_preference", _memory_usage)
use_autotuner = _switch("use_autotuner", _autotuner)
use_flex_attention = _switch("use_flex_attention", lambda: _fused_na(True, True, True))
use_fna = _switch("use_fna", _fused_na)
use_fused_na = _switch("use_fused_na", _fused_na)
use_gemm_na = _switch("use_gemm_na", lambda mode=True: {"gemm_na": mode})
use_kv_parallelism_in_fused_na = _switch("use_kv_parallelism_in_fused_na", lambda mode=True: {"kv_parallelism": mode})
use_tf32_in_gemm_na = _switch("use_tf32_in_gemm_na", lambda mode=True: {"tf32": mode})
use_tiled_na = _switch("use_tiled_na", lambda mode=True: {"tiled_na": mode})

get_memory_usage_preference = _getter("get_memory_usage_preference", "memory")
is_autotuner_enabled_for_backward = _getter("is_autotuner_enabled_for_backward", "autotuner_backward")
is_autotuner_enabled_for_forward = _getter("is_autotuner_enabled_for_forward", "autotuner_forward")
is_autotuner_thorough_for_backward = _getter("is_autotuner_thorough_for_backward", "autotuner_thorough_backward")
is_autotuner_thorough_for_forward = _getter("is_autotuner_thorough_for_forward", "autotuner_thorough_forward")
is_flex_compile_allowed = _getter("is_flex_compile_allowed", "flex_compile")
is_flex_compile_backprop_allowed = _getter("is_flex_compile_backprop_allowed", "flex_compile_backprop")
is_fna_enabled = _getter("is_fna_enabled", "fused_na")
is_fused_na_enabled = _getter("is_fused_na_enabled", "fused_na")
is_gemm_na_enabled = _getter("is_gemm_na_enabled", "gemm_na")
is_kv_parallelism_in_fused_na_enabled = _getter("is_kv_parallelism_in_fused_na_enabled", "kv_parallelism")
is_memory_usage_default = _getter("is_memory_usage_default", "memory", MemoryUsagePreference.Default)
is_memory_usage_strict = _getter("is_memory_usage_strict", "memory", MemoryUsagePreference.Strict)
is_memory_usage_unrestricted = _getter("is_memory_usage_unrestricted", "memory", MemoryUsagePreference.Unrestricted)
is_tf32_in_gemm_na_enabled = _getter("is_tf32_in_gemm_na_enabled", "tf32")
is_tiled_na_enabled = _getter("is_tiled_na_enabled", "tiled_na")
should_force_flex_attention = _getter("should_force_flex_attention", "force_flex")
should_use_flex_attention = _getter("should_use_flex_attention", "use_flex")


def is_autotuner_enabled() -> bool:
    """Return the last value of a switch that changes no result."""
    return _settings["autotuner_forward"] or _settings["autotuner_backward"]


# ---------------------------------------------------------------------------------------------------------------------
# Where older code imports these names from
# ---------------------------------------------------------------------------------------------------------------------

SWITCHES = (
    "AutotunerContext",
    "MemoryUsagePreference",
    "NattenContext",
    "are_deterministic_algorithms_enabled",
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_fused_na",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
    "is_autotuner_enabled",
    "use_deterministic_algorithms",
    *_without_effect,
)

__all__ = [
    "HAS_LIBNATTEN",
    "LegacyNeighborhoodAttention1D",
    "LegacyNeighborhoodAttention2D",
    "NeighborhoodAttention",
    "na1d_qk_with_bias",
    "na2d_qk_with_bias",
    "na3d_qk_with_bias",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
    *SWITCHES,
]


def install(natten: Any) -> None:
    """Add the older names to natten and natten.functional, and create the module natten.version.

    Args:
        natten: the module natten.
    """
    for name in __all__:
        value = globals()[name]
        setattr(natten, name, value)
        setattr(functional, name, value)
    version: Any = ModuleType("natten.version", "The version of natten; use natten.__version__.")
    version.__version__ = natten.__version__
    natten.version = sys.modules["natten.version"] = version
