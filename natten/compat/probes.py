"""Questions of older code about the machine and the kernels, with answers that are true here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from natten import backends

# Whether kernels for CUDA can be compiled: what code wants to know that asks for NATTEN's compiled library.
HAS_LIBNATTEN = torch.version.cuda is not None


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


def get_device_cc(device: Any = None) -> int:
    """Return the compute capability of a CUDA device, such as 90, or 0 without CUDA."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose_backend(query: Tensor, *args: Any, **kwargs: Any) -> str:
    """Return the name of the backend that runs a fused call with such a query."""
    return backends.choose(query, backends.requested(None)).NAME


def get_compatible_backends(query: Tensor, *args: Any, **kwargs: Any) -> list[str]:
    """Return the names of the backends that support a fused call with such a query, fastest first."""
    return [backend.NAME for backend in backends.LADDER if backend.unsupported_reason(query) is None]


def can_run(*args: Any, **kwargs: Any) -> bool:
    """Return False: the kernels of other NATTEN releases do not exist here."""
    return False


def get_configs(*args: Any, **kwargs: Any) -> list[tuple]:
    """Return an empty list: there are no kernels to tune."""
    return []


_KERNELS = [f"cutlass{family}_{kind}" for family in ("", "_hopper", "_blackwell") for kind in ("fna", "fmha")]
KERNEL_QUESTIONS: dict[str, Any] = {f"can_run_{kernel}": can_run for kernel in _KERNELS}
KERNEL_QUESTIONS["can_run_flex_attention"] = can_run
KERNEL_CONFIGS: dict[str, Any] = {
    f"get_{prefix}configs_for_{kernel}": get_configs for prefix in ("", "bwd_") for kernel in _KERNELS
}
KERNEL_CONFIGS |= {f"get_configs_for_flex_{kind}": get_configs for kind in ("fna", "fmha")}
