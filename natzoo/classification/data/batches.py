"""What happens to a batch on the device: normalization, progressive size and random erasing.

Batches travel as uint8, which takes a quarter of the shared memory and of the copy to the GPU.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from timm.data.random_erasing import RandomErasing
from torch import Tensor

_MULTIPLE = 8  # of the sides of progressively larger images


class Normalize:
    """Turn uint8 batches into normalized float32 batches, and leave float batches as they are.

    Args:
        config: what `preprocessing` returned.
        device: device of the batches.
    """

    def __init__(self, config: dict[str, Any], device: torch.device):
        self.mean_1C11, self.std_1C11 = (
            torch.tensor(config[key], device=device, dtype=torch.float32).mul(255).view(1, -1, 1, 1)
            for key in ("mean", "std")
        )

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.is_floating_point():
            return x_BCHW
        return x_BCHW.float().sub_(self.mean_1C11).div_(self.std_1C11)


class TrainingBatches:
    """Prepare training batches on the device: normalize, resize to the size of the epoch, and erase random areas.

    Args:
        args: the options.
        config: what `preprocessing` returned.
        device: device of the batches.
    """

    def __init__(self, args: argparse.Namespace, config: dict[str, Any], device: torch.device):
        self.normalize = Normalize(config, device)
        self.size = config["input_size"][1:]
        self.start, self.epochs = args.img_size_start, args.img_size_epochs or max(1, round(0.6 * args.epochs))
        self.erase = None
        if args.reprob > 0:
            self.erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=str(device))

    def __call__(self, x_BCHW: Tensor, epoch: int) -> Tensor:
        """Return the batch for an epoch, counted from 0. Random numbers are those of Python and torch."""
        x_BCHW = self.normalize(x_BCHW)
        size = self.size_of(epoch)
        if size != self.size:
            x_BCHW = F.interpolate(x_BCHW, size, mode="bilinear", antialias=True)
        return x_BCHW if self.erase is None else self.erase(x_BCHW)

    def size_of(self, epoch: int) -> list[int]:
        """Return the height and width of an epoch: growing from --img-size-start to full size, in steps of 8 pixels."""
        if self.start is None or epoch >= self.epochs:
            return self.size
        share = epoch / self.epochs
        grown = [self.start + share * (side - self.start) for side in self.size]
        return [min(side, int(value) // _MULTIPLE * _MULTIPLE) for side, value in zip(self.size, grown, strict=True)]
