"""Web page that classifies an image and shows the attention of its tokens.

Runs as a Hugging Face Space (see README.md), or with any model through tools/demo.py.
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
from natzoo.images import check_image_size

MAX_FILE_SIZE = "20mb"  # of an upload
Image.MAX_IMAGE_PIXELS = 20_000_000  # Pillow refuses to decode twice as many
MIN_SIDE = 448  # pixels of the shorter side of the displayed image
MEAN = "mean over heads"
Point = tuple[float, float]  # row and column in pixels of the model input


class AttentionViewer:
    """A classifier, and the attention of its tokens.

    Args:
        model: model with neighborhood attention.
        transform: converts a PIL image to the model input [3, H, W].
        mean: channel means used by the transform.
        std: channel standard deviations used by the transform.
        classes: names of the classes.

    Raises:
        ValueError: the model has no neighborhood attention.
    """

    def __init__(
        self, model: nn.Module, transform: Callable, mean: Sequence[float], std: Sequence[float], classes: list[str]
    ):
        self.model, self.transform, self.classes = model.eval(), transform, classes
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))
        self.layers = attention_layers(model)
        self.device = next(model.parameters()).device

    def to_input(self, image: Image.Image) -> Tensor:
        """Convert an image to the model input [1, 3, H, W].

        Raises:
            ValueError: if the image is so elongated that resizing its short side would fill the memory.
        """
        check_image_size(*image.size)
        return self.transform(image.convert("RGB"))[None].to(self.device)

    @torch.no_grad()
    def classify(self, image: Image.Image) -> dict[str, float]:
        """Return the five most likely classes and their probabilities."""
        probabilities = self.model(self.to_input(image))[0].float().softmax(-1)
        values, numbers = probabilities.topk(min(5, len(probabilities)))
        return {self.classes[number]: value for number, value in zip(numbers.tolist(), values.tolist(), strict=True)}

    def stages(self) -> list[int]:
        """Return the numbers of the stages."""
        return sorted({layer.stage for layer in self.layers})

    def layer_titles(self, stage: int) -> list[str]:
        """Return the titles of the layers of a stage."""
        return [f"layer {layer.number}: {layer.kind}" for layer in self.layers if layer.stage == stage]

    def head_titles(self, stage: int) -> list[str]:
        """Return the titles of the heads of a stage, the mean over the heads first."""
        heads = next(layer.module.num_heads for layer in self.layers if layer.stage == stage)
        return [MEAN, *(f"head {number + 1}" for number in range(heads))]

    def overlay(self, image: Image.Image, stage: int, title: str, head: str, point: Point | None) -> Image.Image:
        """Draw the attention weights of one token over the model input.

        Args:
            image: original image.
            stage: stage, counted from 1.
            title: one of `layer_titles`.
            head: one of `head_titles`.
            point: pixel that the token covers; the center if None.
        """
        layer = [layer for layer in self.layers if layer.stage == stage][self.layer_titles(stage).index(title)]
        x_1CHW = self.to_input(image)
        size = x_1CHW.shape[2:]
        (tokens,) = layer_inputs(self.model, x_1CHW, [layer])
        token = token_at(point or (size[0] / 2, size[1] / 2), size, tokens.shape[1:3])
        weights = token_weights(layer.module, tokens, *token)
        weights = weights.mean(0) if head == MEAN else weights[self.head_titles(stage).index(head) - 1]
        gray = (x_1CHW[0].cpu() * self.std + self.mean).clamp(0, 1).mean(0)
        return blend(gray.numpy(), weights.cpu().numpy(), token, self.scale(size))

    def scale(self, size: Sequence[int]) -> int:
        """Return the factor by which a model input of this size is enlarged for display."""
        return max(1, -(-MIN_SIDE // min(size)))

    def to_point(self, image: Image.Image, pixel: Sequence[int]) -> Point:
        """Convert a pixel (column, row) of the displayed image to a point of the model input."""
        scale = self.scale(self.to_input(image).shape[2:])
        return pixel[1] / scale, pixel[0] / scale


def blend(gray_HW: np.ndarray, weights_hw: np.ndarray, token: tuple[int, int], scale: int) -> Image.Image:
    """Draw the weights of all tokens over an image, with a frame around one token.

    Args:
        gray_HW: image with values from 0 to 1.
        weights_hw: weight per token.
        token: row and column of the framed token.
        scale: factor by which the image is enlarged.
    """
    size = (gray_HW.shape[1] * scale, gray_HW.shape[0] * scale)
    background = Image.fromarray((gray_HW * 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    share = weights_hw / max(float(weights_hw.max()), 1e-12)
    heat = np.concatenate([colormaps["inferno"](share)[..., :3], 0.35 + 0.4 * share[..., None]], axis=-1)
    layer = Image.fromarray((heat * 255).astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    blended = Image.alpha_composite(background.convert("RGBA"), layer).convert("RGB")
    rows, columns = weights_hw.shape
    height, width = size[1] / rows, size[0] / columns
    corner = (token[1] * width, token[0] * height)
    opposite = (corner[0] + width - 1, corner[1] + height - 1)
    ImageDraw.Draw(blended).rectangle((corner, opposite), outline="cyan", width=3)
    return blended


def create_page(viewer: AttentionViewer, title: str) -> gr.Blocks:
    """Create the page of a model."""

    def show(image, stage, layer, head, point):
        return None if image is None else viewer.overlay(image, stage, layer, head, point)

    def change_image(image, stage, layer, head):
        if image is None:
            return None, None, None
        try:
            return viewer.classify(image), show(image, stage, layer, head, None), None
        except ValueError as error:
            raise gr.Error(f"The image {error}") from error

    def change_stage(image, stage, point):
        layer, head = viewer.layer_titles(stage)[0], MEAN
        return (
            gr.Dropdown(choices=viewer.layer_titles(stage), value=layer),
            gr.Dropdown(choices=viewer.head_titles(stage), value=head),
            show(image, stage, layer, head, point),
        )

    def choose_token(image, stage, layer, head, click: gr.SelectData):
        point = viewer.to_point(image, click.index)
        return point, show(image, stage, layer, head, point)

    first = viewer.stages()[0]
    with gr.Blocks(title=title) as page:
        gr.Markdown(
            f"# {title}\nUpload an image. Left: the predicted classes. Right: the attention of the framed token; click "
            "the image to choose another token."
        )
        point = gr.State(None)
        with gr.Row():
            with gr.Column():
                image = gr.Image(type="pil", label="image", sources=["upload", "clipboard"], height=380)
                classes = gr.Label(num_top_classes=5, label="predicted classes")
            with gr.Column():
                shown = gr.Image(type="pil", label="attention of the framed token", interactive=False, format="png")
                stage = gr.Dropdown(viewer.stages(), value=first, label="stage")
                layer = gr.Dropdown(viewer.layer_titles(first), value=viewer.layer_titles(first)[0], label="layer")
                head = gr.Dropdown(viewer.head_titles(first), value=MEAN, label="head")
        image.change(change_image, [image, stage, layer, head], [classes, shown, point])
        stage.input(change_stage, [image, stage, point], [layer, head, shown])
        for choice in (layer, head):
            choice.input(show, [image, stage, layer, head, point], shown)
        shown.select(choose_token, [image, stage, layer, head], [point, shown])
    return page


def load_published(name: str) -> AttentionViewer:
    """Load a model with its published weights."""
    model = timm.create_model(name, pretrained=True)
    config = resolve_data_config({}, model=model)
    info = ImageNetInfo()
    classes = [info.index_to_description(number) for number in range(model.num_classes)]
    return AttentionViewer(model, create_transform(**config, is_training=False), config["mean"], config["std"], classes)


if __name__ == "__main__":
    name = os.environ.get("MODEL", "nat_mini")
    create_page(load_published(name), name).launch(max_file_size=MAX_FILE_SIZE)
