"""Register Nat and Dinat with transformers: the Auto classes, and the conversion of weight names.

transformers applies the conversion when it loads a file and its inverse when it saves one, also for the backbone of a
detector. natzoo/checkpoints/keys.py does the same without transformers.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    ViTImageProcessor,
    ViTImageProcessorPil,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from natzoo.checkpoints.keys import BLOCK, HF_SCALES, QKV
from natzoo.hf import modeling
from natzoo.hf.configuration import DinatConfig, NatConfig

# One conversion, because transformers expects each to apply to all models of a type; only some have both.
_TABLES = ("attn.rpb", "attn.relative_position_index")


def register() -> None:
    """Register both models, replacing those of the same name in transformers."""
    for name, config in (("Nat", NatConfig), ("Dinat", DinatConfig)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, kind in (
            (AutoModel, "Model"),
            (AutoModelForImageClassification, "ForImageClassification"),
            (AutoBackbone, "Backbone"),
        ):
            model = getattr(modeling, name + kind)
            auto.register(config, model, exist_ok=True)
            for theirs in _configs_of_transformers(config.model_type):
                auto._model_mapping.register(theirs, model, exist_ok=True)
        # Used for folders that do not name a processor; also transformers' default.
        processors = {"torchvision": ViTImageProcessor, "pil": ViTImageProcessorPil}
        AutoImageProcessor.register(config, image_processor_classes=processors, exist_ok=True)
        register_checkpoint_conversion_mapping(config.model_type, _conversions(), overwrite=True)


def _configs_of_transformers(model_type: str) -> list[type[PreTrainedConfig]]:
    """Return transformers' own configuration class of a model type, if it has one; code may have imported it."""
    name = CONFIG_MAPPING_NAMES.get(model_type)
    return [] if name is None else [getattr(transformers, name)]


def _conversions() -> list[WeightRenaming | WeightConverter]:
    """Return the conversions from Hugging Face's names to those of natzoo.hf.modeling."""
    packed = [
        WeightConverter([f"attention.self.{part}.{kind}" for part in QKV], f"attn.qkv.{kind}", [Concatenate(0)])
        for kind in ("weight", "bias")
    ]
    return [
        WeightRenaming("embeddings.patch_embeddings.projection", "embeddings.proj"),
        WeightRenaming("layers", "blocks"),
        *(WeightRenaming(theirs, ours) for ours, theirs in BLOCK.items() if ours not in _TABLES),
        WeightRenaming(r"attention.self.\1", f"attn.({'|'.join(name.removeprefix('attn.') for name in _TABLES)})"),
        *packed,
        WeightConverter(HF_SCALES, ["gamma1", "gamma2"], [_Unstack()]),
    ]


class _Stack(ConversionOps):
    """Stack tensors, in the order of the patterns, as rows of one tensor."""

    @torch.no_grad
    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs):
        return {target_patterns[0]: torch.stack([_unwrap(input_dict[pattern]) for pattern in source_patterns])}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Unstack()


class _Unstack(ConversionOps):
    """Split the rows of a tensor into separate tensors, in the order of the patterns."""

    @torch.no_grad
    def convert(self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs):
        (rows,) = input_dict.values()
        return {name: row.contiguous() for name, row in zip(target_patterns, _unwrap(rows), strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return _Stack()


def _unwrap(tensors: Tensor | list[Tensor]) -> Tensor:
    """Return the only tensor of a list; transformers passes lists where several weights may match a pattern."""
    return tensors[0] if isinstance(tensors, list) else tensors
