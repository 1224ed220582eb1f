"""The switches of NATTEN 0.15 to 0.21, for code written for those releases.

- `use_deterministic_algorithms` switches PyTorch's own determinism, which natten obeys.
- The questions `has_*` are answered for this release.
- The rest chose among kernels and tuners that this release does not have. They are without effect on any result: what
  one sets, the questions beside it answer; before that, what they answered in the last release that had them.
  `NATTEN_LOG_LEVEL=DEBUG` tells of each use.
- Arguments that tuned those kernels are taken too: each is told of once.

Here, as in natten and natten.functional, all switches can be imported.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

import torch

log = logging.getLogger("natten")


class MemoryUsagePreference(Enum):
    """What `get_memory_usage_preference` answers."""

    Default = "default"
    Strict = "strict"
    Unrestricted = "unrestricted"


# ---------------------------------------------------------------------------------------------------------------------
# Without effect
# ---------------------------------------------------------------------------------------------------------------------

# Each question that a switch decides, and its answer at the start.
_AT_START = {
    "get_memory_usage_preference": MemoryUsagePreference.Default,
    "is_autotuner_enabled_for_backward": False,
    "is_autotuner_enabled_for_forward": False,
    "is_autotuner_thorough_for_backward": False,
    "is_autotuner_thorough_for_forward": False,
    "is_flex_compile_allowed": False,
    "is_flex_compile_backprop_allowed": False,
    "is_fused_na_enabled": False,
    "is_gemm_na_enabled": True,
    "is_kv_parallelism_in_fused_na_enabled": True,
    "is_tf32_in_gemm_na_enabled": True,
    "is_tiled_na_enabled": True,
    "should_force_flex_attention": False,
    "should_use_flex_attention": False,
}

_answers = dict(_AT_START)


def _fused_na(mode=True, kv_parallel=True, use_flex_attention=False, force_flex_attention=False):
    return {
        "is_fused_na_enabled": mode,
        "is_kv_parallelism_in_fused_na_enabled": mode and kv_parallel,
        "should_use_flex_attention": mode and use_flex_attention,
        "should_force_flex_attention": mode and force_flex_attention,
    }


def _autotuner(
    forward_pass=None,
    backward_pass=None,
    thorough_mode_forward=None,
    thorough_mode_backward=None,
    warmup_steps_forward=None,
    warmup_steps_backward=None,
    steps_forward=None,
    steps_backward=None,
):
    given = {
        "is_autotuner_enabled_for_forward": forward_pass,
        "is_autotuner_enabled_for_backward": backward_pass,
        "is_autotuner_thorough_for_forward": thorough_mode_forward,
        "is_autotuner_thorough_for_backward": thorough_mode_backward,
    }
    return {question: answer for question, answer in given.items() if answer is not None}


def _memory_usage(pref="default"):
    names = [preference.value for preference in MemoryUsagePreference]
    if pref not in names:
        raise ValueError(f"pref is {pref!r}, but must be one of {', '.join(map(repr, names))}.")
    return {"get_memory_usage_preference": MemoryUsagePreference(pref)}


def _flex_compile(mode=True, backprop=False):
    return {"is_flex_compile_allowed": mode, "is_flex_compile_backprop_allowed": mode and backprop}


# Each switch: from its arguments, which are those of the older releases, the answers that it decides.
_SWITCHES: dict[str, Callable[..., dict[str, Any]]] = {
    "allow_flex_compile": _flex_compile,
    "allow_flex_compile_backprop": lambda mode=True: {"is_flex_compile_backprop_allowed": mode},
    "disable_autotuner": lambda: _autotuner(False, False, False, False),
    "disable_flex_compile": lambda: _flex_compile(False),
    "disable_flex_compile_backprop": lambda: {"is_flex_compile_backprop_allowed": False},
    "disable_gemm_na": lambda: {"is_gemm_na_enabled": False},
    "disable_tf32": lambda: {"is_tf32_in_gemm_na_enabled": False},
    "disable_tiled_na": lambda: {"is_tiled_na_enabled": False},
    "enable_gemm_na": lambda: {"is_gemm_na_enabled": True},
    "enable_tf32": lambda: {"is_tf32_in_gemm_na_enabled": True},
    "enable_tiled_na": lambda: {"is_tiled_na_enabled": True},
    "force_flex_attention": lambda: _fused_na(use_flex_attention=True, force_flex_attention=True),
    "set_memory_usage_preference": _memory_usage,
    "use_autotuner": _autotuner,
    "use_flex_attention": lambda: _fused_na(use_flex_attention=True),
    "use_fna": _fused_na,
    "use_fused_na": _fused_na,
    "use_gemm_na": lambda mode=True: {"is_gemm_na_enabled": mode},
    "use_kv_parallelism_in_fused_na": lambda mode=True: {"is_kv_parallelism_in_fused_na_enabled": mode},
    "use_tf32_in_gemm_na": lambda mode=True: {"is_tf32_in_gemm_na_enabled": mode},
    "use_tiled_na": lambda mode=True: {"is_tiled_na_enabled": mode},
}

# Questions whose answer follows from others'.
_DERIVED: dict[str, Callable[[], bool]] = {
    "is_autotuner_enabled": lambda: (
        _answers["is_autotuner_enabled_for_forward"] or _answers["is_autotuner_enabled_for_backward"]
    ),
    "is_fna_enabled": lambda: _answers["is_fused_na_enabled"],
    "is_memory_usage_default": lambda: _answers["get_memory_usage_preference"] is MemoryUsagePreference.Default,
    "is_memory_usage_strict": lambda: _answers["get_memory_usage_preference"] is MemoryUsagePreference.Strict,
    "is_memory_usage_unrestricted": lambda: (
        _answers["get_memory_usage_preference"] is MemoryUsagePreference.Unrestricted
    ),
}


def _make_switch(name: str, decide: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    @functools.wraps(decide)  # for its signature
    def switch(*args, **kwargs) -> None:
        decided = decide(*args, **kwargs)
        _answers.update(decided)
        log.debug("%s is of an older NATTEN and without effect here", name)

    return _publish(
        switch,
        name,
        "A switch of older releases. It changes no result; the question that belongs to it answers what was set.",
    )


def _make_question(name: str, answer: Callable[[], Any]) -> Callable[[], Any]:
    def question():
        return answer()

    return _publish(
        question, name, "What the switch that belongs to this question was last set to; no result depends on it."
    )


def _publish(function: Callable, name: str, doc: str) -> Callable:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return function


globals().update({name: _make_switch(name, decide) for name, decide in _SWITCHES.items()})
globals().update({name: _make_question(name, functools.partial(_answers.__getitem__, name)) for name in _AT_START})
globals().update({name: _make_question(name, answer) for name, answer in _DERIVED.items()})


class NattenContext:
    """By this name older code puts its switches back."""

    @staticmethod
    def reset() -> None:
        """All questions that a switch decides are answered as at the start again."""
        _answers.update(_AT_START)


AutotunerContext = NattenContext


# ---------------------------------------------------------------------------------------------------------------------
# Without effect, as arguments
# ---------------------------------------------------------------------------------------------------------------------

# Of na1d, na2d and na3d from 0.17.4 on: they choose tiles, schedules and compilation of kernels that are not here.
TUNING = frozenset(
    (
        "attention_kwargs",
        "backward_kv_splits",
        "backward_kv_tile_shape",
        "backward_q_tile_shape",
        "backward_use_pt_reduction",
        "kernel_schedule",
        "kv_tile_shape",
        "q_tile_shape",
        "run_persistent_kernel",
        "torch_compile",
        "xformers_kwargs",
    )
)


def ignore_tuning(function: str, given: Iterable[str]) -> None:
    """Lets the arguments of `TUNING` pass, and says once of each that it is without effect.

    Raises:
        TypeError: for any other, as Python does of an argument that a function does not have.
    """
    for name in given:
        if name not in TUNING:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
        _tell_once(f"{name}, by which other releases tune their kernels,")


def _tell_once(what: str) -> None:
    if not torch.compiler.is_compiling():  # which traces no warning
        _tell(what)


@functools.cache
def _tell(what: str) -> None:
    warnings.warn(f"{what} is without effect here: natten chooses by itself.", UserWarning, stacklevel=2)


# ---------------------------------------------------------------------------------------------------------------------
# With a meaning in this release
# ---------------------------------------------------------------------------------------------------------------------


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Switches PyTorch's determinism, which natten obeys, on or off; where other operators cannot, PyTorch warns.

    To have them raise, call torch.use_deterministic_algorithms yourself.
    """
    if mode != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(mode, warn_only=True)


def are_deterministic_algorithms_enabled() -> bool:
    """Whether PyTorch's determinism is on."""
    return torch.are_deterministic_algorithms_enabled()


def has_cuda(device_index: Any = None) -> bool:
    """Whether there is a CUDA device, where the operator takes every floating dtype."""
    return torch.cuda.is_available()


def has_fused_na(device_index: Any = None) -> bool:
    """Whether na1d, na2d and na3d can be called: on every device they can."""
    return True


def has_gemm(device_index: Any = None) -> bool:
    """Whether there are NATTEN's kernels out of matrix products, which `use_gemm_na` chose: there are none."""
    return False


has_half = has_bfloat = has_cuda
has_fna = has_fused_na
has_tf32_gemm = has_fp32_gemm = has_fp64_gemm = has_gemm

__all__ = [
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
    "use_deterministic_algorithms",
    *_SWITCHES,
    *_AT_START,
    *_DERIVED,
]
