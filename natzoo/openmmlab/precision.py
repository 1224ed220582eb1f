"""Mixed precision on any device: mmengine's own wrapper (float16) on a GPU, bfloat16 without loss scaling on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

_MIXED = ("AmpOptimWrapper", "CpuAmpOptimWrapper")
_OF_AMP = ("loss_scale", "dtype", "use_fsdp")  # options of AmpOptimWrapper alone


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """Runs the model's forward pass and its losses under autocast to bfloat16, whose range needs no scaling."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield


def set_precision(cfg: Config, amp: bool | None) -> None:
    """Chooses the wrapper of a config for the device at hand; with `amp` None it is mixed if the config asks for it."""
    wrapper = cfg.optim_wrapper
    mixed = wrapper.get("type", "OptimWrapper") in _MIXED if amp is None else amp
    if mixed and torch.cuda.is_available():
        wrapper.type = "AmpOptimWrapper"
        return
    wrapper.type = "CpuAmpOptimWrapper" if mixed else "OptimWrapper"
    for option in _OF_AMP:
        wrapper.pop(option, None)
