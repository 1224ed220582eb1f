"""How published weights are described to timm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs

from natzoo.checkpoints import zoo


def published(names: Iterable[str], first_conv: str, stride: int = 32) -> dict[str, Any]:
    """timm's `default_cfgs` of a family: what natzoo/zoo.yaml and the papers' evaluation protocol say.

    Args:
        names: registered names with timm's tags, "MODEL.TAG".
        first_conv: name of the convolution that takes the image.
        stride: pixels of the image a token of the last map stands for.
    """
    return generate_default_cfgs({name: _cfg(zoo.find(name), first_conv, stride) for name in names})


def _cfg(entry: zoo.Entry, first_conv: str, stride: int) -> dict[str, Any]:
    size = entry.facts.get("size", 224)
    return {
        "url": entry.url,
        "num_classes": entry.facts.get("classes", 1000),
        "input_size": (3, size, size),
        "pool_size": (size // stride, size // stride),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head",
        "license": "mit",
    }
