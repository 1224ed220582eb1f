"""Relative position bias of another window."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def resize_rpb(rpb: Tensor, size: tuple[int, int]) -> Tensor:
    """A bias table [heads, 2K-1, 2K-1] stretched to `size` by bicubic interpolation, in its dtype.

    So the published 11x11 weights were made of 7x7 ones, and so Swin's tables are resized (arXiv:2103.14030).
    """
    if rpb.shape[1:] == size:
        return rpb
    return F.interpolate(rpb[None].float(), size=size, mode="bicubic", align_corners=False)[0].to(rpb.dtype)
