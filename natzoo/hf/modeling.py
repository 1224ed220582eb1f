"""Nat and Dinat models for transformers, built from the layers of natzoo.models.

Outputs, dropout and initialization follow Hugging Face's implementation. So do the names of weights in files;
natzoo/hf/registration.py converts them. Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from natzoo.checkpoints.sources import local_files_if_offline
from natzoo.hf.configuration import LAYOUTS, DinatConfig, NatConfig
from natzoo.hf.loading import rename_hub_weights
from natzoo.models import NAT, DiNAT_s, Isotropic
from natzoo.models._layers import NeighborhoodBlock, check_dilations, to_nchw
from natzoo.models.isotropic import BiasedAttention, relative_position_index

# ---------------------------------------------------------------------------------------------------------------------
# Outputs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class NatModelOutput(ModelOutput):
    """Output of NatModel.

    Attributes:
        last_hidden_state: final feature map [B, H, W, C], normalized.
        pooler_output: mean of the final feature map, [B, C].
        hidden_states: embedded tokens, then each stage's output after its downsampler, [B, H, W, C]. On request.
        attentions: attention weights of the last block of each stage, [B, heads, H, W, kernel_size ** 2], where H and W
            are at least the window size: smaller maps are padded. On request.
        reshaped_hidden_states: hidden_states as [B, C, H, W]. On request.
    """

    last_hidden_state: Tensor | None = None
    pooler_output: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class NatImageClassifierOutput(ModelOutput):
    """Output of NatForImageClassification.

    Attributes:
        loss: the loss, if labels are given.
        logits: [B, num_labels].
        hidden_states, attentions, reshaped_hidden_states: as in NatModelOutput.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    reshaped_hidden_states: tuple[Tensor, ...] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Models of natzoo from configurations
# ---------------------------------------------------------------------------------------------------------------------


def arguments_of(config: NatConfig) -> tuple[type[NAT | DiNAT_s | Isotropic], dict[str, Any]]:
    """Return the model class of natzoo for a configuration, and its constructor arguments as plain data.

    Raises:
        ValueError: if a field is invalid; names it.
    """
    _check(config)
    shared = {
        "in_chans": config.num_channels,
        "embed_dim": config.embed_dim,
        "kernel_size": config.kernel_size,
        "mlp_ratio": config.mlp_ratio,
        "qkv_bias": config.qkv_bias,
        "drop_path_rate": config.drop_path_rate,
    }
    dilations = check_dilations(getattr(config, "dilations", None), config.depths)
    if config.layout == "isotropic":
        return Isotropic, {
            "depth": config.depths[0],
            "num_heads": config.num_heads[0],
            "dilations": dilations[0] if config.kernel_size else None,
            "img_size": config.image_size if isinstance(config.image_size, int) else tuple(config.image_size),
            **shared,
        }
    return NAT if config.layout == "nat" else DiNAT_s, {
        "depths": list(config.depths),
        "num_heads": list(config.num_heads),
        "dilations": dilations,
        "attn_drop_rate": config.attention_probs_dropout_prob,
        "layer_scale": config.layer_scale_init_value if config.layer_scale_init_value > 0 else None,
        **shared,
    }


def _check(config: NatConfig) -> None:
    patch_size = LAYOUTS[config.layout]
    if config.patch_size not in (patch_size, [patch_size] * 2, (patch_size,) * 2):
        raise ValueError(f"patch_size is {config.patch_size}, but layout {config.layout!r} requires {patch_size}.")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act is {config.hidden_act!r}; use one of {', '.join(sorted(ACT2FN))}.")
    if len(config.num_heads) != len(config.depths):
        raise ValueError(f"num_heads is {config.num_heads}, but depths is {config.depths}; use one of each per stage.")
    for stage, heads in enumerate(config.num_heads):
        if config.embed_dim * 2**stage % heads:
            raise ValueError(
                f"num_heads[{stage}] is {heads}, which does not divide {config.embed_dim * 2**stage} channels."
            )
    if config.layout != "isotropic":
        if config.kernel_size is None:
            raise ValueError(f"kernel_size is None, but layout {config.layout!r} requires a window.")
        return
    for name in ("attention_probs_dropout_prob", "layer_scale_init_value"):
        if getattr(config, name) > 0:
            raise ValueError(f"{name} is {getattr(config, name)}, but the isotropic layout only supports 0.")
    if len(config.depths) != 1 or len(config.num_heads) != 1:
        raise ValueError(
            f"depths is {config.depths} and num_heads is {config.num_heads}, but the isotropic layout has one stage."
        )


