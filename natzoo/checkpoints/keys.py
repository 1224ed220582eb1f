"""Convert names of weights between the published layout and those of Hugging Face and detectron2.

All models of natzoo use the published names. In Hugging Face's layout, query, key and value are separate tensors, and
both layer scales of a block are one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

# Published -> Hugging Face, inside a block and outside. natzoo.hf registers BLOCK, HF_SCALES and QKV with transformers.
BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.rpb": "attention.self.rpb",
    "attn.relative_position_index": "attention.self.relative_position_index",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_OUTSIDE = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "patch_embed.norm": "embeddings.norm",
    "norm": "layernorm",
}
_HEAD, _HF_HEAD = "head.", "classifier."
HF_SCALES = "layer_scale_parameters"
QKV = ("query", "key", "value")


def is_hf(names: Iterable[str]) -> bool:
    """Return whether weights have the names of Hugging Face's Nat or Dinat."""
    return any("embeddings.patch_embeddings.projection" in name for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# To Hugging Face
# ---------------------------------------------------------------------------------------------------------------------


def to_hf(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Convert the weights of a classifier or backbone to Hugging Face's names.

    Args:
        weights: weights of any model family, under their published names.
        prefix: "nat." or "dinat."; "" for a backbone.

    Raises:
        ValueError: if a weight belongs to no family; the message names it.
    """
    renamed = {}
    for name, value in weights.items():
        if name.startswith(_HEAD):
            renamed[_HF_HEAD + name.removeprefix(_HEAD)] = value
            continue
        for target, part in _hf_parts(name, value):
            renamed[prefix + target] = part
    return _join_scales(renamed)


def _hf_parts(name: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """Return the new names of a weight with their values."""
    stage_norm = re.fullmatch(r"norm(\d)\.(\w+)", name)
    if stage_norm:
        return [(f"hidden_states_norms.stage{int(stage_norm[1]) + 1}.{stage_norm[2]}", value)]
    downsample = re.fullmatch(r"(?:levels|layers)\.(\d+)\.downsample\.(.+)", name)
    if downsample:
        return [(f"encoder.levels.{downsample[1]}.downsample.{downsample[2]}", value)]
    block = re.fullmatch(r"(?:levels|layers)\.(?:(\d+)\.blocks\.)?(\d+)\.(.+)", name)
    if not block:
        return [(_rename(name, _OUTSIDE), value)]
    layer, rest = f"encoder.levels.{block[1] or 0}.layers.{block[2]}.", block[3]
    if rest.startswith("attn.qkv."):
        kind = rest.removeprefix("attn.qkv.")
        return [(f"{layer}attention.self.{n}.{kind}", x) for n, x in zip(QKV, value.chunk(3), strict=True)]
    if rest in ("gamma1", "gamma2"):
        return [(layer + rest, value)]
    return [(layer + _rename(rest, BLOCK), value)]


def _join_scales(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = {}
    for name, value in weights.items():
        if name.endswith(".gamma1"):
            layer = name.removesuffix("gamma1")
            other = weights.get(f"{layer}gamma2")
            if other is None or other.shape != value.shape:
                raise ValueError(f"{name} has no matching gamma2 of the same shape.")
            joined[layer + HF_SCALES] = torch.stack([value, other])
        elif not name.endswith(".gamma2"):
            joined[name] = value
    return joined


# ---------------------------------------------------------------------------------------------------------------------
# From Hugging Face
# ---------------------------------------------------------------------------------------------------------------------


def from_hf(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of Hugging Face's Nat or Dinat (model, classifier or backbone) to their published names.

    Raises:
        ValueError: if a weight is unknown or has an unexpected shape; the message names it.
    """
    weights = {re.sub(r"^(?:nat|dinat)\.", "", name): value for name, value in weights.items()}
    block_name = _block_name(weights)
    block_backwards, outside_backwards = ({new: old for old, new in names.items()} for names in (BLOCK, _OUTSIDE))
    renamed = {}
    for name, value in weights.items():
        downsample = re.fullmatch(r"encoder\.levels\.(\d+)\.downsample\.(.+)", name)
        block = re.fullmatch(r"encoder\.levels\.(\d+)\.layers\.(\d+)\.(.+)", name)
        stage_norm = re.fullmatch(r"hidden_states_norms\.stage(\d)\.(\w+)", name)
        if name.startswith(_HF_HEAD):
            renamed[_HEAD + name.removeprefix(_HF_HEAD)] = value
        elif stage_norm:
            renamed[f"norm{int(stage_norm[1]) - 1}.{stage_norm[2]}"] = value
        elif downsample:
            stages = block_name.split(".")[0]
            renamed[f"{stages}.{downsample[1]}.downsample.{downsample[2]}"] = value
        elif not block:
            renamed[_rename(name, outside_backwards)] = value
        else:
            layer, rest = block_name.format(stage=block[1], block=block[2]), block[3]
            if rest == HF_SCALES:
                renamed[f"{layer}gamma1"], renamed[f"{layer}gamma2"] = _split_scales(name, value)
            elif re.fullmatch(r"attention\.self\.query\.\w+", rest):
                renamed[f"{layer}attn.qkv.{rest.rsplit('.', 1)[1]}"] = _join_qkv(name, weights)
            elif not re.fullmatch(r"attention\.self\.(key|value)\.\w+", rest):
                renamed[layer + _rename(rest, block_backwards)] = value
    return renamed


def _split_scales(name: str, scales: Tensor) -> tuple[Tensor, ...]:
    if scales.dim() != 2 or len(scales) != 2:
        raise ValueError(f"{name} has shape {tuple(scales.shape)}; it must have two rows, one per branch.")
    return scales.unbind()


def _join_qkv(query: str, weights: dict[str, Tensor]) -> Tensor:
    names = [query.replace(".query.", f".{n}.") for n in QKV]
    shapes = {tuple(weights[name].shape) if name in weights else None for name in names}
    if len(shapes) > 1 or shapes == {()}:
        raise ValueError(f"{query} has no matching key and value of the same shape.")
    return torch.cat([weights[name] for name in names])


def _block_name(weights: dict[str, Tensor]) -> str:
    """Return the pattern of block names of the model family, which the shape of the patch embedding identifies."""

    projection = weights.get("embeddings.patch_embeddings.projection.weight")
    if projection is None:  # two convolutions: NAT, DiNAT
        return "levels.{stage}.blocks.{block}."
    return "layers.{block}." if projection.shape[-1:] == (16,) else "layers.{stage}.blocks.{block}."


def _rename(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    raise ValueError(f"{name} is not a weight of a Neighborhood Attention Transformer.")


# ---------------------------------------------------------------------------------------------------------------------
# From Mask2Former in detectron2 to mmdet and mmseg
# ---------------------------------------------------------------------------------------------------------------------

# Regular expressions for names in detectron2's head, and their replacements.
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
    _PREDICTOR + r"mask_embed\.layers\.0\.": "mask_embed.0.",  # the numbers between are ReLUs
    _PREDICTOR + r"mask_embed\.layers\.1\.": "mask_embed.2.",
    _PREDICTOR + r"mask_embed\.layers\.2\.": "mask_embed.4.",
}

# Stuff classes by the number of classes of a panoptic model. detectron2 keeps the dataset's order; mmdet puts things
# first. COCO's classes are in that order already.
_ADE20K_STUFF = (
    *(0, 1, 2, 3, 4, 5, 6, 9, 11, 13, 16, 17, 21, 25, 26, 28, 29, 34, 40, 46, 48, 51, 52, 54, 59, 60, 61, 63, 68, 77),
    *(79, 84, 91, 94, 96, 99, 100, 101, 105, 106, 109, 113, 114, 117, 122, 128, 131, 140, 141, 145),
)
_CITYSCAPES_STUFF = tuple(range(11))
_STUFF = {150: _ADE20K_STUFF, 19: _CITYSCAPES_STUFF}


def is_detectron2(names: Iterable[str]) -> bool:
    """Return whether weights have the names of Mask2Former in detectron2."""
    return any(name.startswith("sem_seg_head.") for name in names)


def from_detectron2(weights: dict[str, Tensor], is_panoptic: bool) -> dict[str, Tensor]:
    """Convert Mask2Former's weights from detectron2 to the names of mmdet and mmseg.

    Args:
        weights: weights under detectron2's names.
        is_panoptic: convert to mmdet's panoptic head, which has thing classes first; else to mmseg's decode head.
    """
    head = "panoptic_head." if is_panoptic else "decode_head."
    renamed = {}
    for name, value in weights.items():
        if name.startswith("criterion."):  # class weights of the loss
            continue
        found = (re.subn(f"^{old}", new, name) for old, new in _HEAD_NAMES.items())
        renamed[next((head + new for new, count in found if count), name)] = value
    if is_panoptic:
        for name in ("panoptic_head.cls_embed.weight", "panoptic_head.cls_embed.bias"):
            if name in renamed:
                renamed[name] = _things_first(renamed[name])
    return renamed


def _things_first(rows: Tensor) -> Tensor:
    """Reorder a classifier's rows, one per class and one for "no object", so that thing classes come first."""
    classes = len(rows) - 1
    stuff = _STUFF.get(classes, ())
    things = [index for index in range(classes) if index not in stuff]
    return rows[torch.tensor([*things, *stuff, classes])]
