"""The end of every model, and the part of timm's contract that is about it."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from natzoo.checkpoints import load_weights, read_weights
from natzoo.models.layers import check_pooling, init_linear, to_nchw

log = logging.getLogger("natzoo")


def check_output_fmt(output_fmt: str) -> None:
    """Raises ValueError unless it is one that `forward_intermediates` knows."""
    if output_fmt not in ("NCHW", "NHWC"):
        raise ValueError(f"output_fmt is {output_fmt!r}, but must be 'NCHW' or 'NHWC'.")


class Classifier(nn.Module):
    """A model whose `forward_features` gives a normalised feature map [B, H, W, num_features].

    The mean of the map's tokens, dropout and a linear layer make logits [B, num_classes] of it. A subclass calls
    `make_classifier` at the end of its constructor.
    """

    num_features: int
    output_fmt = "NHWC"

    def make_classifier(self, num_classes: int, global_pool: str, drop_rate: float, **dd: Any) -> None:
        """Raises ValueError unless `global_pool` is "avg", or "" to classify each token."""
        check_pooling(global_pool)
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.head_hidden_size = self.num_features
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

    @torch.jit.ignore
    def load_pretrained(self, path: str, prefix: str = "") -> None:
        """Loads a file of weights, as timm asks for with `pretrained=True`; another number of classes starts anew."""
        for note in load_weights(self, read_weights(path), path, new_classifier=True):
            log.warning("%s: %s", path, note)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith("rpb")}

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one; its pooling too if given."""
        weight = self.patch_embed.norm.weight
        global_pool = self.global_pool if global_pool is None else global_pool
        self.make_classifier(num_classes, global_pool, self.head_drop.p, device=weight.device, dtype=weight.dtype)
        self.head.apply(init_linear)

    def forward_head(self, x_BHWC: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, num_classes] of a final feature map; the pooled features with pre_logits."""
        x = x_BHWC.mean((1, 2)) if self.global_pool == "avg" else x_BHWC
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def make_intermediate(self, x_BHWC: Tensor, norm: bool, output_fmt: str) -> Tensor:
        """A feature map as `forward_intermediates` gives it."""
        feature = self.norm(x_BHWC) if norm else x_BHWC
        return to_nchw(feature).contiguous() if output_fmt == "NCHW" else feature

    def prune_end(self, prune_norm: bool, prune_head: bool) -> None:
        """Removes what stands behind the last stage, for `prune_intermediate_layers`."""
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.num_classes = 0
            self.head = nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x_BCHW))
