"""A small model of each family, by registered name."""

from __future__ import annotations

import timm
import torch
from torch import Tensor, nn

import natzoo  # noqa: F401  registers the models

_HIERARCHY = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16, "kernel_size": 3, "num_classes": 5}
_ISOTROPIC = {"depth": 2, "num_heads": 2, "embed_dim": 16, "num_classes": 5}
SMALL = {
    "nat_mini": _HIERARCHY,
    "nat_small": {**_HIERARCHY, "layer_scale": 0.5},
    "dinat_mini": {**_HIERARCHY, "dilations": [[2], [1]]},
    "dinat_s_tiny": {**_HIERARCHY, "dilations": [[2], [1]]},
    "dinat_isotropic_small": {**_ISOTROPIC, "dilations": (1, 2)},
    "vitrpb_small": {**_ISOTROPIC, "img_size": 48},
}


def small(name: str = "nat_mini", seed: int = 0, **kwargs) -> nn.Module:
    """Create a model with random values in all parameters."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{**SMALL[name], **kwargs}).eval()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def copy_of_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check for the same names and bit-identical tensors."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
