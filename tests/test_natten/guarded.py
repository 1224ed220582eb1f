"""Tensors next to memory that nobody may read, for programs that find reads beyond a tensor by crashing."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

_libc, _page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
_areas: list[mmap.mmap] = []  # live as long as the process


def guarded(shape: tuple[int, ...], at_end: bool) -> Tensor:
    """Return a random bfloat16 tensor that ends directly before an unreadable page, or begins directly after one."""
    size = 2 * torch.Size(shape).numel()
    area = mmap.mmap(-1, -(-size // _page) * _page + 2 * _page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    end = start + len(area)
    for edge in (start, end - _page):
        if _libc.mprotect(ctypes.c_void_p(edge), ctypes.c_size_t(_page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect failed")
    first = end - _page - size if at_end else start + _page
    x = torch.frombuffer((ctypes.c_char * size).from_address(first), dtype=torch.bfloat16).view(shape)
    _areas.append(area)
    return x.copy_(torch.randn(shape))
