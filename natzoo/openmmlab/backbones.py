"""NAT, DiNAT and DiNAT_s as backbones for mmdet and mmseg: the models of natzoo.models, with a norm on each map given.

Parameters are named as in the published detectors and segmenters: those of the classifier without its `norm` and
`head`, and norm0 to norm3.
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
    """Makes a backbone of a HierarchicalTransformer: images [B, 3, H, W] -> feature maps [B, C, H/s, W/s].

    Maps are taken before each downsampler, s being 4, 8, 16, 32, and normalised.

    Args:
        arch: a registered model whose sizes are taken, such as "nat_tiny"; others given beside it win,
            except depths, num_heads and embed_dim.
        out_indices: which maps, ascending.
        frozen_stages: -1 trains all; 0 keeps the tokenizer as it is, n also the first n stages and the norms of their
            maps: without gradient, and in eval mode.
        with_cp: whether to save memory by computing blocks again in the backward pass.
        pretrained: short for init_cfg=dict(type="Pretrained", checkpoint=pretrained).
        init_cfg: where the first weights come from, as everywhere in mmengine. For "Pretrained" the checkpoint is what
            natzoo.checkpoints.locate takes: a published name, a path, a URL, or "hf-hub:OWNER/NAME"; of a classifier,
            or of a detector or segmenter, whose backbone is taken.
        sizes: of the model's constructor: depths, num_heads, embed_dim, kernel_size, dilations, drop_path_rate, ...

    Raises:
        ValueError: if such sizes are given beside arch; if arch, out_indices or frozen_stages are none that the model
            has.
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
            known = ", ".join(self.archs)
            raise ValueError(f"arch is {arch!r}, but a backbone of type {type(self).__name__} is one of {known}.")
        # With other depths or widths than its own, a name would tell nothing; they come with a base config unseen.
        both = sorted({"depths", "num_heads", "embed_dim"} & sizes.keys()) if arch is not None else []
        if both:
            raise ValueError(
                f"arch is {arch!r}, but {', '.join(both)} are given beside it: leave one of the two out; in a config, "
                "_delete_=True drops what its base has."
            )
        super().__init__(**{**self.archs.get(arch, {}), **sizes, "num_classes": 0})
        self.prune_end(prune_norm=True, prune_head=True)
        stages = len(self.stages)
        if list(out_indices) != sorted({index for index in out_indices if 0 <= index < stages}):
            raise ValueError(f"out_indices is {out_indices}, but must be ascending numbers of 0 to {stages - 1}.")
        if not -1 <= frozen_stages <= stages:
            raise ValueError(f"frozen_stages is {frozen_stages}, but must be between -1 and {stages}.")
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        for index in self.out_indices:
            self.add_module(f"norm{index}", nn.LayerNorm(self.feature_info[index]["num_chs"]))
        self.init_cfg = {"type": "Pretrained", "checkpoint": pretrained} if pretrained else init_cfg
        self.set_grad_checkpointing(with_cp)
        self._leave_out_unused()
        self._freeze()

    def init_weights(self) -> None:
        """Loads or draws the first weights as init_cfg says; without it they stay as the constructor drew them.

        Raises:
            ValueError: if a checkpoint is of another backbone; FileNotFoundError, DownloadError: if it is not there.
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
        super().train(mode)
        self._freeze()
        return self

    def _leave_out_unused(self) -> None:
        """No gradient for what is behind the last map, which several processes would wait for."""
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
        maps = self.forward_intermediates(
            x_BCHW, self.out_indices, stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        norms = [getattr(self, f"norm{index}") for index in self.out_indices]
        return tuple(to_nchw(norm(x_BHWC)).contiguous() for norm, x_BHWC in zip(norms, maps, strict=True))


@MODELS.register_module(name=["NAT", "DiNAT"])
class NAT(Backbone, models.NAT):
    """NAT, and with dilations DiNAT."""

    archs: ClassVar = {**NAT_SIZES, **DINAT_SIZES}


@MODELS.register_module(name="DiNAT_s")
class DiNAT_s(Backbone, models.DiNAT_s):
    """DiNAT_s."""

    archs = DINAT_S_SIZES
