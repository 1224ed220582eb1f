"""Weights of whole detectors and segmenters, made to fit the ones that today's mmdet and mmseg build.

The published ones have two layouts. Mask R-CNN, Cascade Mask R-CNN and UPerNet are files of mmdet 2 and mmseg 0, whose
names are today's. Mask2Former's are files of detectron2, whose names and order of classes are its own.
"""

from __future__ import annotations

import os
import re

import torch
from torch import Tensor, nn

from natzoo.checkpoints.load import check_fit

# ---------------------------------------------------------------------------------------------------------------------
# Mask2Former of detectron2 -> of mmdet and mmseg: regular expressions and what replaces them, in the head
# ---------------------------------------------------------------------------------------------------------------------

_PIXEL = r"sem_seg_head\.pixel_decoder\."
_PREDICTOR = r"sem_seg_head\.predictor\."
_HEAD_NAMES = {
    _PIXEL + r"input_proj\.(\d)\.0\.": r"pixel_decoder.input_convs.\1.conv.",
    _PIXEL + r"input_proj\.(\d)\.1\.": r"pixel_decoder.input_convs.\1.gn.",
    _PIXEL + r"adapter_1\.norm\.": "pixel_decoder.lateral_convs.0.gn.",
    _PIXEL + r"adapter_1\.": "pixel_decoder.lateral_convs.0.conv.",
    _PIXEL + r"layer_1\.norm\.": "pixel_decoder.output_convs.0.gn.",
    _PIXEL + r"layer_1\.": "pixel_decoder.output_convs.0.conv.",
    _PIXEL + r"mask_features\.": "pixel_decoder.mask_feature.",
    _PIXEL + r"transformer\.level_embed": "pixel_decoder.level_encoding.weight",
    _PIXEL + r"transformer\.encoder\.layers\.(\d+)\.self_attn\.": r"pixel_decoder.encoder.layers.\1.self_attn.",
    _PIXEL + r"transformer\.encoder\.layers\.(\d+)\.linear1\.": r"pixel_decoder.encoder.layers.\1.ffn.layers.0.0.",
    _PIXEL + r"transformer\.encoder\.layers\.(\d+)\.linear2\.": r"pixel_decoder.encoder.layers.\1.ffn.layers.1.",
    _PIXEL + r"transformer\.encoder\.layers\.(\d+)\.norm1\.": r"pixel_decoder.encoder.layers.\1.norms.0.",
    _PIXEL + r"transformer\.encoder\.layers\.(\d+)\.norm2\.": r"pixel_decoder.encoder.layers.\1.norms.1.",
    _PREDICTOR + r"transformer_cross_attention_layers\.(\d+)\.multihead_attn\.": (
        r"transformer_decoder.layers.\1.cross_attn.attn."
    ),
    _PREDICTOR + r"transformer_cross_attention_layers\.(\d+)\.norm\.": r"transformer_decoder.layers.\1.norms.0.",
    _PREDICTOR + r"transformer_self_attention_layers\.(\d+)\.self_attn\.": (
        r"transformer_decoder.layers.\1.self_attn.attn."
    ),
    _PREDICTOR + r"transformer_self_attention_layers\.(\d+)\.norm\.": r"transformer_decoder.layers.\1.norms.1.",
    _PREDICTOR + r"transformer_ffn_layers\.(\d+)\.linear1\.": r"transformer_decoder.layers.\1.ffn.layers.0.0.",
    _PREDICTOR + r"transformer_ffn_layers\.(\d+)\.linear2\.": r"transformer_decoder.layers.\1.ffn.layers.1.",
    _PREDICTOR + r"transformer_ffn_layers\.(\d+)\.norm\.": r"transformer_decoder.layers.\1.norms.2.",
    _PREDICTOR + r"decoder_norm\.": "transformer_decoder.post_norm.",
    _PREDICTOR + r"(query_feat|query_embed|level_embed)\.": r"\1.",
    _PREDICTOR + r"class_embed\.": "cls_embed.",
    _PREDICTOR + r"mask_embed\.layers\.0\.": "mask_embed.0.",  # with a ReLU behind each but the last
    _PREDICTOR + r"mask_embed\.layers\.1\.": "mask_embed.2.",
    _PREDICTOR + r"mask_embed\.layers\.2\.": "mask_embed.4.",
}

# Of ADE20K's 150 classes in their own order, those that are stuff; of Cityscapes' 19 these are the first 11.
_ADE20K_STUFF = (
    *(0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63, 68, 77),
    *(79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145),
)
_CITYSCAPES_STUFF = tuple(range(11))
# By how many classes a panoptic model has. detectron2 keeps their own order, mmdet has the things first. COCO's are so.
_STUFF = {150: _ADE20K_STUFF, 19: _CITYSCAPES_STUFF}


def _is_detectron2(weights: dict[str, Tensor]) -> bool:
    return any(name.startswith("sem_seg_head.") for name in weights)


def _from_detectron2(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    head = "panoptic_head." if hasattr(model, "panoptic_head") else "decode_head."
    renamed = {}
    for name, value in weights.items():
        if name.startswith("criterion."):  # the loss's weights of the classes
            continue
        found = (re.subn(f"^{old}", new, name) for old, new in _HEAD_NAMES.items())
        renamed[next((head + new for new, count in found if count), name)] = value
    if head == "panoptic_head.":
        for name in ("panoptic_head.cls_embed.weight", "panoptic_head.cls_embed.bias"):
            if name in renamed:
                renamed[name] = _things_first(renamed[name])
    return renamed


def _things_first(rows: Tensor) -> Tensor:
    """Rows of a classifier, one a class and one for no object, with the things' moved to the front."""
    classes = len(rows) - 1
    stuff = _STUFF.get(classes, ())
    things = [index for index in range(classes) if index not in stuff]
    return rows[torch.tensor([*things, *stuff, classes])]


# ---------------------------------------------------------------------------------------------------------------------
# Fitting
# ---------------------------------------------------------------------------------------------------------------------

# Layers with a row, or a map, a class.
_BY_CLASS = re.compile(r"(fc_cls|fc_reg|mask_head(\.\d)?\.conv_logits|conv_seg|cls_embed)\.(weight|bias)$")


def fit_detector(
    weights: dict[str, Tensor], model: nn.Module, path: str | os.PathLike, new_classes: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights for a detector or segmenter under its own names, and sentences that say what was changed.

    Args:
        weights: of a file of mmdet or mmseg, old or new, or of detectron2's Mask2Former.
        model: what mmdet or mmseg built.
        path: the file that they are from, for the messages.
        new_classes: whether layers for another number of classes are left as they are in the model, to fine-tune.

    Raises:
        ValueError: if they are of another model; lists what is missing, unexpected or of another shape.
    """
    weights = {re.sub(r"^module\.", "", name): value for name, value in weights.items()}
    notes = []
    if _is_detectron2(weights):
        weights = _from_detectron2(weights, model)
        notes.append("the names and the order of classes were detectron2's")
    if new_classes:
        notes += _keep_classes(weights, model.state_dict())
    check_fit(model, weights, path)
    return weights, notes


def _keep_classes(weights: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Replaces layers of other classes by the model's own."""
    others = [
        name
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape and _BY_CLASS.search(name)
    ]
    weights.update({name: own[name] for name in others})
    layers = sorted({name.rsplit(".", 1)[0] for name in others})
    return [f"these layers start anew, for another number of classes: {', '.join(layers)}"] if layers else []
