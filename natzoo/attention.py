"""What the tokens of a model attend to.

    layers = attention_layers(model)
    tokens = layer_inputs(model, x_1CHW, layers)
    weights_hHW = token_weights(layers[0].module, tokens[0], row=20, column=30)

Serves NAT, DiNAT, DiNAT_s, the isotropic models and ViT-rpb.
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
    """An attention layer of a model; stage and number count from 1, the number within its stage."""

    stage: int
    number: int
    module: Attention

    @property
    def title(self) -> str:
        return f"stage {self.stage}, layer {self.number}: {self.kind}"

    @property
    def kind(self) -> str:
        """NA, DiNA (dilated) or full attention, with its window."""
        if isinstance(self.module, BiasedAttention):
            return "full attention"
        window = "x".join(map(str, self.module.kernel_size))
        dilation = max(self.module.dilation)
        return f"NA {window}" if dilation == 1 else f"DiNA {window}, dilation {dilation}"


def attention_layers(model: nn.Module) -> list[Layer]:
    """The attention layers of a model, from its input to its output; isotropic models are one stage.

    Raises:
        ValueError: if it has none that can be looked at.
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
        raise ValueError(f"{type(model).__name__} has no neighborhood attention to look at.")
    return layers


@torch.no_grad()
def layer_inputs(model: nn.Module, x_1CHW: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """The tokens [1, H, W, C] that each of the layers takes for one picture."""
    seen: dict[int, Tensor] = {}
    hooks = [
        layer.module.register_forward_pre_hook(lambda _, inputs, index=index: seen.update({index: inputs[0]}))
        for index, layer in enumerate(layers)
    ]
    try:
        model(x_1CHW)
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[index] for index in range(len(layers))]


def token_at(point: Sequence[float], picture: Sequence[int], grid: Sequence[int]) -> tuple[int, int]:
    """Row and column of the token that covers a pixel (row, column) of a picture [height, width], on a map [H, W]."""
    row, column = (
        min(max(int(at * tokens / pixels), 0), tokens - 1)
        for at, pixels, tokens in zip(point, picture, grid, strict=True)
    )
    return row, column


def token_weights(attention: Attention, x_1HWC: Tensor, row: int, column: int) -> Tensor:
    """The weight that one token gives to each token of the map, [heads, H, W].

    The weights of a head sum to 1, or to less where a map smaller than the window is padded: padding takes its part.
    """
    height, width = x_1HWC.shape[1:3]
    with torch.no_grad():
        weights = attention.attention_weights(x_1HWC)
    if isinstance(attention, BiasedAttention):
        return weights[0, :, row, column].unflatten(-1, (height, width))
    value = weights.new_zeros(*weights.shape[:-1], 1, requires_grad=True)
    with torch.enable_grad():
        # The output is linear in the values, so its gradient holds the weights, each at its key.
        out = na2d_av(weights, value, attention.kernel_size, attention.dilation, attention.is_causal)
        (received,) = torch.autograd.grad(out[0, :, row, column].sum(), value)
    return received[0, :, :height, :width, 0]
