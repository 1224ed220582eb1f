"""Compare the saliency maps of several models: how much each pixel changes the score of the predicted class.

A saliency map is the absolute gradient of the score with respect to the pixels, maximum over the color channels
(arXiv:1312.6034), averaged over noisy copies of the image (SmoothGrad, arXiv:1706.03825).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from figures.models import LoadedModel, load_model
from figures.models import add_options as add_model_options
from figures.style import Theme, image_grid
from natzoo.classification.data.datasets import read_image
from natzoo.classification.data.transforms import evaluation_transform
from natzoo.classification.options import positive
from natzoo.device import pick_device

HELP = "saliency maps of several models: the pixels that change the score of the predicted class"
NOISE = 0.1  # standard deviation of the noise, relative to the value range of the input


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files")
    add_model_options(parser, ["vit_base_patch16_224", "swin_base_patch4_window7_224", "nat_base"])
    parser.add_argument(
        "--samples",
        type=positive,
        default=8,
        help="noisy copies per image (default: 8); 1 adds no noise",
    )


class Saliency(NamedTuple):
    """A saliency map, and the prediction it explains.

    Attributes:
        map_HW: saliency per pixel, at least 0.
        number: index of the predicted class.
        probability: its probability.
    """

    map_HW: Tensor
    number: int
    probability: float


def compute_saliency(model: nn.Module, x_1CHW: Tensor, samples: int) -> Saliency:
    """Compute the saliency map of one image for the predicted class.

    Args:
        model: classifier in eval mode.
        x_1CHW: normalized input [1, C, H, W].
        samples: number of noisy copies; 1 uses the input without noise.
    """
    x_1CHW = x_1CHW.detach()
    with torch.no_grad():
        probabilities = model(x_1CHW)[0].float().softmax(-1)
    number = int(probabilities.argmax())
    generator = torch.Generator().manual_seed(0)
    noise = NOISE * float(x_1CHW.max() - x_1CHW.min()) if samples > 1 else 0.0
    total = torch.zeros(x_1CHW.shape[2:], device=x_1CHW.device)
    for _ in range(samples):
        noisy = x_1CHW + noise * torch.randn(x_1CHW.shape, generator=generator).to(x_1CHW.device)
        (gradient,) = torch.autograd.grad(model(noisy.requires_grad_())[0, number], noisy)
        total += gradient[0].abs().amax(0)
    return Saliency((total / samples).cpu(), number, float(probabilities[number]))


def prepare(args: argparse.Namespace) -> Callable[[Theme], plt.Figure]:
    device = pick_device(args.device)
    images = [read_image(path) for path in args.images]
    models, columns = [], []
    for spec in tqdm(args.models, desc="models", leave=False, disable=None):
        loaded = load_model(spec, args.pretrained, device)
        transform = evaluation_transform(loaded.config)
        columns.append(
            [compute_saliency(loaded.model, transform(image)[None].to(device), args.samples) for image in images]
        )
        models.append(loaded._replace(model=nn.Identity()))  # frees the weights
    return lambda theme: draw_saliency(images, models, columns, theme.sequential)


def draw_saliency(
    images: list[Image.Image], models: list[LoadedModel], columns: list[list[Saliency]], colormap: str
) -> plt.Figure:
    """Draw a row per image: the image, and the saliency map of each model with the prediction of trained models.

    Args:
        images: original images.
        models: models to compare.
        columns: result of `compute_saliency` per model and image.
        colormap: name of a matplotlib colormap.
    """
    figure, table = image_grid(len(images), 1 + len(models), 2.0, 2.15)
    figure.suptitle("Saliency maps, with the predicted class and its probability", fontsize=10)
    for row, image in zip(table, images, strict=True):
        row[0].imshow(center_crop(image))
    for axes, title in zip(table[0], ["image", *(loaded.title for loaded in models)], strict=True):
        axes.set_title(title, fontsize=8)
    for column, (loaded, answers) in enumerate(zip(models, columns, strict=True), start=1):
        for axes, answer in zip(table[:, column], answers, strict=True):
            brightest = float(answer.map_HW.flatten().quantile(0.995)) or 1.0
            axes.imshow(answer.map_HW.numpy(), cmap=colormap, vmin=0, vmax=brightest)
            if loaded.is_trained:
                axes.set_xlabel(f"{loaded.classes[answer.number][:28]} ({answer.probability:.0%})", fontsize=8)
    return figure


def center_crop(image: Image.Image) -> Image.Image:
    """Return the central square of an image, resized to 224x224."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
