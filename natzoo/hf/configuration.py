"""Configurations as Hugging Face has them: Nat and Dinat, and with `layout` also DiNAT_s and the isotropic models.

A config.json of the hub's shi-labs/* repositories loads as it is.
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

LAYOUTS = {"nat": 4, "dinat_s": 4, "isotropic": 16}  # and the only patch size of each
_MINI_DILATIONS = ((1, 8, 1), (1, 4) * 2, (1, 2) * 3, (1,) * 5)


@strict
class NatConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a Neighborhood Attention Transformer (arXiv:2204.07143); by default of NAT-Mini.

    Args:
        patch_size: pixels of the image on each side of a first token; 4, for isotropic models 16.
        num_channels: channels of the image.
        embed_dim: channels of the first stage; each further one has twice as many.
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        kernel_size: window, in tokens; None for full attention (isotropic: ViT with relative position bias).
        mlp_ratio: hidden channels of the MLPs, as a multiple of the stage's.
        qkv_bias: whether the projections to query, key and value have a bias.
        hidden_dropout_prob: dropout rate on first tokens and after the MLPs.
        attention_probs_dropout_prob: dropout rate on attention weights and after the attention's output projection.
        drop_path_rate: rate of stochastic depth at the last block, rising linearly from 0.
        hidden_act: activation in the MLPs.
        initializer_range: standard deviation of new weights.
        layer_norm_eps: epsilon of the norms of the blocks and of the final norm.
        layer_scale_init_value: initial value of the learned factor on each branch; 0 for no such factor.
        layout: "nat" (overlapping convolutions make the tokens and halve the map), "dinat_s" (patches and patch
            merging, as in Swin) or "isotropic" (one stage of 16x16 patches). The hub has only the first.
        image_size: height and width of the images that full attention's bias is for.
        out_features, out_indices: maps that a backbone gives: "stem", "stage1", ... or their indices.
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
        self.num_layers = len(self.depths)
        self.hidden_size = int(self.embed_dim * 2 ** (self.num_layers - 1))
        self.stage_names = ["stem", *(f"stage{stage}" for stage in range(1, self.num_layers + 1))]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)


@strict
class DinatConfig(NatConfig):
    """Configuration of a Dilated Neighborhood Attention Transformer (arXiv:2209.15001); by default of DiNAT-Mini.

    Args:
        dilations: one dilation a block, as one list a stage; None for DiNAT-Mini's.

    The other arguments are those of NatConfig.
    """

    model_type = "dinat"

    dilations: list[Any] | tuple[Any, ...] | None = None

    def __post_init__(self, **kwargs: Any):
        self.dilations = self.dilations or [list(stage) for stage in _MINI_DILATIONS]
        super().__post_init__(**kwargs)
