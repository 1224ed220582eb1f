"""In which dtype things are computed: autocast, and the accumulation of low precision."""

from __future__ import annotations

import torch
from torch import Tensor

from natten.backends.reference import is_autocast

_CAST = (torch.float32, torch.float16, torch.bfloat16)


def apply_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast the tensors in its dtype, as a matrix product would take them; float64 and integers stay.

    All but the first may be None.
    """
    device = tensors[0].device.type
    if not is_autocast(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x is not None and x.dtype in _CAST else x for x in tensors)