def _adjust(model: nn.Module, config: NatConfig) -> None:
    """Apply Hugging Face's dropout, and the fields that natzoo's constructors lack: epsilon and activation."""
    for block in model.modules():
        if isinstance(block, NeighborhoodBlock):
            block.norm1.eps = block.norm2.eps = config.layer_norm_eps
            block.attn.proj_drop.p = config.attention_probs_dropout_prob
            block.mlp.drop2.p = config.hidden_dropout_prob
            if config.hidden_act != "gelu":
                block.mlp.act = ACT2FN[config.hidden_act]
    model.norm.eps = config.layer_norm_eps


class NatBlock(GradientCheckpointingLayer, NeighborhoodBlock):
    """NeighborhoodBlock that transformers can recompute in the backward pass, and that may return attention weights."""

    @classmethod
    def share(cls, block: NeighborhoodBlock) -> NatBlock:
        """Return a block with the layers and parameters of another one."""
        shared = copy.copy(block)
        shared.__class__ = cls
        return shared

    def forward(self, x_BHWC: Tensor, return_weights: bool = False) -> tuple[Tensor, Tensor | None]:
        normed_BHWC = self.norm1(x_BHWC)
        if return_weights:
            attended_BHWC, weights = self.attn(normed_BHWC, return_weights=True)
        else:
            attended_BHWC, weights = self.attn(normed_BHWC), None
        return self.add_branches(x_BHWC, attended_BHWC), weights


