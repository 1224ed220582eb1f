"""A page that says what a picture shows, and what each token of it attends to.

Runs as a Hugging Face Space (see README.md), or through tools/demo.py with any model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import gradio as gr
import numpy as np
import timm
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from torch import Tensor, nn

import natzoo  # noqa: F401  registers the models
from natzoo.attention import attention_layers, layer_inputs, token_at, token_weights

SIDE = 448  # pixels that the shorter side of the shown picture has at least
MEAN = "mean over heads"
Point = tuple[float, float]  # row and column in pixels of the network's input


class Looker:
    """A model with all that the page shows of it.

    Args:
        model: with neighborhood attention.
        transform: makes the network's input [3, H, W] of a PIL image.
        mean: of the input's colours.
        std: of the same.
        names: of the classes.

    Raises:
        ValueError: if the model has no attention to look at.
    """

    def __init__(self, model: nn.Module, transform: Callable, mean: Sequence[float], std: Sequence[float], names: list):
        self.model, self.transform, self.names = model.eval(), transform, names
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self.layers = attention_layers(model)
        self.device = next(model.parameters()).device

    def input_of(self, image: Image.Image) -> Tensor:
        return self.transform(image.convert("RGB"))[None].to(self.device)

    @torch.no_grad()
    def classify(self, image: Image.Image) -> dict[str, float]:
        """The five likeliest classes and their probabilities."""
        probabilities = self.model(self.input_of(image))[0].float().softmax(-1)
        values, numbers = probabilities.topk(min(5, len(probabilities)))
        return {self.names[number]: value for number, value in zip(numbers.tolist(), values.tolist(), strict=True)}

    def heads(self, stage: int) -> list[str]:
        heads = next(layer.module.num_heads for layer in self.layers if layer.stage == stage)
        return [MEAN, *(f"head {number + 1}" for number in range(heads))]

    def titles(self, stage: int) -> list[str]:
        return [f"layer {layer.number}: {layer.kind}" for layer in self.layers if layer.stage == stage]

    def stages(self) -> list[int]:
        return sorted({layer.stage for layer in self.layers})

    def overlay(self, image: Image.Image, stage: int, title: str, head: str, point: Point | None) -> Image.Image:
        """The picture as the network sees it, under the weights of the token at a point, its middle unless given."""
        layer = [layer for layer in self.layers if layer.stage == stage][self.titles(stage).index(title)]
        x_1CHW = self.input_of(image)
        size = x_1CHW.shape[2:]
        (tokens,) = layer_inputs(self.model, x_1CHW, [layer])
        grid = tokens.shape[1:3]
        token = token_at(point or (size[0] / 2, size[1] / 2), size, grid)
        weights = token_weights(layer.module, tokens, *token)
        weights = weights.mean(0) if head == MEAN else weights[self.heads(stage).index(head) - 1]
        picture = (x_1CHW[0].cpu() * self.std + self.mean).clamp(0, 1).mean(0)
        return blend(picture.numpy(), weights.cpu().numpy(), token, self.zoom(size))

    def zoom(self, size: Sequence[int]) -> int:
        """By how much the network's input is enlarged to be shown."""
        return max(1, -(-SIDE // min(size)))

    def point_of(self, image: Image.Image, pixel: Sequence[int]) -> Point:
        """The pixel of the input under a pixel (column, row) of the shown picture."""
        zoom = self.zoom(self.input_of(image).shape[2:])
        return pixel[1] / zoom, pixel[0] / zoom


def blend(picture_HW: np.ndarray, weights_hw: np.ndarray, token: tuple[int, int], zoom: int) -> Image.Image:
    """A grey picture under the weights of its tokens, with a frame around one token."""
    size = (picture_HW.shape[1] * zoom, picture_HW.shape[0] * zoom)
    grey = Image.fromarray((picture_HW * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    share = weights_hw / max(float(weights_hw.max()), 1e-12)
    heat = np.concatenate([colormaps["inferno"](share)[..., :3], 0.35 + 0.4 * share[..., None]], axis=-1)
    layer = Image.fromarray((heat * 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    shown = Image.alpha_composite(grey.convert("RGBA"), layer).convert("RGB")
    rows, columns = weights_hw.shape
    height, width = size[1] / rows, size[0] / columns
    corner = (token[1] * width, token[0] * height)
    opposite = (corner[0] + width - 1, corner[1] + height - 1)
    ImageDraw.Draw(shown).rectangle((corner, opposite), outline="cyan", width=3)
    return shown


def make_page(looker: Looker, title: str) -> gr.Blocks:
    """The page of a model."""

    def look(image, stage, layer, head, point):
        return None if image is None else looker.overlay(image, stage, layer, head, point)

    def take(image, stage, layer, head):
        if image is None:
            return None, None, None
        return looker.classify(image), look(image, stage, layer, head, None), None

    def change_stage(image, stage, point):
        layer, head = looker.titles(stage)[0], MEAN
        return (
            gr.Dropdown(choices=looker.titles(stage), value=layer),
            gr.Dropdown(choices=looker.heads(stage), value=head),
            look(image, stage, layer, head, point),
        )

    def choose(image, stage, layer, head, click: gr.SelectData):
        point = looker.point_of(image, click.index)
        return point, look(image, stage, layer, head, point)

    first = looker.stages()[0]
    with gr.Blocks(title=title) as page:
        gr.Markdown(
            f"# {title}\nGive a picture: on the left what it shows, on the right what one of its tokens attends to. "
            "Click into the right picture to choose another token."
        )
        point = gr.State(None)
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="pil", label="picture", sources=["upload", "clipboard"], height=380)
                classes = gr.Label(num_top_classes=5, label="what it shows")
            with gr.Column():
                shown = gr.Image(type="pil", label="attention of the framed token", interactive=False, format="png")
                stage = gr.Dropdown(looker.stages(), value=first, label="stage")
                layer = gr.Dropdown(looker.titles(first), value=looker.titles(first)[0], label="layer")
                head = gr.Dropdown(looker.heads(first), value=MEAN, label="head")
        image.change(take, [image, stage, layer, head], [classes, shown, point])
        stage.input(change_stage, [image, stage, point], [layer, head, shown])
        for choice in (layer, head):
            choice.input(look, [image, stage, layer, head, point], shown)
        shown.select(choose, [image, stage, layer, head], [point, shown])
    return page


def published(name: str) -> Looker:
    """A model with its published weights."""
    model = timm.create_model(name, pretrained=True)
    config = resolve_data_config({}, model=model)
    info = ImageNetInfo()
    names = [info.index_to_description(number) for number in range(model.num_classes)]
    return Looker(model, create_transform(**config, is_training=False), config["mean"], config["std"], names)


if __name__ == "__main__":
    name = os.environ.get("MODEL", "nat_mini")  # a variable of the Space
    make_page(published(name), name).launch()
