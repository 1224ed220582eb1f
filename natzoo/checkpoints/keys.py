"""Names of weights: the published layout, which all models here have, and that of Hugging Face, both ways.

Only names change, but that Hugging Face keeps query, key and value apart and both layer scales of a block together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

# Published -> Hugging Face, in a block and outside. natzoo.hf tells transformers the same of a block.
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
    """Whether weights have the names of Hugging Face's Nat or Dinat."""
    return any("embeddings.patch_embeddings.projection" in name for name in names)


# ---------------------------------------------------------------------------------------------------------------------
# To Hugging Face
# ---------------------------------------------------------------------------------------------------------------------


def to_hf(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Weights of a classifier or backbone under Hugging Face's names.

    Args:
        weights: of any family, under their published names.
        prefix: "nat." or "dinat."; "" for a backbone, which has none.

    Raises:
        ValueError: naming a weight that no family has.
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
    """New names of a weight, and what goes under them."""
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
                raise ValueError(f"{name} comes without a gamma2 of its shape.")
            joined[layer + HF_SCALES] = torch.stack([value, other])
        elif not name.endswith(".gamma2"):
            joined[name] = value
    return joined


# ---------------------------------------------------------------------------------------------------------------------
# From Hugging Face
# ---------------------------------------------------------------------------------------------------------------------


def from_hf(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of Hugging Face's Nat or Dinat, model, classifier or backbone, under their published names.

    Raises:
        ValueError: naming a weight that those have not, or not in that shape.
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
        raise ValueError(f"{name} has shape {tuple(scales.shape)}, but must hold two rows, one a branch.")
    return scales.unbind()


def _join_qkv(query: str, weights: dict[str, Tensor]) -> Tensor:
    names = [query.replace(".query.", f".{n}.") for n in QKV]
    shapes = {tuple(weights[name].shape) if name in weights else None for name in names}
    if len(shapes) > 1 or shapes == {()}:
        raise ValueError(f"{query} comes without a key and a value of its shape.")
    return torch.cat([weights[name] for name in names])


def _block_name(weights: dict[str, Tensor]) -> str:
    """How the family calls its blocks, which tells by its first convolution."""
    projection = weights.get("embeddings.patch_embeddings.projection.weight")
    if projection is None:  # two convolutions: NAT, DiNAT
        return "levels.{stage}.blocks.{block}."
    return "layers.{block}." if projection.shape[-1:] == (16,) else "layers.{stage}.blocks.{block}."


def _rename(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    raise ValueError(f"{name} is no weight of a Neighborhood Attention Transformer.")
