"""Isotropic models: all maps of one size, as in ViT, with neighborhood attention, dilated or not, or full attention.

Paper:
    Dilated Neighborhood Attention Transformer, Hassani and Shi, 2022 (arXiv:2209.15001), section 4.4 and table 9: ViT
    (arXiv:2010.11929) without class token and position embedding; ViT-rpb has a relative position bias instead.

The published weights load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

import natten
from natzoo.checkpoints.rpb import resize_rpb
from natzoo.models.build import build
from natzoo.models.classifier import Classifier, check_output_fmt
from natzoo.models.layers import NeighborhoodBlock, PatchEmbed, drop_path_rates, init_linear, run_blocks
from natzoo.models.weights import published

__all__ = ["Isotropic"]

PATCH_SIZE = 16


class BiasedAttention(nn.Module):
    """Multi-head self-attention over a whole map, with a relative position bias: a window that is the map.

    Takes and returns [B, H, W, dim], H and W at least 2. On maps smaller than `map_size` the middle of the bias table
    serves; for larger ones it is stretched.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        map_size: tuple[int, int],
        *,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.num_heads = num_heads
        height, width = map_size
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.rpb = nn.Parameter(torch.empty(num_heads, 2 * height - 1, 2 * width - 1, **dd))
        # Of no use here, but part of the published weights.
        self.register_buffer("relative_position_index", relative_position_index(height, width, device))
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        trunc_normal_(self.rpb, std=0.02)

    def bias(self, height: int, width: int) -> Tensor:
        """The table for a map, [heads, 2 height - 1, 2 width - 1]."""
        table = resize_rpb(self.rpb, (max(2 * height - 1, self.rpb.shape[1]), max(2 * width - 1, self.rpb.shape[2])))
        y, x = table.shape[1] // 2 - height + 1, table.shape[2] // 2 - width + 1
        return table[:, y : y + 2 * height - 1, x : x + 2 * width - 1]

    def attention_weights(self, x_BHWC: Tensor) -> Tensor:
        """What `forward` weighs values by: [B, num_heads, H, W, H * W]."""
        height, width = x_BHWC.shape[1:3]
        q_BhHWd, k_BhHWd = (x.movedim(-2, 1) for x in self._project(x_BHWC).unbind(-3)[:2])
        scale = q_BhHWd.shape[-1] ** -0.5
        logits = natten.na2d_qk(q_BhHWd * scale, k_BhHWd, (height, width), rpb=self.bias(height, width))
        return logits.softmax(-1)

    def _project(self, x_BHWC: Tensor) -> Tensor:
        """Packed query, key and value [B, H, W, 3, heads, head_dim]."""
        height, width = x_BHWC.shape[1:3]
        if min(height, width) < 2:
            raise ValueError(f"the map has {height}x{width} patches of {PATCH_SIZE} pixels, but needs at least 2x2.")
        return self.qkv(x_BHWC).unflatten(-1, (3, self.num_heads, -1))

    def forward(self, x_BHWC: Tensor) -> Tensor:
        height, width = map(int, x_BHWC.shape[1:3])  # torch.jit.trace makes tensors of sizes
        qkv_BHW3hd = self._project(x_BHWC)
        x_BHWhd = natten.na2d_qkvpacked(qkv_BHW3hd, (height, width), rpb=self.bias(height, width))
        return self.proj_drop(self.proj(x_BHWhd.flatten(-2)))


