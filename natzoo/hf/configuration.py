"""Configurations of Nat and Dinat; the field `layout` extends them to DiNAT_s and the isotropic models.

The config.json files of the shi-labs/* repositories load without conversion.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from natzoo.checkpoints.record import MAX_CLASSES
from natzoo.schema import Rule, check_values, integer, number, one_of, optional, sequence, text

LAYOUTS = {"nat": 4, "dinat_s": 4, "isotropic": 16}  # layout -> patch size
_MINI_DILATIONS = ((1, 8, 1), (1, 4) * 2, (1, 2) * 3, (1,) * 5)
_MAX_DEPTH = 1000  # blocks of a model


def _is_dtype(value: Any) -> bool:
    return isinstance(
        getattr(torch, value, None) if type(value) is str and value.isidentifier() else value, torch.dtype
    )


def _is_labels(value: Any) -> bool:
    if not isinstance(value, dict) or len(value) > MAX_CLASSES:
        return False
    numbers = {str(number) for number in range(len(value))}
    return {str(key) for key in value} == numbers and all(type(name) is str for name in value.values())


def _side_or_sides(largest: int) -> Rule:
    side = integer(1, largest)
    return Rule(f"{side.expected}, or two", lambda value: side.holds(value) or sequence(side, 2, 2).holds(value))


_PROBABILITY = number(0, 1)
# Rules for the fields of both configurations that natzoo uses. What fields must satisfy together is checked when a
# model is created.
FIELDS: dict[str, Rule] = {
    "patch_size": _side_or_sides(1000),
    "num_channels": integer(1, 1000),
    "embed_dim": integer(1, 100_000),
    "depths": Rule(
        f"a list of at most 10 positive integers with a sum of at most {_MAX_DEPTH}",
        lambda value: sequence(integer(1, _MAX_DEPTH), 1, 10).holds(value) and sum(value) <= _MAX_DEPTH,
    ),
    "num_heads": sequence(integer(1, 10_000), 1, 10),
    "kernel_size": optional(integer(2, 1000)),
    "mlp_ratio": number(0.001, 1000),
    "qkv_bias": one_of(True, False),
    "hidden_dropout_prob": _PROBABILITY,
    "attention_probs_dropout_prob": _PROBABILITY,
    "drop_path_rate": _PROBABILITY,
    "hidden_act": text(100),
    "initializer_range": number(0, 1000),
    "layer_norm_eps": _PROBABILITY,
    "layer_scale_init_value": number(0, 1000),
    "layout": one_of(*LAYOUTS),
    "image_size": _side_or_sides(100_000),
    "dilations": optional(sequence(sequence(integer(1, 100_000), 1, _MAX_DEPTH), 1, 10)),
    "num_labels": optional(integer(0, MAX_CLASSES)),
    "id2label": optional(Rule("a dictionary with a name for each number from 0 on", _is_labels)),
    "dtype": optional(Rule("the name of a dtype of torch", _is_dtype)),
    "torch_dtype": optional(Rule("the name of a dtype of torch", _is_dtype)),
}


@strict
class NatConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a Neighborhood Attention Transformer (arXiv:2204.07143); the defaults are NAT-Mini.

    Args:
        patch_size: image pixels per side of an embedded token: 4, or 16 for isotropic models.
        num_channels: number of image channels.
        embed_dim: channels of the first stage; they double with each stage.
        depths: number of blocks per stage.
        num_heads: number of attention heads per stage.
        kernel_size: window size in tokens; None for full attention (isotropic layout: ViT-rpb).
        mlp_ratio: ratio of the MLPs' hidden channels to the stage's channels.
        qkv_bias: add a bias to the qkv projections.
        hidden_dropout_prob: dropout rate on embedded tokens and after the MLPs.
        attention_probs_dropout_prob: dropout rate on attention weights and after the attention's output projection.
        drop_path_rate: stochastic depth rate of the last block; rates rise linearly from 0.
        hidden_act: activation of the MLPs.
        initializer_range: standard deviation of newly initialized weights.
        layer_norm_eps: epsilon of the norms in blocks and of the final norm.
        layer_scale_init_value: initial value of the learned scale of each branch; 0 for no scale.
        layout: "nat" (overlapping convolutions), "dinat_s" (patches and patch merging, as in Swin) or "isotropic" (one
            stage of 16x16 patches). The repositories on the hub only use "nat".
        image_size: image height and width in pixels, for `image_processor`. They also determine the bias table of full
            attention.
        out_features, out_indices: feature maps of a backbone: "stem", "stage1", ... or their indices.
    """

    model_type = "nat"
    attribute_map: ClassVar[dict[str, str]] = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}

    patch_size: int | list[int] | tuple[int, int] = 4
    num_channels: int = 3
    embed_dim: int = 64
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 5)
    num_heads: list[int] | tuple[int, ...] = (2, 4, 8, 16)
    kernel_size: int | None = 7
    mlp_ratio: float | int = 3.0
    qkv_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.1
    hidden_act: str = "gelu"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    layer_scale_init_value: float | int = 0.0
    layout: str = "nat"
    image_size: int | list[int] | tuple[int, int] = 224
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any):
        check_values(type(self).__name__, {**vars(self), **kwargs}, FIELDS, required=())
        self.num_layers = len(self.depths)
        self.hidden_size = int(self.embed_dim * 2 ** (self.num_layers - 1))
        self.stage_names = ["stem", *(f"stage{stage}" for stage in range(1, self.num_layers + 1))]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)


@strict
class DinatConfig(NatConfig):
    """Configuration of a Dilated Neighborhood Attention Transformer (arXiv:2209.15001); the defaults are DiNAT-Mini.

    Args:
        dilations: one dilation per block, as one list per stage; None for those of DiNAT-Mini.

    All other arguments are those of NatConfig.
    """

    model_type = "dinat"

    dilations: list[Any] | tuple[Any, ...] | None = None

    def __post_init__(self, **kwargs: Any):
        self.dilations = self.dilations or [list(stage) for stage in _MINI_DILATIONS]
        super().__post_init__(**kwargs)
