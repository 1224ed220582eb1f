"""Parameters and inputs made from a name and a shape, so that golden results need no weight file.

The goldens were computed from exactly these numbers: a change here makes every golden test fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from zlib import crc32

import numpy as np
import torch
from torch import Tensor, nn


def array(name: str, shape: Sequence[int], std: float, mean: float = 0.0) -> np.ndarray:
    """Normally distributed float32 numbers that depend on the name and the shape alone."""
    numbers = np.random.default_rng(crc32(name.encode())).standard_normal(tuple(shape))
    return (numbers * std + mean).astype(np.float32)


def value(name: str, shape: Sequence[int]) -> np.ndarray:
    """What the parameter of that dotted name holds: scales near one, biases near zero, weights by their fan-in."""
    leaf = name.split(".")[-1]
    if leaf == "rpb":
        return array(name, shape, std=0.5)
    if leaf in ("gamma1", "gamma2"):
        return array(name, shape, std=0.1, mean=0.5)
    if len(shape) == 1:
        return array(name, shape, std=0.1, mean=1.0 if leaf == "weight" else 0.0)
    return array(name, shape, std=prod(shape[1:]) ** -0.5)


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Gives every parameter of a model the values of its name."""
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.from_numpy(value(name, parameter.shape)))


def image(size: tuple[int, int], batch: int = 1, name: str = "image") -> Tensor:
    """A batch of normally distributed pictures [batch, 3, height, width]."""
    height, width = size
    return torch.from_numpy(array(f"{name}-{batch}x3x{height}x{width}", (batch, 3, height, width), std=1.0))
