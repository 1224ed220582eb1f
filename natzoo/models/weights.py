"""How published weights are described to timm."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

DINAT_URL = "https://shi-labs.com/projects/dinat/checkpoints/"


def cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    """timm's description of weights trained on ImageNet-1K at 224x224."""
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        "license": "mit",
        **kwargs,
    }


def cfg_384(url: str, **kwargs: Any) -> dict[str, Any]:
    """The same at 384x384."""
    return cfg(url, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0, **kwargs)


def cfg_22k(url: str, **kwargs: Any) -> dict[str, Any]:
    """Weights of ImageNet-22K, to start from; the published code assumes 21841 classes without saying so."""
    return cfg(url, num_classes=21841, **kwargs)
