"""NAT, DiNAT and DiNAT_s: hierarchical transformers with (dilated) neighborhood attention.

Papers:
    NAT: Neighborhood Attention Transformer, Hassani et al., CVPR 2023 (arXiv:2204.07143). Overlapping convolutions
    embed the image and halve the map between stages; every token attends to its 7x7 neighborhood.

    DiNAT: Dilated Neighborhood Attention Transformer, Hassani and Shi, 2022 (arXiv:2209.15001). The same network with
    dilated windows in every other block.

    DiNAT_s: same paper, section 4.1. The layout of Swin Transformer (arXiv:2103.14030), with non-overlapping 4x4
    patches and patch merging.

The published weights load without conversion. Dilations have no parameters, so NAT and DiNAT weights are compatible.
Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from natten.tracing import no_size_guards
from natzoo.models._builder import build, make_default_cfgs
from natzoo.models._layers import (
    Classifier,
    NeighborhoodBlock,
    PatchEmbed,
    check_dilations,
    check_output_fmt,
    drop_path_rates,
    init_linear,
    run_blocks,
    to_nchw,
    to_nhwc,
)

__all__ = ["NAT", "DiNAT", "DiNAT_s"]


class ConvTokenizer(nn.Module):
    """Two 3x3 convolutions with stride 2, then LayerNorm: [B, C, H, W] -> [B, H/4, W/4, embed_dim], rounded up."""

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
    """A 3x3 convolution with stride 2, then LayerNorm: [B, H, W, C] -> [B, H/2, W/2, 2C], rounded up."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.reduction = nn.Conv2d(dim, 2 * dim, kernel_size=3, stride=2, padding=1, bias=False, **dd)
        self.norm = nn.LayerNorm(2 * dim, **dd)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.norm(to_nhwc(self.reduction(to_nchw(x_BHWC))))


