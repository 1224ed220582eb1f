"""natten.utils.testing: decorators that skip tests for what a machine lacks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from natten.compat.helpers import parse_env_flag
from natten.compat.probes import HAS_LIBNATTEN, get_device_cc


def _skip_unless(name: str, is_supported: Callable[[], bool], reason: str) -> Callable[[], Callable]:
    """Return a function that returns a decorator for test methods."""

    def skip_if() -> Callable:
        def decorator(test: Callable) -> Callable:
            @functools.wraps(test)
            def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
                if not is_supported():
                    self.skipTest(reason)
                return test(self, *args, **kwargs)

            return wrapper

        return decorator

    skip_if.__name__ = skip_if.__qualname__ = name
    skip_if.__doc__ = f"Return a decorator that skips a test: {reason}."
    return skip_if


def _never() -> bool:
    return False


def _always() -> bool:
    return True


def _runs_extended_tests() -> bool:
    return parse_env_flag("NATTEN_RUN_EXTENDED_TESTS", False)


_CONDITIONS: dict[str, tuple[Callable[[], bool], str]] = {
    "blackwell_kernels_not_supported": (_never, "NATTEN's kernels for Blackwell GPUs do not exist here"),
    "cuda_is_not_supported": (torch.cuda.is_available, "no CUDA device is available"),
    "experimental_ops_are_not_supported": (_always, "natten.experimental is supported"),
    "flex_compile_is_not_supported": (_never, "flex_attention is not used here"),
    "flex_is_not_supported": (_never, "flex_attention is not used here"),
    "fna_is_not_supported": (_always, "fused attention is supported"),
    "fvcore_is_not_available": (lambda: find_spec("fvcore") is not None, "fvcore is not installed"),
    "gemm_does_not_support_double_precision": (_never, "NATTEN's GEMM kernels do not exist here"),
    "gemm_is_not_supported": (_never, "NATTEN's GEMM kernels do not exist here"),
    "hopper_kernels_not_supported": (_never, "NATTEN's kernels for Hopper GPUs do not exist here"),
    "libnatten_is_not_supported": (lambda: HAS_LIBNATTEN and torch.cuda.is_available(), "no CUDA device is available"),
    "nested_is_not_supported": (_never, "nested tensors are not supported"),
    "not_running_extended_tests": (_runs_extended_tests, "NATTEN_RUN_EXTENDED_TESTS is not set"),
    "torch_compile_is_not_supported": (_always, "torch.compile is supported"),
    "torch_flop_count_is_not_supported": (_always, "torch.utils.flop_counter is supported"),
    "triton_is_not_supported": (lambda: get_device_cc() >= 70, "no device supports Triton"),
}
SKIPS = {f"skip_if_{name}": _skip_unless(f"skip_if_{name}", *how) for name, how in _CONDITIONS.items()}


def supports_float16(device: torch.device) -> bool:
    """Return True: float16 is supported on every device."""
    return True


def supports_bfloat16(device: torch.device) -> bool:
    """Return True: bfloat16 is supported on every device."""
    return True


def fna_supports_additional_kv(*args: Any, **kwargs: Any) -> bool:
    """Return True: fused attention takes additional keys and values."""
    return True
