"""Time and memory of the layer on a GPU, beside timm's WindowAttention of equal width."""

from __future__ import annotations

import torch
from benchmarks import layers as benched
from benchmarks import ops
from torch import Tensor

from .check import Check


def layers(check: Check) -> None:
    batch = 1 if check.rehearse else 128
    for side, heads in ((14, 2),) if check.rehearse else ((56, 2), (28, 4), (14, 8), (7, 16)):
        name = f"b{batch}_{side}x{side}_h{heads}_d32_k7"
        case, results = ops.parse(name), {}
        for what, make in (
            ("natten", lambda case=case: benched.make_natten(case, check.backend)),
            ("window", lambda case=case: benched.make_swin(case, False)),
            ("shifted", lambda case=case: benched.make_swin(case, True)),
        ):
            if what == "shifted" and side == 7:
                continue
            with check.guarded("layer", f"{name} {what}"):
                if check.has_time("layer", f"{name} {what}"):
                    results[what] = _time_layer(check, case, *make())
        if "natten" not in results:
            continue
        ours, our_peak = results["natten"]
        for what, (ms, peak) in results.items():
            ratio = f", {ms / ours:.2f} x natten's time, natten's peak {our_peak / max(peak, 1e-9):.2f} x this"
            text = f"{ms:.3f} ms, peak {peak:.0f} MB" + (ratio if what != "natten" else "")
            check.row("layer", f"{side}x{side} forward+backward {what}", text)


def _time_layer(check: Check, case, module, layer) -> tuple[float, float]:
    """Milliseconds of forward and backward, and peak memory in MB beyond what was there before."""
    dtype = torch.float32 if check.rehearse else torch.bfloat16
    parameters = list(module.to(check.device, dtype).parameters())
    inputs = []
    for _ in range(3):
        x = torch.randn(case.batch, *case.space, case.heads * case.head_dim, device=check.device).to(dtype)
        inputs.append(x.requires_grad_())
    grad = torch.randn_like(inputs[0])

    def step(x: Tensor) -> None:
        torch.autograd.grad(layer(x), [x, *parameters], grad)

    ms = check.milliseconds([lambda x=x: step(x) for x in inputs])
    if check.rehearse:
        return ms, 1.0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(inputs[0])
    torch.cuda.synchronize()
    return ms, (torch.cuda.max_memory_allocated() - before) / 1e6
