"""Switches of NATTEN 0.15 to 0.21.

Most of them selected among kernels and tuners that do not exist here. They change no result: a switch only stores
settings, which its getters return. The defaults are those of the last release that had the setting.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch

log = logging.getLogger("natten")


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Switch PyTorch's deterministic algorithms, which natten also follows. Operators without one warn.

    To make them raise an error instead, call torch.use_deterministic_algorithms.
    """
    if mode != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(mode, warn_only=True)


def are_deterministic_algorithms_enabled() -> bool:
    """Return whether PyTorch's deterministic algorithms are enabled."""
    return torch.are_deterministic_algorithms_enabled()


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
WITHOUT_EFFECT: list[str] = []  # the names of the switches and getters below, except is_autotuner_enabled


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
    WITHOUT_EFFECT.append(name)
    return switch


def _getter(name: str, setting: str, value: Any = None) -> Callable[[], Any]:
    """Return a function that returns a setting or, if a value is given, whether the setting has this value."""

    def getter() -> Any:
        return _settings[setting] if value is None else _settings[setting] == value

    getter.__name__ = getter.__qualname__ = name
    getter.__doc__ = "Return the last value of a switch that changes no result."
    WITHOUT_EFFECT.append(name)
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
