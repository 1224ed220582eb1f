"""What hierarchical models share: stages of blocks, each map half the size of the one before, and timm's contract.

A family (nat.py, dinat_s.py) says how an image becomes tokens and how maps are halved; the rest is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from natzoo.models.classifier import Classifier, check_output_fmt
from natzoo.models.layers import NeighborhoodBlock, check_dilations, drop_path_rates, init_linear, run_blocks


class Stage(nn.Module):
    """Blocks at one resolution, then the downsampler to the next; the last stage has none."""

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
        """The stage's feature map, before downsampling."""
        return run_blocks(self.blocks, x_BHWC, self.grad_checkpointing)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = self.forward_blocks(x_BHWC)
        return x_BHWC if self.downsample is None else self.downsample(x_BHWC)


class HierarchicalTransformer(Classifier):
    """Tokens, stages of blocks with (dilated) neighborhood attention, the mean of all tokens, and a classifier.

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

    Families define `stages_name`, the attribute that holds the stages in their published weights,
    `make_tokenizer(in_chans, dim)` and `make_downsampler(dim)`, modules [B, in_chans, H, W] -> [B, H/4, W/4, dim] and
    [B, H, W, dim] -> [B, H/2, W/2, 2 dim], sizes rounded up.
    """

    stages_name: str
    make_tokenizer: Callable[..., nn.Module]
    make_downsampler: Callable[..., nn.Module]

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
        self.num_features = embed_dim * 2 ** (len(depths) - 1)
        self.feature_info: list[dict[str, Any]] = []

        self.patch_embed = self.make_tokenizer(in_chans, embed_dim, **dd)
        stages = nn.ModuleList()
        self.add_module(self.stages_name, stages)
        rates = drop_path_rates(drop_path_rate, depths)
        for stage in range(len(depths)):
            dim = embed_dim * 2**stage
            is_last = stage == len(depths) - 1
            stages.append(
                Stage(
                    dim,
                    num_heads[stage],
                    dilations[stage],
                    rates[stage],
                    downsample=None if is_last else self.make_downsampler(dim, **dd),
                    kernel_size=kernel_size,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    layer_scale=layer_scale,
                    **dd,
                )
            )
            info = {"num_chs": dim, "reduction": 4 * 2**stage, "module": f"{self.stages_name}.{stage}"}
            self.feature_info.append(info)
        self.norm = nn.LayerNorm(self.num_features, **dd)
        self.make_classifier(num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)

    @property
    def stages(self) -> nn.ModuleList:
        return getattr(self, self.stages_name)

    # ----- timm's contract --------------------------------------------------------------------------------------------

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        stage = rf"^{self.stages_name}\.(\d+)"
        blocks = stage
        if not coarse:
            blocks = [
                (stage + r"\.blocks\.(\d+)", None),
                (stage + r"\.downsample", (99999,)),  # with the block before it
                (r"^norm", (99999,)),
            ]
        return {"stem": r"^patch_embed", "blocks": blocks}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
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
        check_output_fmt(output_fmt)
        take, last = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last + 1] if stop_early else self.stages
        intermediates = []
        x = self.patch_embed(x)
        for index, stage in enumerate(stages):
            x = stage.forward_blocks(x)
            if index in take:
                is_final = index == len(self.stages) - 1
                intermediates.append(self.make_intermediate(x, norm and is_final, output_fmt))
            if stage.downsample is not None and index < len(stages) - 1:
                x = stage.downsample(x)
        if intermediates_only:
            return intermediates
        return self.norm(x) if len(stages) == len(self.stages) else x, intermediates

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the stages after the last one asked for, and with it what stands behind."""
        take, last = feature_take_indices(len(self.stages), indices)
        setattr(self, self.stages_name, self.stages[: last + 1])
        self.stages[-1].downsample = None
        self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        self.prune_end(prune_norm, prune_head)
        return take

    # ----- forward ----------------------------------------------------------------------------------------------------

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Final feature map [B, H/32, W/32, num_features], normalised."""
        x_BHWC = self.patch_embed(x_BCHW)
        for stage in self.stages:
            x_BHWC = stage(x_BHWC)
        return self.norm(x_BHWC)
