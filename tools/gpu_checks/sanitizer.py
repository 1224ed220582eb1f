"""Small calls of every kind of kernel, for compute-sanitizer to watch."""

from __future__ import annotations

import torch

import natten

from .check import PRECISIONS, Check, float32_products, kernel_size_of, make_inputs, run_step


def sanitizer(check: Check) -> None:
    for precision in ("bfloat16", "float32", "tf32"):
        dtype = torch.float32 if check.rehearse else PRECISIONS[precision][0]
        for space, dim, window in (
            ((11, 13), 32, (5, 1, (1, 2), False)),
            ((9, 17), 24, ((3, 4), 2, 1, (True, False))),
            ((100,), 16, (70,)),
            ((4, 5, 9), 16, (3,)),
            ((5, 20, 20), 32, (5,)),
        ):
            qkv, rpb = make_inputs(check, 1, space, 2, dim, kernel_size_of(len(space), window), dtype)
            with float32_products(PRECISIONS[precision][2]):
                run_step(check, qkv, rpb, check.backend, *window)
    q, k, v = (torch.randn(1, 2, 9, 11, 8, device=check.device, requires_grad=True) for _ in range(3))
    rpb = torch.randn(2, 5, 5, device=check.device, requires_grad=True)
    attn = natten.na2d_qk(q, k, 3, 2, rpb=rpb, backend=check.backend).softmax(-1)
    natten.na2d_av(attn, v, 3, 2, backend=check.backend).sum().backward()
    check.synchronize()
