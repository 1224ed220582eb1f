"""Whole models: inference, and a training step (forward, cross-entropy, backward, AdamW).

A case is written inference_b8_224 or step_b8_224: batch and side of the image. A provider is any model that timm knows.
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
import natzoo  # noqa: F401  registers our models
from benchmarks.entry import Entry, Setting, Subject

GROUPS = ("inference_b1_224", "inference_b8_224", "step_b8_224")
PROVIDERS = (
    *("nat_mini", "nat_tiny", "nat_small", "nat_base"),
    *("dinat_mini", "dinat_tiny", "dinat_small", "dinat_base"),
    *("dinat_s_tiny", "dinat_s_small", "dinat_s_base"),
    *(f"swin_{size}_patch4_window7_224" for size in ("tiny", "small", "base")),
    *(f"convnext_{size}" for size in ("tiny", "small", "base")),
)
_DROP_PATH = 0.2  # in training, for all alike


def parse(name: str) -> tuple[str, int, int]:
    """Pass, batch and side in pixels.

    Raises:
        ValueError: if it is not written as it must be.
    """
    found = re.fullmatch(r"(inference|step)_b([1-9]\d*)_([1-9]\d*)", name)
    if not found:
        raise ValueError(f"case {name!r} is unknown: name one of --list, or write one like {GROUPS[-1]}.")
    return found[1], int(found[2]), int(found[3])


def plan(group: str, providers: list[str] | None, setting: Setting) -> list[Entry]:
    """The entries of a case.

    Raises:
        ValueError: on an unknown case or model.
    """
    for provider in providers or ():
        if not timm.is_model(provider):
            raise ValueError(f"provider {provider!r} is unknown: name a model that timm or natzoo has.")
    return [Entry("models", group, group, provider, parse(group)[0], setting) for provider in providers or PROVIDERS]


def make(entry: Entry) -> Subject:
    """The code behind an entry.

    Raises:
        ValueError, RuntimeError: if the model does not take such images.
    """
    pass_name, batch, side = parse(entry.case)
    torch.manual_seed(0)
    model = _create(entry.provider, side, pass_name).to(entry.device, entry.dtype)
    x_BCHW = torch.randn(batch, 3, side, side).to(entry.device, entry.dtype)
    gflop = batch * _count_gflop(model, x_BCHW[:1], pass_name)
    images, parameters = x_BCHW.numel(), sum(p.numel() for p in model.parameters())
    if pass_name == "inference":
        call, moved = lambda: model(x_BCHW), images + parameters
    else:
        # Parameters and AdamW's two moments are read and written, gradients written and read.
        call, moved = _step(model, x_BCHW), images + 8 * parameters
    gbytes = 1e-9 * moved * entry.dtype.itemsize
    return Subject(call, gflop, gbytes, needs_grad=pass_name == "step", batch=batch)


def _create(name: str, side: int, pass_name: str) -> nn.Module:
    config = timm.get_pretrained_cfg(name)
    options = {"drop_path_rate": _DROP_PATH} if pass_name == "step" else {}
    if config.fixed_input_size and config.input_size[-1] != side:
        options["img_size"] = side
    return timm.create_model(name, **options).train(pass_name == "step")


def _step(model: nn.Module, x_BCHW: Tensor) -> Callable[[], Tensor]:
    target_B = torch.arange(len(x_BCHW), device=x_BCHW.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> Tensor:
        loss = F.cross_entropy(model(x_BCHW), target_B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _count_gflop(model: nn.Module, x_1CHW: Tensor, pass_name: str) -> float:
    """GFLOP of the matrix products, convolutions and windows that one image takes."""
    is_training = model.training
    model.eval()
    right = {torch.ops.aten.convolution_backward: _flop_of_convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=right) as counter, natten.use_backend(None):
        if pass_name == "inference":
            with torch.no_grad():
                model(x_1CHW)
        else:
            model(x_1CHW).sum().backward()
    model.zero_grad()
    model.train(is_training)
    return counter.get_total_flops() / 1e9


def _flop_of_convolution_backward(grad_shape, x_shape, weight_shape, *rest, **_) -> int:
    """Each of the two gradients takes the work of the forward pass; PyTorch's own count leaves the groups out."""
    is_transposed, needs = rest[4], rest[7]
    points = math.prod(x_shape if is_transposed else grad_shape)
    return 2 * points * math.prod(weight_shape[1:]) * sum(needs[:2])
