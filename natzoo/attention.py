"""Extract attention weights from the models of natzoo.

    layers = attention_layers(model)
    tokens = layer_inputs(model, x_1CHW, layers)
    weights_hHW = token_weights(layers[0].module, tokens[0], row=20, column=30)

Shape suffixes: 1 a batch of one, C channels, H height, W width, h heads.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from natten import NeighborhoodAttention2D, na2d_av
from natzoo.models.isotropic import BiasedAttention

__all__ = ["Layer", "attention_layers", "layer_inputs", "token_at", "token_weights"]

Attention = NeighborhoodAttention2D | BiasedAttention


class Layer(NamedTuple):
    """An attention layer of a model.

    Attributes:
        stage: number of its stage, from 1.
        number: its number within the stage, from 1.
        module: the attention module.
    """

    stage: int
    number: int
    module: Attention

    @property
    def title(self) -> str:
        """Position and kind, for captions."""
        return f"stage {self.stage}, layer {self.number}: {self.kind}"

    @property
    def kind(self) -> str:
        """NA, DiNA (dilated) or full attention, with window and dilation."""
        if isinstance(self.module, BiasedAttention):
            return "full attention"
        window = "x".join(map(str, self.module.kernel_size))
        dilation = max(self.module.dilation)
        return f"NA {window}" if dilation == 1 else f"DiNA {window}, dilation {dilation}"


def attention_layers(model: nn.Module) -> list[Layer]:
    """Return the attention layers of a model in order; isotropic models have one stage.

    Raises:
        ValueError: if the model has neither neighborhood attention nor the full attention of ViT-rpb.
    """
    layers: list[Layer] = []
    for name, module in model.named_modules():
        if not isinstance(module, Attention):
            continue
        found = re.search(r"(\d+)\.blocks\.\d+\.attn$", name)
        stage = int(found[1]) + 1 if found else 1
        number = layers[-1].number + 1 if layers and layers[-1].stage == stage else 1
        layers.append(Layer(stage, number, module))
    if not layers:
        raise ValueError(f"model is a {type(model).__name__}, which has no attention layers of natzoo.")
    return layers


@torch.no_grad()
def layer_inputs(model: nn.Module, x_1CHW: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """Run a model on one image and return the input [1, H, W, C] of each layer.

    Args:
        model: the model.
        x_1CHW: the image, preprocessed.
        layers: attention layers of the model, as returned by `attention_layers`.
    """
    inputs: dict[int, Tensor] = {}
    hooks = [
        layer.module.register_forward_pre_hook(lambda _, args, index=index: inputs.update({index: args[0]}))
        for index, layer in enumerate(layers)
    ]
    try:
        model(x_1CHW)
    finally:
        for hook in hooks:
            hook.remove()
    return [inputs[index] for index in range(len(layers))]


def token_at(pixel: Sequence[float], image_size: Sequence[int], map_size: Sequence[int]) -> tuple[int, int]:
    """Return the token that covers a pixel.

    Args:
        pixel: row and column; clamped to the image.
        image_size: height and width in pixels.
        map_size: height and width in tokens.

    Returns:
        Row and column of the token.
    """
    row, column = (
        min(max(int(at * tokens / pixels), 0), tokens - 1)
        for at, pixels, tokens in zip(pixel, image_size, map_size, strict=True)
    )
    return row, column


def token_weights(attention: Attention, x_1HWC: Tensor, row: int, column: int) -> Tensor:
    """Compute the attention weights that one token assigns to all tokens of the map.

    Args:
        attention: the layer.
        x_1HWC: input of the layer.
        row, column: position of the token.

    Returns:
        Weights [heads, H, W]. They sum to 1 per head, or to less if the map is smaller than the window, because padding
        receives the rest.
    """
    height, width = x_1HWC.shape[1:3]
    with torch.no_grad():
        weights = attention.attention_weights(x_1HWC)
    if isinstance(attention, BiasedAttention):
        return weights[0, :, row, column].unflatten(-1, (height, width))
    value = weights.new_zeros(*weights.shape[:-1], 1, requires_grad=True)
    with torch.enable_grad():
        # The output is linear in the values, so its gradient with respect to them is the attention weights.
        out = na2d_av(weights, value, attention.kernel_size, attention.dilation, is_causal=attention.is_causal)
        (received,) = torch.autograd.grad(out[0, :, row, column].sum(), value)
    return received[0, :, :height, :width, 0]
