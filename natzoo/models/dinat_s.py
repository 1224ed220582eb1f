"""DiNAT_s: Swin's layout with (dilated) neighborhood attention in place of (shifted) windows.

Paper:
    Dilated Neighborhood Attention Transformer, Hassani and Shi, 2022 (arXiv:2209.15001), section 4.1: non-overlapping
    4x4 patches and patch merging, as in Swin Transformer (arXiv:2103.14030).

The published weights load as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

from natzoo.models.build import build
from natzoo.models.hierarchy import HierarchicalTransformer
from natzoo.models.layers import PatchEmbed
from natzoo.models.weights import published

__all__ = ["DiNAT_s"]


class PatchMerging(nn.Module):
    """LayerNorm and a projection of 2x2 tokens: [B, H, W, C] -> [B, H/2, W/2, 2C]; zeros fill odd sizes."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        batch, height, width, dim = x_BHWC.shape
        x_BHWC = F.pad(x_BHWC, (0, 0, 0, width % 2, 0, height % 2))
        # Channels in the order (even, even), (odd row, even column), (even row, odd column), (odd, odd).
        x_BHaWbC = x_BHWC.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, dim)
        x_BHWC = x_BHaWbC.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x_BHWC))


class DiNAT_s(HierarchicalTransformer):
    """Dilated Neighborhood Attention Transformer in the layout of Swin."""

    stages_name = "layers"
    make_tokenizer = partial(PatchEmbed, 4)
    make_downsampler = PatchMerging


# ---------------------------------------------------------------------------------------------------------------------
# Published weights
# ---------------------------------------------------------------------------------------------------------------------

default_cfgs = published(
    (
        "dinat_s_tiny.in1k",
        "dinat_s_small.in1k",
        "dinat_s_base.in1k",
        "dinat_s_large.in22k_ft_in1k",
        "dinat_s_large_384.in22k_ft_in1k",
        "dinat_s_large_21k.in22k",
    ),
    first_conv="patch_embed.proj",
)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------

_TINY = {
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "embed_dim": 96,
    "mlp_ratio": 4.0,
    "drop_path_rate": 0.2,
    "dilations": ([1, 8], [1, 4], [1, 2] * 3, [1, 1]),
}
_SMALL = {**_TINY, "depths": (2, 2, 18, 2), "drop_path_rate": 0.3, "dilations": ([1, 8], [1, 4], [1, 2] * 9, [1, 1])}
_LARGE = {**_SMALL, "num_heads": (6, 12, 24, 48), "embed_dim": 192, "drop_path_rate": 0.35}

# What the constructor is given for each registered model.
SIZES = {
    "dinat_s_tiny": _TINY,
    "dinat_s_small": _SMALL,
    "dinat_s_base": {**_SMALL, "num_heads": (4, 8, 16, 32), "embed_dim": 128, "drop_path_rate": 0.5},
    "dinat_s_large": _LARGE,
    "dinat_s_large_384": {**_LARGE, "dilations": ([1, 13], [1, 6], [1, 3] * 9, [1, 1])},
    "dinat_s_large_21k": {**_LARGE, "drop_path_rate": 0.2},
}


# ---------------------------------------------------------------------------------------------------------------------
# Registered models
# ---------------------------------------------------------------------------------------------------------------------


def _create_dinat_s(variant: str, pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    return build(DiNAT_s, variant, pretrained, maps=(0, 1, 2, 3), **{**SIZES[variant], **kwargs})


@register_model
def dinat_s_tiny(pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    """DiNAT_s-Tiny: 28M parameters, 4.5 GMACs."""
    return _create_dinat_s("dinat_s_tiny", pretrained, **kwargs)


@register_model
def dinat_s_small(pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    """DiNAT_s-Small: 50M parameters, 8.7 GMACs."""
    return _create_dinat_s("dinat_s_small", pretrained, **kwargs)


@register_model
def dinat_s_base(pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    """DiNAT_s-Base: 88M parameters, 15.4 GMACs."""
    return _create_dinat_s("dinat_s_base", pretrained, **kwargs)


@register_model
def dinat_s_large(pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    """DiNAT_s-Large: 197M parameters, 34.5 GMACs."""
    return _create_dinat_s("dinat_s_large", pretrained, **kwargs)


@register_model
def dinat_s_large_384(pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    """DiNAT_s-Large for 384x384: 197M parameters, 101.5 GMACs."""
    return _create_dinat_s("dinat_s_large_384", pretrained, **kwargs)


@register_model
def dinat_s_large_21k(pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    """DiNAT_s-Large with the classes of ImageNet-22K."""
    return _create_dinat_s("dinat_s_large_21k", pretrained, **kwargs)
