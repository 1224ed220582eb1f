"""Export natzoo's models to transformers: configuration, model and image processor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo
from torch import nn
from transformers import BitImageProcessor
from transformers.image_utils import PILImageResampling

from natzoo.checkpoints import zoo_entries
from natzoo.hf.configuration import LAYOUTS, DinatConfig, NatConfig
from natzoo.hf.modeling import DinatForImageClassification, Encoder, NatForImageClassification
from natzoo.models import NAT, DiNAT, DiNAT_s, Isotropic
from natzoo.models.isotropic import BiasedAttention

_LAYOUT_OF = {NAT: "nat", DiNAT: "nat", DiNAT_s: "dinat_s", Isotropic: "isotropic"}
_IMAGENET_CLASSES = 1000


def from_timm(model: NAT | DiNAT_s | Isotropic) -> NatForImageClassification:
    """Convert a classifier to transformers: Dinat if it has dilations, else Nat.

    The configuration of the result stores only two dropout rates, one for attention and one for everything else.

    Returns:
        A model that shares its layers with `model`.

    Raises:
        ValueError: if `model` is not a complete classifier of natzoo with average pooling.
    """
    config = make_config(model)
    with torch.device("meta"):  # all layers with weights are replaced below
        result = (DinatForImageClassification if isinstance(config, DinatConfig) else NatForImageClassification)(config)
    base = result.base_model
    base.embeddings, base.encoder, base.layernorm = model.patch_embed, Encoder(model), model.norm
    result.classifier = model.head
    return result.train(model.training)


def make_config(model: NAT | DiNAT_s | Isotropic) -> NatConfig:
    """Return the configuration for a classifier of natzoo; raises as `from_timm`."""
    layout = _LAYOUT_OF.get(type(model))
    if layout is None or not isinstance(model.norm, nn.LayerNorm) or model.global_pool != "avg":
        raise ValueError(
            f"model is a {type(model).__name__}, not a complete classifier of natzoo with average pooling; create it "
            "with timm.create_model(NAME)."
        )
    stages = [list(level.blocks) for level in Encoder(model).levels]
    attention = stages[0][0].attn
    fields = {
        "layout": layout,
        "patch_size": LAYOUTS[layout],
        "num_channels": _first_convolution(model).in_channels,
        "embed_dim": stages[0][0].norm1.normalized_shape[0],
        "depths": [len(blocks) for blocks in stages],
        "num_heads": [blocks[0].attn.num_heads for blocks in stages],
        "num_labels": model.num_classes,
        **_block_fields(stages[-1][-1]),
        **_labels(model.num_classes),
    }
    if isinstance(attention, BiasedAttention):
        sides = [LAYOUTS[layout] * (side // 2 + 1) for side in attention.rpb.shape[1:]]
        return NatConfig(kernel_size=None, image_size=sides, **fields)
    dilations = [[block.attn.dilation[0] for block in blocks] for blocks in stages]
    fields["kernel_size"] = attention.kernel_size[0]
    if getattr(model, "pretrained_cfg", None):
        height, width = model.pretrained_cfg["input_size"][1:]
        fields["image_size"] = height if height == width else [height, width]
    if all(dilation == 1 for stage in dilations for dilation in stage):
        return NatConfig(**fields)
    return DinatConfig(dilations=dilations, **fields)


def _first_convolution(model: nn.Module) -> nn.Conv2d:
    return next(module for module in model.patch_embed.modules() if isinstance(module, nn.Conv2d))


def _block_fields(block: nn.Module) -> dict[str, Any]:
    """Return the fields that all blocks share, from the last block, which has the highest drop path rate."""
    return {
        "mlp_ratio": block.mlp.fc1.out_features / block.mlp.fc1.in_features,
        "qkv_bias": block.attn.qkv.bias is not None,
        "hidden_dropout_prob": block.mlp.drop2.p,
        "attention_probs_dropout_prob": block.attn.proj_drop.p,
        "drop_path_rate": getattr(block.drop_path, "drop_prob", 0.0),
        "layer_scale_init_value": 0.0 if block.gamma1 is None else 1e-5,
        "layer_norm_eps": block.norm1.eps,
    }


def _labels(classes: int) -> dict[str, Any]:
    """Return the fields with the class names of ImageNet-1K if the number of classes matches, else none."""
    if classes != _IMAGENET_CLASSES:
        return {}
    info = ImageNetInfo("imagenet-1k")
    names = {index: info.index_to_description(index) for index in range(classes)}
    return {"id2label": names, "label2id": {name: index for index, name in names.items()}}


def image_processor(model: nn.Module) -> BitImageProcessor:
    """Return the image processor for a model's evaluation protocol.

    It resizes the shorter side, crops the center and normalizes the channels.

    Args:
        model: a timm model, whose `pretrained_cfg` defines the protocol; or a Nat or Dinat of this package. Its
            protocol is the published one for its repository on the hub, or else for its `config.image_size`.

    Raises:
        ValueError: if `model` is neither, or is a Nat or Dinat for images without three channels.
    """
    cfg = getattr(model, "pretrained_cfg", None) or _published_cfg(model)
    channels, height, width = cfg["input_size"]
    return BitImageProcessor(
        size={"shortest_edge": math.floor(min(height, width) / cfg["crop_pct"])},
        crop_size={"height": height, "width": width},
        resample=PILImageResampling[cfg["interpolation"].upper()],
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
        do_convert_rgb=channels == 3,
    )


def _published_cfg(model: nn.Module) -> dict[str, Any]:
    """Return the published preprocessing for a Nat or Dinat, with the names of timm's `pretrained_cfg`."""
    config = getattr(model, "config", None)
    if not isinstance(config, NatConfig):
        raise ValueError(
            f"model is a {type(model).__name__}, but must be a timm model or a Nat or Dinat of natzoo.hf; for other "
            "models use transformers.AutoImageProcessor."
        )
    if config.num_channels != 3:
        raise ValueError(f"config.num_channels is {config.num_channels}; published preprocessing requires 3 channels.")
    # config.json on the hub may omit the image size, so a published model is recognized by its repository.
    repository = Path(config.name_or_path).name
    sizes = [e.facts.get("size", 224) for e in zoo_entries().values() if e.hub and Path(e.hub).name == repository]
    size = sizes[0] if sizes else config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {
        "input_size": (3, height, width),
        "crop_pct": 0.875 if min(height, width) < 384 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
    }
