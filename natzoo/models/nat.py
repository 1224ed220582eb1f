"""NAT and DiNAT: hierarchical transformers with (dilated) neighborhood attention.

Papers:
    Neighborhood Attention Transformer, Hassani et al., CVPR 2023 (arXiv:2204.07143): overlapping convolutions make the
    tokens and halve the map between stages; every token attends to its 7x7 neighbourhood.
    Dilated Neighborhood Attention Transformer, Hassani and Shi, 2022 (arXiv:2209.15001): the same network with dilated
    windows in every other block.

A DiNAT is a NAT with `dilations`; dilations have no parameters. The published weights load as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from natzoo.models.layers import NeighborhoodBlock, check_dilations, drop_path_rates, init_linear, to_nchw, to_nhwc

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


class NATStage(nn.Module):
    """Blocks at one resolution, then the downsampler to the next; the last stage has none."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        dilations: Sequence[int],
        drop_path: Sequence[float],
        downsample: bool,
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
        self.downsample = ConvDownsampler(dim, **dd) if downsample else None

    def forward_blocks(self, x_BHWC: Tensor) -> Tensor:
        """The stage's feature map, before downsampling."""
        for block in self.blocks:
            recompute = self.grad_checkpointing and self.training and not torch.jit.is_scripting()
            x_BHWC = checkpoint(block, x_BHWC) if recompute else block(x_BHWC)
        return x_BHWC

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = self.forward_blocks(x_BHWC)
        return x_BHWC if self.downsample is None else self.downsample(x_BHWC)


