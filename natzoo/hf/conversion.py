"""Between the names of weights in Hugging Face's files and those in natzoo's blocks, as transformers loads and saves.

transformers translates each file by a list of conversions, and backwards when it saves; a detector's backbone as well.
natzoo/checkpoints/keys.py does the same without transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming

from natzoo.checkpoints.keys import BLOCK, HF_SCALES, QKV


class _Stack(ConversionOps):
    """Tensors, in the order of the patterns, to rows of one."""

    @torch.no_grad
    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs):
        return {target_patterns[0]: torch.stack([_only(input_dict[pattern]) for pattern in source_patterns])}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Unstack()


class _Unstack(ConversionOps):
    """Rows of a tensor to tensors of their own, in the order of the patterns."""

    @torch.no_grad
    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs):
        (rows,) = input_dict.values()
        return {name: row.contiguous() for name, row in zip(target_patterns, _only(rows), strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Stack()


def _only(tensors: Tensor | list[Tensor]) -> Tensor:
    """transformers gives a list where several weights may match."""
    return tensors[0] if isinstance(tensors, list) else tensors


def register() -> None:
    """Tells transformers of Nat's and Dinat's conversions."""
    for model_type in ("nat", "dinat"):
        register_checkpoint_conversion_mapping(model_type, _conversions(), overwrite=True)


def _conversions() -> list[WeightRenaming | WeightConverter]:
    packed = [
        WeightConverter([f"attention.self.{part}.{kind}" for part in QKV], f"attn.qkv.{kind}", [Concatenate(0)])
        for kind in ("weight", "bias")
    ]
    return [
        WeightRenaming("embeddings.patch_embeddings.projection", "embeddings.proj"),
        WeightRenaming("layers", "blocks"),
        *(WeightRenaming(theirs, ours) for ours, theirs in BLOCK.items()),
        *packed,
        WeightConverter(HF_SCALES, ["gamma1", "gamma2"], [_Unstack()]),
    ]
