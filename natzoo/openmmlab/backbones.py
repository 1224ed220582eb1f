"""NAT, DiNAT and DiNAT_s as backbones for mmdet and mmseg.

Each is a model of natzoo.models with a LayerNorm on each output map. Parameter names are those of the published
detectors and segmenters: those of the classifier without `norm` and `head`, plus `norm0` to `norm3`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from mmengine.logging import print_log
from mmengine.model import initialize
from mmengine.registry import MODELS
from torch import Tensor, nn

from natzoo import models
from natzoo.checkpoints import load_weights, locate, read_weights
from natzoo.models._layers import to_nchw
from natzoo.models.nat import DINAT_S_SIZES, DINAT_SIZES, NAT_SIZES


class Backbone:
    """Mixin that turns a hierarchical model of natzoo.models into a backbone.

    Input: images [B, 3, H, W]. Output: one feature map [B, C, H/s, W/s] per entry of `out_indices`, with s = 4, 8, 16,
    32, taken before the stage's downsampler and normalized.

    Args:
        arch: registered model that provides the constructor arguments, such as "nat_tiny". Further arguments override
            it, except `depths`, `num_heads` and `embed_dim`, which cannot be combined with `arch`.
        out_indices: stages whose maps are returned, in ascending order.
        frozen_stages: -1 trains everything, 0 freezes the patch embedding, n also freezes the first n stages and the
            norms of their maps. Frozen parts need no gradient and stay in eval mode.
        with_cp: save memory by recomputing blocks in the backward pass (gradient checkpointing).
        pretrained: shorthand for `init_cfg=dict(type="Pretrained", checkpoint=pretrained)`.
        init_cfg: weight initialization, as for any model of mmengine. For "Pretrained", the checkpoint is anything that
            natzoo.checkpoints.locate accepts: a published name, a path, a URL or "hf-hub:OWNER/NAME". Only the backbone
            of a detector or segmenter is loaded.
        sizes: other constructor arguments of the model: depths, num_heads, embed_dim, kernel_size, dilations,
            drop_path_rate, ...

    Raises:
        ValueError: if `arch`, `out_indices` or `frozen_stages` does not fit the model, or if `arch` is combined with
            depths, num_heads or embed_dim.

    Subclasses define:
        archs: constructor arguments by registered name.
    """

    archs: ClassVar[Mapping[str, Mapping[str, Any]]]

    def __init__(
        self,
        arch: str | None = None,
        *,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        with_cp: bool = False,
        pretrained: str | None = None,
        init_cfg: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        **sizes: Any,
    ):
        if arch is not None and arch not in self.archs:
            raise ValueError(
                f"arch = {arch!r} is not a {type(self).__name__} model; use one of {', '.join(self.archs)}."
            )
        # A base config may set them unnoticed; `arch` would then name another model than the one built.
        conflicts = sorted({"depths", "num_heads", "embed_dim"} & sizes.keys()) if arch is not None else []
        if conflicts:
            raise ValueError(
                f"arch = {arch!r} cannot be combined with {', '.join(conflicts)}; remove one of the two. In a config, "
                "_delete_=True drops the settings of the base config."
            )
        super().__init__(**{**self.archs.get(arch, {}), **sizes, "num_classes": 0})
        self.prune_end(prune_norm=True, prune_head=True)
        stages = len(self.stages)
        if list(out_indices) != sorted({index for index in out_indices if 0 <= index < stages}):
            raise ValueError(f"out_indices = {out_indices} must be ascending stage numbers from 0 to {stages - 1}.")
        if not -1 <= frozen_stages <= stages:
            raise ValueError(f"frozen_stages = {frozen_stages} must be between -1 and {stages}.")
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        for index in self.out_indices:
            self.add_module(f"norm{index}", nn.LayerNorm(self.feature_info[index]["num_chs"]))
        self.init_cfg = {"type": "Pretrained", "checkpoint": pretrained} if pretrained else init_cfg
        self.set_grad_checkpointing(with_cp)
        self._disable_unused()
        self._freeze()

    def init_weights(self) -> None:
        """Initialize or load the weights according to `init_cfg`; without `init_cfg`, keep them unchanged.

        Raises:
            ValueError: if the checkpoint belongs to another model.
            FileNotFoundError: if the checkpoint does not exist.
            DownloadError: if the checkpoint cannot be downloaded.
        """
        if not self.init_cfg:
            return
        if not isinstance(self.init_cfg, Mapping) or self.init_cfg["type"] != "Pretrained":
            initialize(self, self.init_cfg)
            return
        path = locate(self.init_cfg["checkpoint"])
        for note in load_weights(self, read_weights(path), path):
            print_log(f"{path}: {note}", logger="current", level=logging.INFO)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, except for frozen stages, which stay in eval mode."""
        super().train(mode)
        self._freeze()
        return self

    def _disable_unused(self) -> None:
        # Distributed training would wait for gradients of layers that no output map depends on.
        last = max(self.out_indices, default=-1)
        self.stages[last + 1 :].requires_grad_(False)
        if self.stages[last].downsample is not None:
            self.stages[last].downsample.requires_grad_(False)

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen = [self.patch_embed, *self.stages[: self.frozen_stages]]
        frozen += [getattr(self, f"norm{index}") for index in self.out_indices if index < self.frozen_stages]
        for module in frozen:
            nn.Module.train(module, False)
            module.requires_grad_(False)

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        """Return the normalized, contiguous feature maps [B, C, H/s, W/s] of the stages in `out_indices`."""
        maps = self.forward_intermediates(
            x_BCHW, self.out_indices, stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        norms = [getattr(self, f"norm{index}") for index in self.out_indices]
        return tuple(to_nchw(norm(x_BHWC)).contiguous() for norm, x_BHWC in zip(norms, maps, strict=True))


@MODELS.register_module(name=["NAT", "DiNAT"])
class NAT(Backbone, models.NAT):
    """NAT backbone, or DiNAT if `dilations` are given."""

    archs: ClassVar = {**NAT_SIZES, **DINAT_SIZES}


@MODELS.register_module(name="DiNAT_s")
class DiNAT_s(Backbone, models.DiNAT_s):
    """DiNAT_s backbone."""

    archs = DINAT_S_SIZES