class NAT(nn.Module):
    """Neighborhood Attention Transformer; with `dilations`, Dilated Neighborhood Attention Transformer.

    Takes images [B, in_chans, H, W] of any size and returns logits [B, num_classes].

    Args:
        in_chans: channels of the image.
        num_classes: classes; 0 for no classifier.
        global_pool: "avg", or "" to classify each token.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        embed_dim: channels of the first stage; each further one has twice as many.
        kernel_size: window, in tokens.
        dilations: one dilation a block, as one list a stage; None for 1 everywhere.
        mlp_ratio: hidden channels of the MLPs, as a multiple of the stage's.
        qkv_bias: whether the qkv projections have a bias.
        drop_rate: dropout rate before the classifier.
        proj_drop_rate: dropout rate after the projections of attention and MLP.
        attn_drop_rate: dropout rate on attention weights.
        drop_path_rate: rate of stochastic depth at the last block, rising linearly from 0.
        layer_scale: initial value of the learned factor on each branch; None for none.

    Raises:
        ValueError: where depths, num_heads and dilations do not fit each other.
    """

    output_fmt = "NHWC"

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
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        if len(num_heads) != len(depths):
            raise ValueError(f"num_heads has {len(num_heads)} stages, but depths has {len(depths)}.")
        dilations = check_dilations(dilations, depths)
        _check_pooling(global_pool)
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = embed_dim * 2 ** (len(depths) - 1)
        self.feature_info: list[dict[str, Any]] = []

        self.patch_embed = ConvTokenizer(in_chans, embed_dim, **dd)
        self.levels = nn.ModuleList()
        rates = drop_path_rates(drop_path_rate, depths)
        for stage in range(len(depths)):
            dim = embed_dim * 2**stage
            self.levels.append(
                NATStage(
                    dim,
                    num_heads[stage],
                    dilations[stage],
                    rates[stage],
                    downsample=stage < len(depths) - 1,
                    kernel_size=kernel_size,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    layer_scale=layer_scale,
                    **dd,
                )
            )
            self.feature_info.append({"num_chs": dim, "reduction": 4 * 2**stage, "module": f"levels.{stage}"})
        self.norm = nn.LayerNorm(self.num_features, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(**dd)
        self.apply(init_linear)

    def _make_head(self, **dd: Any) -> nn.Module:
        return nn.Linear(self.num_features, self.num_classes, **dd) if self.num_classes > 0 else nn.Identity()

    # ----- timm's contract --------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("rpb")}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        blocks = r"^levels\.(\d+)"
        if not coarse:
            blocks = [
                (r"^levels\.(\d+)\.blocks\.(\d+)", None),
                (r"^levels\.(\d+)\.downsample", (99999,)),  # with the block before it
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^patch_embed", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for level in self.levels:
            level.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one; its pooling too if given."""
        self.num_classes = num_classes
        if global_pool is not None:
            _check_pooling(global_pool)
            self.global_pool = global_pool
        weight = self.patch_embed.norm.weight
        self.head = self._make_head(device=weight.device, dtype=weight.dtype)
        self.head.apply(init_linear)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of chosen stages, before each downsampler, at 1/4, 1/8, 1/16 and 1/32 of the image.

        Args:
            x: images [B, in_chans, H, W].
            indices: the last n stages, or these stages; None for all.
            norm: whether the last stage's map goes through the final norm.
            stop_early: whether to stop after the last stage asked for.
            output_fmt: "NCHW" or "NHWC".
            intermediates_only: whether to return the maps alone, not also the final features [B, H, W, C].

        Raises:
            ValueError: on another output_fmt.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt is {output_fmt!r}, but must be 'NCHW' or 'NHWC'.")
        take, last = feature_take_indices(len(self.levels), indices)
        levels = self.levels[: last + 1] if stop_early else self.levels
        intermediates = []
        x = self.patch_embed(x)
        for index, level in enumerate(levels):
            x = level.forward_blocks(x)
            if index in take:
                is_final = index == len(self.levels) - 1
                feature = self.norm(x) if norm and is_final else x
                intermediates.append(to_nchw(feature).contiguous() if output_fmt == "NCHW" else feature)
            if level.downsample is not None and index < len(levels) - 1:
                x = level.downsample(x)
        if intermediates_only:
            return intermediates
        return self.norm(x) if len(levels) == len(self.levels) else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last one asked for, and with it what stands behind."""
        take, last = feature_take_indices(len(self.levels), indices)
        self.levels = self.levels[: last + 1]
        self.levels[-1].downsample = None
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.num_classes = 0
            self.head = nn.Identity()
        return take

    # ----- forward ----------------------------------------------------------------------------------------------------

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Final feature map [B, H/32, W/32, num_features], normalised."""
        x_BHWC = self.patch_embed(x_BCHW)
        for level in self.levels:
            x_BHWC = level(x_BHWC)
        return self.norm(x_BHWC)

    def forward_head(self, x_BHWC: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, num_classes] of a final feature map; the pooled features with pre_logits."""
        x = x_BHWC.mean((1, 2)) if self.global_pool == "avg" else x_BHWC
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x_BCHW))


def _check_pooling(global_pool: str) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool is {global_pool!r}, but must be 'avg' or ''.")


def _create_nat(variant: str, pretrained: bool = False, **kwargs: Any) -> NAT:
    return build_model_with_cfg(
        NAT,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **kwargs,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Published weights
# ---------------------------------------------------------------------------------------------------------------------


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "license": "mit",
        **kwargs,
    }


def _cfg_384(url: str) -> dict[str, Any]:
    return _cfg(url, input_size=(3, 384, 384), pool_size=(12, 12), crop_pct=1.0)


_NAT_URL = "https://shi-labs.com/projects/nat/checkpoints/CLS/"
_DINAT_URL = "https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/"

