"""Isotropic models: one resolution throughout, as in ViT, with (dilated) neighborhood attention or full attention.

Paper:
    Dilated Neighborhood Attention Transformer, Hassani and Shi, 2022 (arXiv:2209.15001), section 4.4 and table 9. The
    models are ViTs (arXiv:2010.11929) without class token and position embedding. ViT-rpb has full attention with a
    relative position bias instead.

The published weights load without conversion.
Shape suffixes: B batch, C channels, H height, W width, h heads, d channels per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_model
from timm.models._features import feature_take_indices
from torch import Tensor, fx, nn

import natten
from natten.geometry import padding
from natten.tracing import is_unknown, no_size_guards, record_call, refuse_script
from natzoo.checkpoints.adapt import resize_rpb
from natzoo.models._builder import build, make_default_cfgs
from natzoo.models._layers import (
    Classifier,
    NeighborhoodBlock,
    PatchEmbed,
    check_output_fmt,
    drop_path_rates,
    init_linear,
    run_blocks,
)

__all__ = ["Isotropic"]

PATCH_SIZE = 16


class BiasedAttention(nn.Module):
    """Multi-head self-attention over the whole map with a relative position bias: [B, H, W, dim] -> [B, H, W, dim].

    It is computed as neighborhood attention with a window that covers the map. Maps smaller than `map_size` use the
    center of the bias table; for larger maps the table is resized by interpolation.

    Args:
        dim: number of channels.
        num_heads: number of attention heads.
        map_size: height and width in tokens for which the bias table is made.
        qkv_bias: add a bias to the qkv projection.
        attn_drop: dropout rate on attention weights.
        proj_drop: dropout rate after the output projection.

    Raises:
        ValueError: in forward, if H or W is below 2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        map_size: tuple[int, int],
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
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
        # Unused, but part of the published weights.
        self.register_buffer("relative_position_index", relative_position_index(height, width, device))
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        trunc_normal_(self.rpb, std=0.02)

    def bias(self, height: int, width: int) -> Tensor:
        """Return the bias table for a map size, [heads, 2 height - 1, 2 width - 1]."""
        sides = (2 * height - 1, 2 * width - 1)
        missing = padding(sides, self.rpb.shape[1:], (1, 1))
        # The table keeps its size if both sides are smaller.
        rows, columns = (side + amount for side, amount in zip(sides, missing, strict=True))
        table = resize_rpb(self.rpb, (rows, columns))
        y, x = rows // 2 - height + 1, columns // 2 - width + 1
        return table[:, y : y + 2 * height - 1, x : x + 2 * width - 1]

    def attention_weights(self, x_BHWC: Tensor) -> Tensor:
        """Compute the attention weights that `forward` applies to values, [B, num_heads, H, W, H * W]."""
        return self._weights(self._project(x_BHWC))

    def _weights(self, qkv_BHW3hd: Tensor) -> Tensor:
        window = height, width = qkv_BHW3hd.shape[1:3]
        q_BhHWd, k_BhHWd = (x.movedim(-2, 1) for x in qkv_BHW3hd.unbind(-3)[:2])
        logits = natten.na2d_qk(q_BhHWd * q_BhHWd.shape[-1] ** -0.5, k_BhHWd, window, rpb=self.bias(height, width))
        return logits.softmax(-1)

    def _project(self, x_BHWC: Tensor) -> Tensor:
        """Compute packed query, key and value [B, H, W, 3, heads, head_dim]."""
        height, width = x_BHWC.shape[1:3]
        if not is_unknown((height, width)) and min(height, width) < 2:
            raise ValueError(
                f"x has {height}x{width} tokens of {PATCH_SIZE}x{PATCH_SIZE} pixels; full attention needs at least 2x2."
            )
        return self.qkv(x_BHWC).unflatten(-1, (3, self.num_heads, -1))

    def forward(self, x_BHWC: Tensor, return_weights: bool = False) -> Any:
        """Apply the layer; with return_weights, return a pair of its output and `attention_weights`."""
        if isinstance(x_BHWC, fx.Proxy):
            return record_call(self, x_BHWC)
        height, width = x_BHWC.shape[1:3]
        qkv_BHW3hd = self._project(x_BHWC)
        weights_BhHWW = None
        if return_weights or (self.training and self.attn_drop.p > 0):
            weights_BhHWW = self._weights(qkv_BHW3hd)
            v_BhHWd = qkv_BHW3hd.select(-3, 2).movedim(-2, 1)
            dropped_BhHWW = self.attn_drop(weights_BhHWW).to(v_BhHWd.dtype)
            x_BHWhd = natten.na2d_av(dropped_BhHWW, v_BhHWd, (height, width)).movedim(1, -2)
        elif is_unknown((height, width)):
            with no_size_guards():
                x_BHWhd = self._attend_to_any_size(qkv_BHW3hd)
        else:
            x_BHWhd = cast(Tensor, natten.na2d_qkvpacked(qkv_BHW3hd, (height, width), rpb=self.bias(height, width)))
        x_BHWC = self.proj_drop(self.proj(x_BHWhd.flatten(-2)))
        return (x_BHWC, weights_BhHWW) if return_weights else x_BHWC

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def _attend_to_any_size(self, qkv_BHW3hd: Tensor) -> Tensor:
        """Attend in a traced or exported program, where the window, which is the map, is not known in advance."""
        height, width = qkv_BHW3hd.shape[1:3]
        index_QK = relative_position_index(height, width, qkv_BHW3hd.device)
        bias_hQK = self.bias(height, width).flatten(1).index_select(1, index_QK.flatten()).unflatten(1, index_QK.shape)
        q_BhQd, k_BhKd, v_BhKd = (x.flatten(1, 2).transpose(1, 2) for x in qkv_BHW3hd.unbind(-3))
        out_BhQd = F.scaled_dot_product_attention(q_BhQd, k_BhKd, v_BhKd, attn_mask=bias_hQK.to(q_BhQd.dtype))
        return out_BhQd.transpose(1, 2).unflatten(1, (height, width))