class Stage(nn.Module):
    """Blocks at one resolution, and the downsampler behind them, which the last stage lacks."""

    def __init__(self, blocks: Iterable[NeighborhoodBlock], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(map(NatBlock.share, blocks))
        self.downsample = downsample


class StageOutput(NamedTuple):
    """Output of a stage.

    Attributes:
        before: feature map [B, H, W, C] before the downsampler.
        after: feature map [B, H/2, W/2, 2C] after the downsampler; equal to `before` in the last stage.
        attention: attention weights of the last block if requested, else None.
    """

    before: Tensor
    after: Tensor
    attention: Tensor | None


class Encoder(nn.Module):
    """All stages of a model of natzoo."""

    def __init__(self, model: NAT | DiNAT_s | Isotropic):
        super().__init__()
        if isinstance(model, Isotropic):
            self.levels = nn.ModuleList([Stage(model.layers, None)])
        else:
            self.levels = nn.ModuleList(Stage(stage.blocks, stage.downsample) for stage in model.stages)

    def forward(self, x_BHWC: Tensor, output_attentions: bool = False) -> list[StageOutput]:
        """Run all stages on embedded tokens [B, H, W, C]."""
        outputs = []
        for level in self.levels:
            last = len(level.blocks) - 1
            for index, block in enumerate(level.blocks):
                x_BHWC, weights = block(x_BHWC, output_attentions and index == last)
            before = x_BHWC
            x_BHWC = before if level.downsample is None else level.downsample(before)
            outputs.append(StageOutput(before, x_BHWC, weights))
        return outputs


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class NatPreTrainedModel(PreTrainedModel):
    """Base class with initialization, loading and saving."""

    config_class = NatConfig
    base_model_prefix = "nat"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ("NatBlock",)

    def __init__(self, config: NatConfig):
        if not isinstance(config, self.config_class):
            name = f"{type(config).__module__}.{type(config).__name__}"
            raise ValueError(f"config is a {name}; use natzoo.hf.{self.config_class.__name__}.")
        super().__init__(config)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> NatPreTrainedModel:
        """Create a model for the Auto classes, which also pass transformers' own DinatConfig."""
        if not isinstance(config, cls.config_class):
            config = cls.config_class.from_dict(config.to_dict())
        return super()._from_config(config, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> NatPreTrainedModel:
        """Load a model as in transformers; without a network, only from local files, and without retrying."""
        if pretrained_model_name_or_path is None or os.path.isdir(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        with local_files_if_offline():
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        rename_hub_weights(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        # natten selects its kernels itself; "eager" is the name of the only implementation, which returns attentions.
        name = "eager" if attn_implementation == "sdpa" else attn_implementation
        return super()._check_and_adjust_attn_implementation(name, *args, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(getattr(module, "rpb", None), nn.Parameter):
            init.trunc_normal_(module.rpb, std=self.config.initializer_range)
        if isinstance(module, BiasedAttention):
            height, width = (side // 2 + 1 for side in module.rpb.shape[1:])
            init.copy_(module.relative_position_index, relative_position_index(height, width))
        if isinstance(module, NeighborhoodBlock) and module.gamma1 is not None:
            init.constant_(module.gamma1, self.config.layer_scale_init_value)
            init.constant_(module.gamma2, self.config.layer_scale_init_value)

    def _init_stages(self, config: NatConfig) -> NAT | DiNAT_s | Isotropic:
        """Create the model of natzoo for a configuration, use its tokenizer and stages, and return it."""
        model_class, arguments = arguments_of(config)
        model = model_class(num_classes=0, **arguments)
        _adjust(model, config)
        self.embeddings = model.patch_embed
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = Encoder(model)
        return model

    def _embed(self, pixel_values: Tensor | None) -> Tensor:
        """Embed images: [B, num_channels, H, W] -> [B, H/4, W/4, embed_dim], or 1/16 for isotropic models."""
        if pixel_values is None:
            raise ValueError("pixel_values is missing; pass images [batch, channels, height, width].")
        if pixel_values.dim() != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; pass images "
                f"[batch, {self.config.num_channels}, height, width]."
            )
        return self.dropout(self.embeddings(pixel_values))

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embeddings.proj


class NatModel(NatPreTrainedModel):
    """Model without classifier. Input: images [B, num_channels, H, W] of any size."""

    def __init__(self, config: NatConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        model = self._init_stages(config)
        self.num_features = model.num_features
        self.layernorm = model.norm
        self.add_pooling_layer = add_pooling_layer
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> NatModelOutput:
        attentions, hidden = _requested(self.config, output_attentions, output_hidden_states)
        tokens_BHWC = self._embed(pixel_values)
        stages = self.encoder(tokens_BHWC, attentions)
        last_BHWC = self.layernorm(stages[-1].after)
        maps = (tokens_BHWC, *(stage.after for stage in stages)) if hidden else None
        return NatModelOutput(
            last_hidden_state=last_BHWC,
            pooler_output=last_BHWC.mean((1, 2)) if self.add_pooling_layer else None,
            hidden_states=maps,
            attentions=tuple(stage.attention for stage in stages) if attentions else None,
            reshaped_hidden_states=tuple(map(to_nchw, maps)) if hidden else None,
        )


class NatForImageClassification(NatPreTrainedModel):
    """Model with average pooling and a linear classifier."""

    base_class = NatModel

    def __init__(self, config: NatConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.add_module(self.base_model_prefix, self.base_class(config))
        features = self.base_model.num_features
        self.classifier = nn.Linear(features, self.num_labels) if self.num_labels > 0 else nn.Identity()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> NatImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: images [B, num_channels, H, W].
            labels: class indices [B]; or targets [B, num_labels] for other values of config.problem_type.
            output_attentions: return attention weights; by default as configured.
            output_hidden_states: return feature maps; by default as configured.
        """
        outputs = self.base_model(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(outputs.pooler_output)
        return NatImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )


class NatBackbone(BackboneMixin, NatPreTrainedModel):
    """Backbone for detection and segmentation.

    Input: images [B, num_channels, H, W]. Output: the feature maps [B, C, H, W] of the stages in config.out_features,
    before downsampling, each with its own norm.
    """

    def __init__(self, config: NatConfig):
        super().__init__(config)
        self._init_stages(config)
        self.num_features = [config.embed_dim, *(config.embed_dim * 2**stage for stage in range(len(config.depths)))]
        self.hidden_states_norms = nn.ModuleDict(
            {name: nn.LayerNorm(channels) for name, channels in zip(self.out_features, self.channels, strict=True)}
        )
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        attentions, _ = _requested(self.config, output_attentions, None)
        tokens_BHWC = self._embed(pixel_values)
        stages = self.encoder(tokens_BHWC, attentions)
        maps = (tokens_BHWC, *(stage.before for stage in stages))
        return BackboneOutput(
            feature_maps=tuple(
                to_nchw(self.hidden_states_norms[name](x_BHWC)).contiguous()
                for name, x_BHWC in zip(self.stage_names, maps, strict=True)
                if name in self.out_features
            ),
            hidden_states=maps,
            attentions=tuple(stage.attention for stage in stages) if attentions else None,
        )


def _requested(config: NatConfig, attentions: bool | None, hidden_states: bool | None) -> tuple[bool, bool]:
    """Return which outputs to compute: the arguments of the call, or the configuration's values."""
    return (
        config.output_attentions if attentions is None else attentions,
        config.output_hidden_states if hidden_states is None else hidden_states,
    )


# ----- DiNAT -----


class DinatPreTrainedModel(NatPreTrainedModel):
    """NatPreTrainedModel with dilations."""

    config_class = DinatConfig
    base_model_prefix = "dinat"


class DinatModel(DinatPreTrainedModel, NatModel):
    """NatModel with dilations."""


class DinatForImageClassification(DinatPreTrainedModel, NatForImageClassification):
    """NatForImageClassification with dilations."""

    base_class = DinatModel


class DinatBackbone(DinatPreTrainedModel, NatBackbone):
    """NatBackbone with dilations."""