def relative_position_index(height: int, width: int, device=None) -> Tensor:
    """Entry of the flattened bias table for each pair of tokens, [H W, H W]: key less query, from 0."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[None] - y[:, None] + height - 1, x[None] - x[:, None] + width - 1
    return dy * (2 * width - 1) + dx


class Isotropic(Classifier):
    """Tokens of 16x16 pixels, blocks of neighborhood attention (or full attention), their mean, and a classifier.

    Takes images [B, in_chans, H, W] of any size and returns logits [B, num_classes].

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for no classifier.
        global_pool: "avg", or "" to classify each token.
        img_size: height and width that full attention's bias is for; neighborhood attention does not depend on it.
        depth: blocks.
        num_heads: attention heads.
        embed_dim: channels.
        kernel_size: window, in tokens; None for full attention with a relative position bias (ViT-rpb).
        dilations: one dilation a block; None for 1 everywhere.
        mlp_ratio: hidden channels of the MLPs, as a multiple of embed_dim.
        qkv_bias: whether the qkv projections have a bias.
        drop_rate: dropout rate before the classifier.
        proj_drop_rate: dropout rate after the projections of attention and MLP.
        drop_path_rate: rate of stochastic depth at the last block, rising linearly from 0.

    Raises:
        ValueError: if there is not one dilation a block, or dilations without a window.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        img_size: int | tuple[int, int] = 224,
        depth: int = 12,
        num_heads: int = 12,
        embed_dim: int = 384,
        kernel_size: int | None = 7,
        dilations: Sequence[int] | None = None,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dilations is not None and kernel_size is None:
            raise ValueError(f"dilations are {dilations}, but full attention has none: give a kernel_size.")
        if dilations is not None and len(dilations) != depth:
            raise ValueError(f"dilations are {len(dilations)} values, but must be {depth}, one a block.")
        self.num_features = embed_dim
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(PATCH_SIZE, in_chans, embed_dim, **dd)
        sides = (img_size, img_size) if isinstance(img_size, int) else img_size
        map_size = tuple(-(-side // PATCH_SIZE) for side in sides)
        self.layers = nn.Sequential()
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        for index in range(depth):
            attn = None
            if kernel_size is None:
                attn = BiasedAttention(
                    embed_dim, num_heads, map_size, qkv_bias=qkv_bias, proj_drop=proj_drop_rate, **dd
                )
            block = NeighborhoodBlock(
                embed_dim,
                num_heads,
                kernel_size or 7,
                1 if dilations is None else dilations[index],
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                drop_path=rates[index],
                attn=attn,
                **dd,
            )
            self.layers.append(block)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": PATCH_SIZE, "module": f"layers.{index}"} for index in range(depth)
        ]
        self.norm = nn.LayerNorm(embed_dim, **dd)
        self.make_classifier(num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)

    # ----- timm's contract --------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of chosen blocks, all at 1/16 of the image.

        Args:
            x: images [B, in_chans, H, W].
            indices: the last n blocks, or these blocks; None for all.
            norm: whether the maps go through the final norm.
            stop_early: whether to stop after the last block asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: whether to return the maps alone, not also the final features [B, H, W, C].

        Raises:
            ValueError: on another output_fmt.
        """
        check_output_fmt(output_fmt)
        take, last = feature_take_indices(len(self.layers), indices)
        intermediates = []
        x = self.patch_embed(x)
        for index, block in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = run_blocks((block,), x, self.grad_checkpointing)
            if index in take:
                intermediates.append(self.make_intermediate(x, norm, output_fmt))
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last one asked for, and with it what stands behind."""
        take, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        self.prune_end(prune_norm, prune_head)
        return take

    # ----- forward ----------------------------------------------------------------------------------------------------

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Final feature map [B, H/16, W/16, embed_dim], normalised."""
        x_BHWC = self.patch_embed(x_BCHW)
        return self.norm(run_blocks(self.layers, x_BHWC, self.grad_checkpointing))


def _create_isotropic(variant: str, pretrained: bool = False, **kwargs: Any) -> Isotropic:
    return build(Isotropic, variant, pretrained, maps=(2, 5, 8, 11), **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Published weights
# ---------------------------------------------------------------------------------------------------------------------

default_cfgs = published(
    (
        "nat_isotropic_small.in1k",
        "nat_isotropic_base.in1k",
        "dinat_isotropic_small.in1k",
        "dinat_isotropic_base.in1k",
        "vitrpb_small.in1k",
        "vitrpb_base.in1k",
    ),
    first_conv="patch_embed.proj",
    stride=PATCH_SIZE,
)


# ---------------------------------------------------------------------------------------------------------------------
# Registered models
# ---------------------------------------------------------------------------------------------------------------------

_SMALL = {"num_heads": 12, "embed_dim": 384, "drop_path_rate": 0.1}
_BASE = {"num_heads": 24, "embed_dim": 768, "drop_path_rate": 0.4}
_DILATIONS = (1, 2) * 6


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """Isotropic NAT, small: 22M parameters, 4.3 GMACs."""
    return _create_isotropic("nat_isotropic_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """Isotropic NAT, base: 86M parameters, 16.9 GMACs."""
    return _create_isotropic("nat_isotropic_base", pretrained, **{**_BASE, **kwargs})


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """Isotropic DiNAT, small: 22M parameters, 4.3 GMACs."""
    return _create_isotropic("dinat_isotropic_small", pretrained, **{**_SMALL, "dilations": _DILATIONS, **kwargs})


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """Isotropic DiNAT, base: 86M parameters, 16.9 GMACs."""
    return _create_isotropic("dinat_isotropic_base", pretrained, **{**_BASE, "dilations": _DILATIONS, **kwargs})


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """ViT with relative position bias, small: 22M parameters, 4.6 GMACs."""
    return _create_isotropic("vitrpb_small", pretrained, **{**_SMALL, "kernel_size": None, **kwargs})


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """ViT with relative position bias, base: 86M parameters, 17.5 GMACs."""
    return _create_isotropic("vitrpb_base", pretrained, **{**_BASE, "kernel_size": None, **kwargs})