def relative_position_index(height: int, width: int, device=None) -> Tensor:
    """Return the index into the flattened bias table for each query and key, [H * W, H * W]."""
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    y, x = y.flatten(), x.flatten()
    dy, dx = y[None] - y[:, None] + height - 1, x[None] - x[:, None] + width - 1
    return dy * (2 * width - 1) + dx


class Isotropic(Classifier):
    """Isotropic NAT, isotropic DiNAT and ViT-rpb: 16x16 patches, then blocks at one resolution.

    Input: images [B, in_chans, H, W] of any size. Output: logits [B, num_classes].

    Args:
        in_chans: number of image channels.
        num_classes: number of classes; 0 for no classifier.
        global_pool: "avg", "max" or "avgmax" (mean of both), or "" to classify each token.
        img_size: image height and width in pixels, which determine the bias table of full attention; ignored with a
            window.
        depth: number of blocks.
        num_heads: number of attention heads.
        embed_dim: number of channels.
        kernel_size: window size in tokens; None for full attention with a relative position bias (ViT-rpb).
        dilations: one dilation per block; None for 1 everywhere.
        mlp_ratio: ratio of the MLPs' hidden channels to embed_dim.
        qkv_bias: add a bias to the qkv projections.
        drop_rate: dropout rate before the classifier.
        proj_drop_rate: dropout rate after the output projections of attention and MLP.
        attn_drop_rate: dropout rate on attention weights.
        drop_path_rate: stochastic depth rate of the last block; rates rise linearly from 0.

    Raises:
        ValueError: if dilations are not one per block, or are given without a window.
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
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if dilations is not None and kernel_size is None:
            raise ValueError(f"dilations is {dilations}, but full attention has no dilation; set kernel_size.")
        if dilations is not None and len(dilations) != depth:
            raise ValueError(f"dilations has {len(dilations)} values, but depth is {depth}; use one per block.")
        self.in_chans = in_chans
        self.num_features = embed_dim
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(in_chans, embed_dim, PATCH_SIZE, **dd)
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        map_size = (-(-height // PATCH_SIZE), -(-width // PATCH_SIZE))
        self.layers = nn.Sequential()
        (rates,) = drop_path_rates(drop_path_rate, [depth])
        for index in range(depth):
            drop = {"proj_drop": proj_drop_rate, "attn_drop": attn_drop_rate}
            attn = None
            if kernel_size is None:
                attn = BiasedAttention(embed_dim, num_heads, map_size, qkv_bias=qkv_bias, **drop, **dd)
            block = NeighborhoodBlock(
                embed_dim,
                num_heads,
                kernel_size or 1,  # unused with full attention
                1 if dilations is None else dilations[index],
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                drop_path=rates[index],
                attn=attn,
                **drop,
                **dd,
            )
            self.layers.append(block)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": PATCH_SIZE, "module": f"layers.{index}"} for index in range(depth)
        ]
        self.norm = nn.LayerNorm(embed_dim, **dd)
        self.init_classifier(num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's parameter groups for layer-wise learning rates: one per block."""
        return {"stem": r"^patch_embed", "blocks": [(r"^layers\.(\d+)", None), (r"^norm", (99999,))]}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass to save memory."""
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
        """Compute the feature maps of blocks, all at 1/16 of the image size.

        Args:
            x: images [B, in_chans, H, W].
            indices: the last n blocks, or a list of blocks; None for all.
            norm: apply the final norm to all maps.
            stop_early: stop after the last requested block.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return only the maps, without the final features [B, H, W, C].

        Raises:
            ValueError: if output_fmt is unknown.
        """
        check_output_fmt(output_fmt)
        take, last = feature_take_indices(len(self.layers), indices)
        intermediates = []
        x = self.patch_embed(x)
        for index, block in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = run_blocks((block,), x, self.grad_checkpointing)
            if index in take:
                intermediates.append(self.format_intermediate(x, norm, output_fmt))
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks after the last requested one, and optionally the norm and the classifier."""
        take, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        self.prune_end(prune_norm, prune_head)
        return take

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Compute the final, normalized feature map [B, H/16, W/16, embed_dim]."""
        x_BHWC = self.patch_embed(x_BCHW)
        return self.norm(run_blocks(self.layers, x_BHWC, self.grad_checkpointing))


# ---------------------------------------------------------------------------------------------------------------------
# Published weights
# ---------------------------------------------------------------------------------------------------------------------

default_cfgs = make_default_cfgs(
    (
        "nat_isotropic_small.in1k",
        "nat_isotropic_base.in1k",
        "dinat_isotropic_small.in1k",
        "dinat_isotropic_base.in1k",
        "vitrpb_small.in1k",
        "vitrpb_base.in1k",
    ),
    first_conv="patch_embed.proj",
    reduction=PATCH_SIZE,
)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes: constructor arguments by registered name
# ---------------------------------------------------------------------------------------------------------------------

_SMALL = {"num_heads": 12, "embed_dim": 384, "drop_path_rate": 0.1}
_BASE = {"num_heads": 24, "embed_dim": 768, "drop_path_rate": 0.4}
_DILATIONS = (1, 2) * 6

ISOTROPIC_SIZES: dict[str, dict[str, Any]] = {
    "nat_isotropic_small": _SMALL,
    "nat_isotropic_base": _BASE,
    "dinat_isotropic_small": {**_SMALL, "dilations": _DILATIONS},
    "dinat_isotropic_base": {**_BASE, "dilations": _DILATIONS},
    "vitrpb_small": {**_SMALL, "kernel_size": None},
    "vitrpb_base": {**_BASE, "kernel_size": None},
}


# ---------------------------------------------------------------------------------------------------------------------
# Registered models
# ---------------------------------------------------------------------------------------------------------------------


def _create_isotropic(variant: str, pretrained: bool = False, **kwargs: Any) -> Isotropic:
    return build(
        Isotropic, variant, pretrained, default_out_indices=(2, 5, 8, 11), **{**ISOTROPIC_SIZES[variant], **kwargs}
    )


@register_model
def nat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """Isotropic NAT-Small: 22M parameters, 4.3 GMACs."""
    return _create_isotropic("nat_isotropic_small", pretrained, **kwargs)


@register_model
def nat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """Isotropic NAT-Base: 86M parameters, 16.9 GMACs."""
    return _create_isotropic("nat_isotropic_base", pretrained, **kwargs)


@register_model
def dinat_isotropic_small(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """Isotropic DiNAT-Small: 22M parameters, 4.3 GMACs."""
    return _create_isotropic("dinat_isotropic_small", pretrained, **kwargs)


@register_model
def dinat_isotropic_base(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """Isotropic DiNAT-Base: 86M parameters, 16.9 GMACs."""
    return _create_isotropic("dinat_isotropic_base", pretrained, **kwargs)


@register_model
def vitrpb_small(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """ViT-Small with relative position bias: 22M parameters, 4.6 GMACs."""
    return _create_isotropic("vitrpb_small", pretrained, **kwargs)


@register_model
def vitrpb_base(pretrained: bool = False, **kwargs: Any) -> Isotropic:
    """ViT-Base with relative position bias: 86M parameters, 17.5 GMACs."""
    return _create_isotropic("vitrpb_base", pretrained, **kwargs)
