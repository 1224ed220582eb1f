"""In which dtype things are computed: autocast, and the accumulation of low precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_CAST = (torch.float32, torch.float16, torch.bfloat16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, in which half precision is accumulated; float64 for itself."""
    return torch.promote_types(dtype, torch.float32)


def apply_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast the tensors in its dtype, as a matrix product would take them; float64 and integers stay.

    All but the first may be None.
    """
    device = tensors[0].device.type
    if not _is_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x is not None and x.dtype in _CAST else x for x in tensors)


def may_round_float32() -> bool:
    """Whether PyTorch may compute products of float32 matrices on GPUs in TF32, with 10 bits of fraction."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def no_autocast(x: Tensor) -> AbstractContextManager:
    """Keeps matrix products in their own dtype; does nothing where not needed, so that exported graphs stay flat."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if _is_autocast(device) else nullcontext()


def _is_autocast(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # torch refuses the question for meta