default_cfgs = generate_default_cfgs(
    {
        "nat_mini.in1k": _cfg(_NAT_URL + "nat_mini.pth"),
        "nat_tiny.in1k": _cfg(_NAT_URL + "nat_tiny.pth"),
        "nat_small.in1k": _cfg(_NAT_URL + "nat_small.pth"),
        "nat_base.in1k": _cfg(_NAT_URL + "nat_base.pth"),
        "dinat_mini.in1k": _cfg(_DINAT_URL + "dinat_mini_in1k_224.pth"),
        "dinat_tiny.in1k": _cfg(_DINAT_URL + "dinat_tiny_in1k_224.pth"),
        "dinat_small.in1k": _cfg(_DINAT_URL + "dinat_small_in1k_224.pth"),
        "dinat_base.in1k": _cfg(_DINAT_URL + "dinat_base_in1k_224.pth"),
        "dinat_large.in22k_ft_in1k": _cfg(_DINAT_URL + "dinat_large_in22k_in1k_224.pth"),
        "dinat_large_384.in22k_ft_in1k": _cfg_384(_DINAT_URL + "dinat_large_in22k_in1k_384.pth"),
        "dinat_large_384_11x11.in22k_ft_in1k": _cfg_384(_DINAT_URL + "dinat_large_in22k_in1k_384_11x11.pth"),
    }
)


# ---------------------------------------------------------------------------------------------------------------------
# Registered models
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
_BASE = {
    "depths": (3, 4, 18, 5),
    "num_heads": (4, 8, 16, 32),
    "embed_dim": 128,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.5,
}
_LARGE = {
    "depths": (3, 4, 18, 5),
    "num_heads": (6, 12, 24, 48),
    "embed_dim": 192,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.35,
}

_DILATIONS_224_MINI = ([1, 8, 1], [1, 4] * 2, [1, 2] * 3, [1] * 5)
_DILATIONS_224 = ([1, 8, 1], [1, 4] * 2, [1, 2] * 9, [1] * 5)
_DILATIONS_384 = ([1, 13, 1], [1, 6] * 2, [1, 3] * 9, [1] * 5)


@register_model
def nat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Mini: 20M parameters, 2.7 GMACs."""
    return _create_nat("nat_mini", pretrained, **{**_MINI, **kwargs})


@register_model
def nat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Tiny: 28M parameters, 4.3 GMACs."""
    return _create_nat("nat_tiny", pretrained, **{**_TINY, **kwargs})


@register_model
def nat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Small: 51M parameters, 7.8 GMACs."""
    return _create_nat("nat_small", pretrained, **{**_SMALL, "layer_scale": 1e-5, **kwargs})


@register_model
def nat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """NAT-Base: 90M parameters, 13.7 GMACs."""
    return _create_nat("nat_base", pretrained, **{**_BASE, "layer_scale": 1e-5, **kwargs})


@register_model
def dinat_mini(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Mini: 20M parameters, 2.7 GMACs."""
    return _create_nat("dinat_mini", pretrained, **{**_MINI, "dilations": _DILATIONS_224_MINI, **kwargs})


@register_model
def dinat_tiny(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Tiny: 28M parameters, 4.3 GMACs."""
    return _create_nat("dinat_tiny", pretrained, **{**_TINY, "dilations": _DILATIONS_224, **kwargs})


@register_model
def dinat_small(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Small: 51M parameters, 7.8 GMACs; without layer scale, unlike NAT-Small."""
    return _create_nat("dinat_small", pretrained, **{**_SMALL, "dilations": _DILATIONS_224, **kwargs})


@register_model
def dinat_base(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Base: 90M parameters, 13.7 GMACs."""
    return _create_nat(
        "dinat_base", pretrained, **{**_BASE, "layer_scale": 1e-5, "dilations": _DILATIONS_224, **kwargs}
    )


@register_model
def dinat_large(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large: 200M parameters, 30.6 GMACs."""
    return _create_nat("dinat_large", pretrained, **{**_LARGE, "dilations": _DILATIONS_224, **kwargs})


@register_model
def dinat_large_384(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large with dilations for 384x384 images: 89.7 GMACs."""
    return _create_nat("dinat_large_384", pretrained, **{**_LARGE, "dilations": _DILATIONS_384, **kwargs})


@register_model
def dinat_large_384_11x11(pretrained: bool = False, **kwargs: Any) -> NAT:
    """DiNAT-Large with 11x11 windows for 384x384 images: 92.4 GMACs."""
    return _create_nat(
        "dinat_large_384_11x11", pretrained, **{**_LARGE, "dilations": _DILATIONS_224, "kernel_size": 11, **kwargs}
    )
