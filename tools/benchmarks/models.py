"""Whole models: inference, and a training step (forward, cross-entropy, backward, AdamW).

A case is written inference_b8_224 or step_b8_224: batch size and image side, optionally with _compiled for
torch.compile. A provider is any model that timm or natzoo registers. In a 16-bit dtype, inference converts the model,
and a training step uses autocast.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import natten.flops
import natzoo  # noqa: F401  registers the models
from benchmarks.entry import Entry, Setting, Subject
from natten.profiler import Work

GROUPS = ("inference_b1_224", "inference_b8_224", "step_b8_224")
PROVIDERS = (
    *("nat_mini", "nat_tiny", "nat_small", "nat_base"),
    *("dinat_mini", "dinat_tiny", "dinat_small", "dinat_base"),
    *("dinat_s_tiny", "dinat_s_small", "dinat_s_base"),
    *(f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")),
    *(f"convnext_{size}" for size in ("tiny", "small", "base")),
)
_DROP_PATH = 0.2  # in training steps of all models


def parse(name: str) -> tuple[str, int, int, bool]:
    """Parse a case: pass, batch size, image side in pixels, and whether it is compiled.

    Raises:
        ValueError: if the notation is wrong.
    """
    found = re.fullmatch(r"(inference|step)_b([1-9]\d*)_([1-9]\d*)(_compiled)?", name)
    if not found:
        raise ValueError(f"case {name!r} is unknown; use a name from --list or one such as {GROUPS[-1]}.")
    return found[1], int(found[2]), int(found[3]), found[4] is not None


def plan(group: str, providers: list[str] | None, setting: Setting) -> list[Entry]:
    """Return the entries of a case.

    Raises:
        ValueError: if the case or a model is unknown.
    """
    for provider in providers or ():
        if not timm.is_model(provider):
            raise ValueError(f"provider {provider!r} is unknown; use a model that timm or natzoo registers.")
    return [Entry("models", group, group, provider, parse(group)[0], setting) for provider in providers or PROVIDERS]


def make(entry: Entry) -> Subject:
    """Return the code of an entry.

    Raises:
        ValueError, RuntimeError: if the model does not support images of this size.
    """
    pass_name, batch, side, is_compiled = parse(entry.case)
    is_step = pass_name == "step"
    dtype = torch.float32 if is_step else entry.dtype
    torch.manual_seed(0)
    model = _create(entry.provider, side, pass_name).to(entry.device, dtype)
    x_BCHW = torch.randn(batch, 3, side, side).to(entry.device, dtype)
    gflop = batch * _count_gflop(model, x_BCHW[:1], pass_name)
    images, parameters = x_BCHW.numel(), sum(p.numel() for p in model.parameters())
    if entry.device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    run: Callable[[Tensor], Tensor] = model
    if is_compiled:
        torch._dynamo.reset()
        run = torch.compile(model)
    if is_step:
        # Parameters and AdamW's two moments are read and written, gradients written and read.
        call, moved = _step(model, run, x_BCHW, entry.dtype), images + 8 * parameters
    else:
        call, moved = lambda: run(x_BCHW), images + parameters
    work = Work(gflop, 1e-9 * moved * dtype.itemsize)
    # A graph can capture neither AdamW nor, safely, what torch.compile makes of a model.
    return Subject(call, work, needs_grad=is_step, batch=batch, use_graph=not is_step and not is_compiled)


def _create(name: str, side: int, pass_name: str) -> nn.Module:
    config = timm.get_pretrained_cfg(name)
    options = {"drop_path_rate": _DROP_PATH} if pass_name == "step" else {}
    if config.fixed_input_size and config.input_size[-1] != side:
        options["img_size"] = side
    return timm.create_model(name, **options).train(pass_name == "step")


def _step(
    model: nn.Module, run: Callable[[Tensor], Tensor], x_BCHW: Tensor, dtype: torch.dtype
) -> Callable[[], Tensor]:
    target_B = torch.arange(len(x_BCHW), device=x_BCHW.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> Tensor:
        with torch.autocast(x_BCHW.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(run(x_BCHW), target_B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _count_gflop(model: nn.Module, x_1CHW: Tensor, pass_name: str) -> float:
    """Return the GFLOP of matrix products, convolutions and neighborhood attention for one image."""
    is_training = model.training
    model.eval()
    corrected = {torch.ops.aten.convolution_backward: _flop_of_convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=corrected) as counter, natten.use_backend(None):
        if pass_name == "inference":
            with torch.no_grad():
                model(x_1CHW)
        else:
            with torch.enable_grad():
                model(x_1CHW).sum().backward()
    model.zero_grad()
    model.train(is_training)
    return counter.get_total_flops() / 1e9


def _flop_of_convolution_backward(grad_shape, x_shape, weight_shape, *rest, **_) -> int:
    """Count the work of the forward pass once per gradient. PyTorch's own formula ignores groups."""
    is_transposed, needs = rest[4], rest[7]
    points = math.prod(x_shape if is_transposed else grad_shape)
    return 2 * points * math.prod(weight_shape[1:]) * sum(needs[:2])
