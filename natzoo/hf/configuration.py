"""Configurations of Nat and Dinat; the field `layout` extends them to DiNAT_s and the isotropic models.

The config.json files of the shi-labs/* repositories load without conversion.
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

LAYOUTS = {"nat": 4, "dinat_s": 4, "isotropic": 16}  # layout -> patch size
_MINI_DILATIONS = ((1, 8, 1), (1, 4) * 2, (1, 2) * 3, (1,) * 5)


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
