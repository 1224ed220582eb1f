"""A fixed set of measurements for a GPU that takes about 6 minutes: operator, layer, and nat_tiny against swin_tiny."""

from __future__ import annotations

import os
import tempfile
import time
from unittest import mock

import torch

import natten
from benchmarks import layers, models, ops
from benchmarks.entry import Entry, Setting
from natten.backends.cuda import driver

OURS = {"natten-cpu", "natten-cuda", "nat_tiny"}  # providers that must not fail
# The seconds that a group of each part takes; it starts only if it has that long.
PARTS = {"ops": 10, "layers": 10, "inference": 40, "latency": 15, "training": 25, "flex": 15, "compiled": 60}

BIAS_AND_DTYPE = "bias and dtype"
_MAIN = "b128_56x56_h2_d32_k7"
_SHAPES = (
    "b128_28x28_h4_d32_k7",
    "b128_14x14_h8_d32_k7",
    "b128_7x7_h16_d32_k7",
    f"{_MAIN}_dil8",
    "b128_28x28_h4_d32_k7_dil4",
    "b128_14x14_h8_d32_k7_dil2",
    "b8_200x304_h2_d32_k7",
    "b128_56x56_h2_d32_k13",
    "b128_56x56_h2_d64_k7",
    "b64_56x56_h2_d128_k7",
    "b1_32768_h4_d64_k2047",
    "b1_32768_h1_d128_k2048_norpb",  # NATTEN 0.21 publishes a figure
    "b4_16x32x32_h4_d32_k5x7x7",
)
_WITH_FLEX = (_MAIN, f"{_MAIN}_norpb", "b128_14x14_h8_d32_k7")
_LAYERS = ("b128_56x56_h2_d32_k7", "b128_28x28_h4_d32_k7", "b128_14x14_h8_d32_k7", "b128_7x7_h16_d32_k7")
_MODELS = {
    "inference": "inference_b128_224_compiled",
    "latency": "inference_b1_224",
    "training": "step_b128_224",
    "compiled": "step_b128_224_compiled",
}
_TINY_MODELS = {"inference": "inference_b1_64", "training": "step_b1_64"}


def plan(part: str, device: str, is_rehearsal: bool) -> list[list[Entry]]:
    """Return the groups of a part.

    Args:
        part: one of PARTS.
        device: the GPU, or "cpu" for a rehearsal.
        is_rehearsal: whether to replace the shapes by tiny ones.
    """
    setting = Setting("float32" if device == "cpu" else "bfloat16", torch.get_num_threads(), device)
    ours = f"natten-{setting.backend}"
    if part == "layers":
        providers = [ours, "timm-window", "timm-shifted-window"]
        names = ("b1_14x14_h2_d32_k7",) if is_rehearsal else _LAYERS
        return [layers.plan(name, providers, setting) for name in names]
    if part in _MODELS:
        name = (_TINY_MODELS if is_rehearsal else _MODELS).get(part)
        return [models.plan(name, ["nat_tiny", "swin_tiny_patch4_window7_224"], setting)] if name else []
    if part == "flex":
        return [] if is_rehearsal else [ops.plan(name, [ours, "flex_attention"], setting) for name in _WITH_FLEX]
    main, others = ("b1_9x9_h2_d8_k3", ("b1_40_h1_d8_k7",)) if is_rehearsal else (_MAIN, _SHAPES)
    runs = [(f"{main}_norpb", setting), (main, setting)]
    if not is_rehearsal:
        runs += [(main, setting._replace(dtype=dtype)) for dtype in ("float32", "tf32")]
    groups = [
        [Entry("ops", BIAS_AND_DTYPE, name, ours, pass_name, s) for name, s in runs]
        for pass_name in ("forward", "forward+backward")
    ]
    return groups + [ops.plan(name, [ours], setting) for name in others]


def first_call_s(device: str) -> tuple[float, float]:
    """Return the seconds of a first call, which compiles, and of one that loads the kernel from the cache."""
    x = torch.randn(2, 20, 20, 3, 2, 32, device=device, dtype=torch.bfloat16)
    seconds = []
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, NATTEN_CACHE_DIR=cache):
        for _ in range(2):
            driver._functions.clear()  # forgets loaded kernels
            started = time.perf_counter()
            with torch.no_grad():
                natten.na2d_qkvpacked(x, 7, backend="cuda")
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - started)
    return seconds[0], seconds[1]
