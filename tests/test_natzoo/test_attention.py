"""Attention weights from the layers of every model family."""

import pytest
import timm
import torch
from small_models import small

from natzoo.attention import attention_layers, layer_inputs, token_at, token_weights

TITLES = {
    "nat_mini": ["stage 1, layer 1: NA 3x3", "stage 2, layer 1: NA 3x3"],
    "dinat_mini": ["stage 1, layer 1: DiNA 3x3, dilation 2", "stage 2, layer 1: NA 3x3"],
    "dinat_s_tiny": ["stage 1, layer 1: DiNA 3x3, dilation 2", "stage 2, layer 1: NA 3x3"],
    "dinat_isotropic_small": ["stage 1, layer 1: NA 7x7", "stage 1, layer 2: DiNA 7x7, dilation 2"],
    "vitrpb_small": ["stage 1, layer 1: full attention", "stage 1, layer 2: full attention"],
}


@pytest.mark.parametrize("name", TITLES)
def test_weights_reproduce_the_output_of_the_layer(name):
    """The output of a token is the projection of all values, weighted by its attention weights."""
    model = small(name)
    layers = attention_layers(model)
    assert [layer.title for layer in layers] == TITLES[name]
    x_1CHW = torch.randn(1, 3, 240, 224) if "isotropic" in name else torch.randn(1, 3, 48, 64)
    for layer, tokens in zip(layers, layer_inputs(model, x_1CHW, layers), strict=True):
        row, column = tokens.shape[1] - 1, tokens.shape[2] // 2
        weights = token_weights(layer.module, tokens, row, column)
        assert torch.allclose(weights.sum((1, 2)), torch.ones(len(weights)), atol=1e-5)
        with torch.no_grad():
            value_HWhd = layer.module.qkv(tokens)[0].unflatten(-1, (3, len(weights), -1))[:, :, 2]
            expected = layer.module.proj(torch.einsum("hyx,yxhd->hd", weights, value_HWhd).flatten())
            assert torch.allclose(layer.module(tokens)[0, row, column], expected, rtol=1e-3, atol=1e-3)


def test_weights_are_zero_outside_the_window():
    attention = attention_layers(small("dinat_mini"))[0].module
    weights = token_weights(attention, torch.randn(1, 8, 9, 16), row=0, column=4).mean(0)
    expected = torch.zeros(8, 9, dtype=torch.bool)
    expected[0:6:2, 2:8:2] = True  # dilation 2; the window is shifted down at the upper border
    assert torch.equal(weights > 0, expected)


def test_padding_receives_weight():
    attention = attention_layers(small("dinat_mini"))[0].module
    weights = token_weights(attention, torch.randn(1, 8, 3, 16), row=0, column=1)
    assert weights.shape == (1, 8, 3)
    assert 0 < weights.sum() < 1


def test_token_at_pixel():
    assert token_at((0, 0), (32, 64), (8, 16)) == (0, 0)
    assert token_at((31.9, 33), (32, 64), (8, 16)) == (7, 8)
    assert token_at((40, -3), (32, 64), (8, 16)) == (7, 0)


def test_model_without_neighborhood_attention():
    with pytest.raises(ValueError, match="ResNet"):
        attention_layers(timm.create_model("resnet10t"))