class PatchMerging(nn.Module):
    """LayerNorm and a projection of 2x2 tokens: [B, H, W, C] -> [B, H/2, W/2, 2C]; odd sizes are zero-padded."""

    def __init__(self, dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(4 * dim, **dd)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        batch, height, width, dim = x_BHWC.shape
        x_BHWC = F.pad(x_BHWC, (0, 0, 0, width % 2, 0, height % 2))
        # Order of the four tokens (row, column): (even, even), (odd, even), (even, odd), (odd, odd).
        with no_size_guards():
            x_BHaWbC = x_BHWC.reshape(batch, (height + 1) // 2, 2, (width + 1) // 2, 2, dim)
            x_BHWC = x_BHaWbC.permute(0, 1, 3, 4, 2, 5).flatten(3)
        return self.reduction(self.norm(x_BHWC))


class Stage(nn.Module):
    """Blocks at one resolution, followed by a downsampler in all stages but the last.

    Args:
        dim: number of channels.
        num_heads: number of attention heads.
        dilations: one dilation per block.
        drop_path: one stochastic depth rate per block.
        downsample: the downsampler; None in the last stage.
        block_args: other arguments of NeighborhoodBlock.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dilations: Sequence[int],
        drop_path: Sequence[float],
        downsample: nn.Module | None,
        device=None,
        dtype=None,
        **block_args: Any,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.grad_checkpointing = False
        self.blocks = nn.ModuleList(
            NeighborhoodBlock(dim, num_heads, dilation=dilation, drop_path=rate, **block_args, **dd)
            for dilation, rate in zip(dilations, drop_path, strict=True)
        )
        self.downsample = downsample

    def forward_blocks(self, x_BHWC: Tensor) -> Tensor:
        """Compute the stage's feature map, before downsampling."""
        return run_blocks(self.blocks, x_BHWC, self.grad_checkpointing)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = self.forward_blocks(x_BHWC)
        return x_BHWC if self.downsample is None else self.downsample(x_BHWC)


class HierarchicalTransformer(Classifier):
    """Base class of NAT, DiNAT and DiNAT_s: stages of blocks, each at half the resolution of the previous one.

    Input: images [B, in_chans, H, W] of any size. Output: logits [B, num_classes].

    Args:
        in_chans: number of image channels.
        num_classes: number of classes; 0 for no classifier.
        global_pool: "avg", "max" or "avgmax" (mean of both), or "" to classify each token.
        depths: number of blocks per stage.
        num_heads: number of attention heads per stage.
        embed_dim: channels of the first stage; they double with each stage.
        kernel_size: window size in tokens.
        dilations: one dilation per block, as one list per stage; None for 1 everywhere.
        mlp_ratio: ratio of the MLPs' hidden channels to the stage's channels.
        qkv_bias: add a bias to the qkv projections.
        drop_rate: dropout rate before the classifier.
        proj_drop_rate: dropout rate after the output projections of attention and MLP.
        attn_drop_rate: dropout rate on attention weights.
        drop_path_rate: stochastic depth rate of the last block; rates rise linearly from 0.
        layer_scale: initial value of the learned scale of each branch; None for no scale.
        img_size: ignored; images may have any size.

    Raises:
        ValueError: if depths, num_heads and dilations differ in length.

    Subclasses define:
        tokenizer_cls: module class for [B, in_chans, H, W] -> [B, H/4, W/4, embed_dim], sizes rounded up.
        downsampler_cls: module class for [B, H, W, C] -> [B, H/2, W/2, 2C], sizes rounded up.
        stages_name: name of the attribute with the stages, as in the published weights.
    """

    tokenizer_cls: type[nn.Module]
    downsampler_cls: type[nn.Module]
    stages_name: str

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 4, 6, 5),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        embed_dim: int = 64,
        kernel_size: int = 7,
        dilations: Sequence[Sequence[int]] | None = None,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        img_size: int | tuple[int, int] | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads has {len(num_heads)} stages, but depths has {len(depths)}.")
        dilations = check_dilations(dilations, depths)
        rates = drop_path_rates(drop_path_rate, depths)
        self.in_chans = in_chans
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.feature_info: list[dict[str, Any]] = []

        self.patch_embed = self.tokenizer_cls(in_chans, embed_dim, **dd)
        stages = nn.ModuleList()
        self.add_module(self.stages_name, stages)
        for index in range(len(depths)):
            dim = embed_dim * 2**index
            is_last = index == len(depths) - 1
            stage = Stage(
                dim,
                num_heads[index],
                dilations[index],
                rates[index],
                downsample=None if is_last else self.downsampler_cls(dim, **dd),
                kernel_size=kernel_size,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                layer_scale=layer_scale,
                **dd,
            )
            stages.append(stage)
            # The last block, because the output of the stage is downsampled.
            module = f"{self.stages_name}.{index}.blocks.{depths[index] - 1}"
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**index, "module": module})
        self.norm = nn.LayerNorm(self.num_features, **dd)
        self.init_classifier(num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)

    @property
    def stages(self) -> Any:
        """The nn.ModuleList of all stages, whose attribute name depends on the family."""
        return getattr(self, self.stages_name)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's parameter groups for layer-wise learning rates: one per block, or per stage if coarse."""
        stage = rf"^{self.stages_name}\.(\d+)"
        if coarse:
            return {"stem": r"^patch_embed", "blocks": stage}
        blocks = [
            (stage + r"\.blocks\.(\d+)", None),
            (stage + r"\.downsample", (99999,)),  # same group as the block before it
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass to save memory."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute the feature maps of stages, before each downsampler, at 1/4, 1/8, 1/16 and 1/32 of the image size.

        Args:
            x: images [B, in_chans, H, W].
            indices: the last n stages, or a list of stages; None for all.
            norm: apply the final norm to the last stage's map.
            stop_early: stop after the last requested stage.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: return only the maps, without the final features [B, H, W, C].

        Raises:
            ValueError: if output_fmt is unknown.
        """
        check_output_fmt(output_fmt)
        take, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early else self.stages
        intermediates = []
        x = self.patch_embed(x)
        for index, stage in enumerate(stages):
            x = stage.forward_blocks(x)
            if index in take:
                is_final = index == len(self.stages) - 1
                intermediates.append(self.format_intermediate(x, norm and is_final, output_fmt))
            if stage.downsample is not None and index < len(stages) - 1:
                x = stage.downsample(x)
        if intermediates_only:
            return intermediates
        return self.norm(x) if len(stages) == len(self.stages) else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last requested one, and optionally the norm and the classifier."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.add_module(self.stages_name, self.stages[: last + 1])
        self.stages[-1].downsample = None
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        self.prune_end(prune_norm, prune_head)
        return take

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Compute the final, normalized feature map [B, H/32, W/32, num_features]."""
        x_BHWC = self.patch_embed(x_BCHW)
        for stage in self.stages:
            x_BHWC = stage(x_BHWC)
        return self.norm(x_BHWC)


class NAT(HierarchicalTransformer):
    """Neighborhood Attention Transformer; arguments as in HierarchicalTransformer."""

    tokenizer_cls = ConvTokenizer
    downsampler_cls = ConvDownsampler
    stages_name = "levels"
    levels: nn.ModuleList


class DiNAT(NAT):
    """Dilated Neighborhood Attention Transformer: the layers of NAT; the registered models set `dilations`."""


class DiNAT_s(HierarchicalTransformer):
    """Dilated Neighborhood Attention Transformer with the layout of Swin; arguments as in HierarchicalTransformer."""

    tokenizer_cls = PatchEmbed
    downsampler_cls = PatchMerging
    stages_name = "layers"
    layers: nn.ModuleList


# ---------------------------------------------------------------------------------------------------------------------
# Published weights
# ---------------------------------------------------------------------------------------------------------------------

default_cfgs = {
    **make_default_cfgs(
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
    ),
    **make_default_cfgs(
        (
            "dinat_s_tiny.in1k",
            "dinat_s_small.in1k",
            "dinat_s_base.in1k",
            "dinat_s_large.in22k_ft_in1k",
            "dinat_s_large_384.in22k_ft_in1k",
            "dinat_s_large_21k.in22k",
        ),
        first_conv="patch_embed.proj",
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Sizes: constructor arguments by registered name
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

NAT_SIZES: dict[str, dict[str, Any]] = {
    "nat_mini": _MINI,
    "nat_tiny": _TINY,
    "nat_small": {**_SMALL, "layer_scale": 1e-5},
    "nat_base": _BASE,
}

DINAT_SIZES: dict[str, dict[str, Any]] = {
    "dinat_mini": {**_MINI, "dilations": _DILATIONS_224_MINI},
    "dinat_tiny": {**_TINY, "dilations": _DILATIONS_224},
    "dinat_small": {**_SMALL, "dilations": _DILATIONS_224},  # no layer scale, unlike nat_small
    "dinat_base": {**_BASE, "dilations": _DILATIONS_224},
    "dinat_large": {**_LARGE, "dilations": _DILATIONS_224},
    "dinat_large_384": {**_LARGE, "dilations": _DILATIONS_384},
    "dinat_large_384_11x11": {**_LARGE, "dilations": _DILATIONS_224, "kernel_size": 11},
    "dinat_large_21k": {**_LARGE_21K, "dilations": _DILATIONS_224},
    "dinat_large_21k_11x11": {**_LARGE_21K, "dilations": _DILATIONS_224, "kernel_size": 11},
}

_S_TINY = {
    "depths": (2, 2, 6, 2),
    "num_heads": (3, 6, 12, 24),
    "embed_dim": 96,
    "mlp_ratio": 4.0,
    "drop_path_rate": 0.2,
    "dilations": ([1, 8], [1, 4], [1, 2] * 3, [1, 1]),
}
_S_SMALL = {
    **_S_TINY,
    "depths": (2, 2, 18, 2),
    "drop_path_rate": 0.3,
    "dilations": ([1, 8], [1, 4], [1, 2] * 9, [1, 1]),
}
_S_LARGE = {**_S_SMALL, "num_heads": (6, 12, 24, 48), "embed_dim": 192, "drop_path_rate": 0.35}

DINAT_S_SIZES: dict[str, dict[str, Any]] = {
    "dinat_s_tiny": _S_TINY,
    "dinat_s_small": _S_SMALL,
    "dinat_s_base": {**_S_SMALL, "num_heads": (4, 8, 16, 32), "embed_dim": 128, "drop_path_rate": 0.5},
    "dinat_s_large": _S_LARGE,
    "dinat_s_large_384": {**_S_LARGE, "dilations": ([1, 13], [1, 6], [1, 3] * 9, [1, 1])},
    "dinat_s_large_21k": {**_S_LARGE, "drop_path_rate": 0.2},
}


# ---------------------------------------------------------------------------------------------------------------------
# Registered models
# ---------------------------------------------------------------------------------------------------------------------


def _create_nat(variant: str, pretrained: bool = False, **kwargs: Any) -> NAT:
    return build(NAT, variant, pretrained, default_out_indices=(0, 1, 2, 3), **{**NAT_SIZES[variant], **kwargs})


def _create_dinat(variant: str, pretrained: bool = False, **kwargs: Any) -> DiNAT:
    return build(DiNAT, variant, pretrained, default_out_indices=(0, 1, 2, 3), **{**DINAT_SIZES[variant], **kwargs})


def _create_dinat_s(variant: str, pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    return build(DiNAT_s, variant, pretrained, default_out_indices=(0, 1, 2, 3), **{**DINAT_S_SIZES[variant], **kwargs})


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
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """DiNAT-Mini: 20M parameters, 2.7 GMACs."""
    return _create_dinat("dinat_mini", pretrained, **kwargs)


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """DiNAT-Tiny: 28M parameters, 4.3 GMACs."""
    return _create_dinat("dinat_tiny", pretrained, **kwargs)


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """DiNAT-Small: 51M parameters, 7.8 GMACs; no layer scale, unlike NAT-Small."""
    return _create_dinat("dinat_small", pretrained, **kwargs)


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """DiNAT-Base: 90M parameters, 13.7 GMACs."""
    return _create_dinat("dinat_base", pretrained, **kwargs)


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """DiNAT-Large: 200M parameters, 30.6 GMACs."""
    return _create_dinat("dinat_large", pretrained, **kwargs)


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """DiNAT-Large with dilations for 384x384 images: 200M parameters, 89.7 GMACs."""
    return _create_dinat("dinat_large_384", pretrained, **kwargs)


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """DiNAT-Large with 11x11 windows for 384x384 images: 201M parameters, 92.4 GMACs."""
    return _create_dinat("dinat_large_384_11x11", pretrained, **kwargs)


@register_model
def dinat_large_21k(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """DiNAT-Large for ImageNet-22K."""
    return _create_dinat("dinat_large_21k", pretrained, **kwargs)


@register_model
def dinat_large_21k_11x11(pretrained: bool = False, **kwargs: Any) -> DiNAT:
    """DiNAT-Large for ImageNet-22K, bias resized to 11x11 windows, for fine-tuning on larger images."""
    return _create_dinat("dinat_large_21k_11x11", pretrained, **kwargs)


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
    """DiNAT_s-Large with dilations for 384x384 images: 197M parameters, 101.5 GMACs."""
    return _create_dinat_s("dinat_s_large_384", pretrained, **kwargs)


@register_model
def dinat_s_large_21k(pretrained: bool = False, **kwargs: Any) -> DiNAT_s:
    """DiNAT_s-Large for ImageNet-22K."""
    return _create_dinat_s("dinat_s_large_21k", pretrained, **kwargs)
