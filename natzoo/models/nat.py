"""NAT and DiNAT: hierarchical transformers with (dilated) neighborhood attention.

Papers:
    Neighborhood Attention Transformer, Hassani et al., CVPR 2023 (arXiv:2204.07143): overlapping convolutions make the
    tokens and halve the map between stages; every token attends to its 7x7 neighbourhood.
    Dilated Neighborhood Attention Transformer, Hassani and Shi, 2022 (arXiv:2209.15001): the same network with dilated
    windows in every other block.

A DiNAT is a NAT with `dilations`; dilations have no parameters. The published weights load as they are.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import Tensor, nn

from natzoo.models.build import build
from natzoo.models.hierarchy import HierarchicalTransformer
from natzoo.models.layers import to_nchw, to_nhwc
from natzoo.models.weights import published

__all__ = ["NAT"]


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions of stride 2, then LayerNorm: [B, in_chans, H, W] -> [B, H/4, W/4, embed_dim], rounded up."""

    def __init__(self, in_chans: int = 3, embed_dim: int = 64, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, kernel_size=3, stride=2, padding=1, **dd),
            nn.Conv2d(embed_dim // 2, embed_dim, kernel_size=3, stride=2, padding=1, **dd),
        )
        self.norm = nn.LayerNorm(embed_dim, **dd)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(to_nhwc(self.proj(x_BCHW)))


class ConvDownsampler(nn.Module):
    """A 3x3 convolution of stride 2, then LayerNorm: [B, H, W, C] -> [B, H/2, W/2, 2C], rounded up."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False, **dd)
        self.norm = nn.LayerNorm(2 * dim, **dd)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.norm(to_nhwc(self.reduction(to_nchw(x_BHWC))))


class NAT(HierarchicalTransformer):
    """Neighborhood Attention Transformer; with `dilations`, Dilated Neighborhood Attention Transformer."""

    stages_name = "levels"
    make_tokenizer = ConvTokenizer
    make_downsampler = ConvDownsampler


# ---------------------------------------------------------------------------------------------------------------------
# Published weights
# ---------------------------------------------------------------------------------------------------------------------

default_cfgs = published(
    (
        "nat_mini.in1k",
        "nat_tiny.in1k",
        "nat_small.in1k",
        "nat_base.in1k",
        "dinat_mini.in1k",
        "dinat_tiny.in1k",
        "dinat_small.in1k",
        "dinat_base.in1k",
        "dinat_large.in22k_ft_in1k",
        "dinat_large_384.in22k_ft_in1k",
        "dinat_large_384_11x11.in22k_ft_in1k",
        "dinat_large_21k.in22k",
        "dinat_large_21k_11x11.in22k",
    ),
    first_conv="patch_embed.proj.0",
)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------

_MINI = {"depths": (3, 4, 6, 5), "num_heads": (2, 4, 8, 16), "embed_dim": 64, "mlp_ratio": 3.0, "drop_path_rate": 0.2}
_TINY = {**_MINI, "depths": (3, 4, 18, 5)}
_SMALL = {
    "depths": (3, 4, 18, 5),
    "num_heads": (3, 6, 12, 24),
    "embed_dim": 96,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.3,
}
_BASE = {**_SMALL, "num_heads": (4, 8, 16, 32), "embed_dim": 128, "drop_path_rate": 0.5, "layer_scale": 1e-5}
_LARGE = {**_SMALL, "num_heads": (6, 12, 24, 48), "embed_dim": 192, "drop_path_rate": 0.35}
_LARGE_21K = {**_LARGE, "drop_path_rate": 0.2}

_DILATIONS_224_MINI = ([1, 8, 1], [1, 4] * 2, [1, 2] * 3, [1] * 5)
_DILATIONS_224 = ([1, 8, 1], [1, 4] * 2, [1, 2] * 9, [1] * 5)
_DILATIONS_384 = ([1, 13, 1], [1, 6] * 2, [1, 3] * 9, [1] * 5)

# What the constructor is given for each registered model. DiNAT-Small has no layer scale, unlike NAT-Small.
SIZES = {
    "nat_mini": _MINI,
    "nat_tiny": _TINY,
    "nat_small": {**_SMALL, "layer_scale": 1e-5},
    "nat_base": _BASE,
    "dinat_mini": {**_MINI, "dilations": _DILATIONS_224_MINI},
    "dinat_tiny": {**_TINY, "dilations": _DILATIONS_224},
    "dinat_small": {**_SMALL, "dilations": _DILATIONS_224},
    "dinat_base": {**_BASE, "dilations": _DILATIONS_224},
    "dinat_large": {**_LARGE, "dilations": _DILATIONS_224},
    "dinat_large_384": {**_LARGE, "dilations": _DILATIONS_384},
    "dinat_large_384_11x11": {**_LARGE, "dilations": _DILATIONS_224, "kernel_size": 11},
    "dinat_large_21k": {**_LARGE_21K, "dilations": _DILATIONS_224},
    "dinat_large_21k_11x11": {**_LARGE_21K, "dilations": _DILATIONS_224, "kernel_size": 11},
}


# ---------------------------------------------------------------------------------------------------------------------
# Registered models
# ---------------------------------------------------------------------------------------------------------------------


def _create_nat(variant: str, pretrained: bool = False, **kwargs: Any) -> NAT:
    return build(NAT, variant, pretrained, maps=(0, 1, 2, 3), **{**SIZES[variant], **kwargs})


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini: 20M parameters, 2.7 GMACs."""
    return _create_nat("nat_mini", pretrained, **kwargs)


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny: 28M parameters, 4.3 GMACs."""
    return _create_nat("nat_tiny", pretrained, **kwargs)


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small: 51M parameters, 7.8 GMACs."""
    return _create_nat("nat_small", pretrained, **kwargs)


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base: 90M parameters, 13.7 GMACs."""
    return _create_nat("nat_base", pretrained, **kwargs)


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini: 20M parameters, 2.7 GMACs."""
    return _create_nat("dinat_mini", pretrained, **kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny: 28M parameters, 4.3 GMACs."""
    return _create_nat("dinat_tiny", pretrained, **kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small: 51M parameters, 7.8 GMACs; without layer scale, unlike NAT-Small."""
    return _create_nat("dinat_small", pretrained, **kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base: 90M parameters, 13.7 GMACs."""
    return _create_nat("dinat_base", pretrained, **kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large: 200M parameters, 30.6 GMACs."""
    return _create_nat("dinat_large", pretrained, **kwargs)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large with dilations for 384x384 images: 89.7 GMACs."""
    return _create_nat("dinat_large_384", pretrained, **kwargs)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large with 11x11 windows for 384x384 images: 92.4 GMACs."""
    return _create_nat("dinat_large_384_11x11", pretrained, **kwargs)


@register_model
def dinat_large_21k(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large with the classes of ImageNet-22K."""
    return _create_nat("dinat_large_21k", pretrained, **kwargs)


@register_model
def dinat_large_21k_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """The same with the relative position bias of 11x11 windows: a start for larger images."""
    return _create_nat("dinat_large_21k_11x11", pretrained, **kwargs)
