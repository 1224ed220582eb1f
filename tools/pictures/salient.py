"""Salient maps: how much each pixel changes the score of the class that a model sees, of several models side by side.

The gradient of the class's score with respect to the picture, its absolute value, the largest of the colours
(arXiv:1312.6034); averaged over noisy copies of the picture, which makes it calmer (SmoothGrad, arXiv:1706.03825).
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

from natzoo.classification.data.datasets import read_image
from natzoo.classification.data.transforms import evaluation_transform
from natzoo.classification.device import pick_device
from natzoo.classification.options import positive
from pictures.models import Contestant, contestant
from pictures.models import add_options as add_model_options
from pictures.overlay import panels
from pictures.style import SEQUENTIAL

HELP = "the pixels that a prediction depends on, of several models side by side"
NOISE = 0.1  # standard deviation of the noise, as a part of the range of the picture


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", type=Path, nargs="+", help="images to look at")
    add_model_options(parser, ["vit_base_patch16_224", "swin_base_patch4_window7_224", "nat_base"])
    parser.add_argument("--samples", type=positive, default=8, help="noisy copies of a picture; 1: the picture itself")


class Salience(NamedTuple):
    """A salient map [H, W], at least 0, and the answer that it is for."""

    map_HW: Tensor
    number: int
    probability: float


def salience(model: nn.Module, x_1CHW: Tensor, samples: int) -> Salience:
    """The salient map of one picture, for the class that the model sees in it."""
    x_1CHW = x_1CHW.detach()
    with torch.no_grad():
        probabilities = model(x_1CHW)[0].float().softmax(-1)
    number = int(probabilities.argmax())
    draws = torch.Generator().manual_seed(0)
    noise = NOISE * float(x_1CHW.max() - x_1CHW.min()) if samples > 1 else 0.0
    total = torch.zeros(x_1CHW.shape[2:], device=x_1CHW.device)
    for _ in range(samples):
        noisy = x_1CHW + noise * torch.randn(x_1CHW.shape, generator=draws).to(x_1CHW.device)
        (gradient,) = torch.autograd.grad(model(noisy.requires_grad_())[0, number], noisy)
        total += gradient[0].abs().amax(0)
    return Salience((total / samples).cpu(), number, float(probabilities[number]))


def prepare(args: argparse.Namespace) -> Callable[[str], plt.Figure]:
    device = pick_device(args.device)
    images = [read_image(path) for path in args.pictures]
    contestants, columns = [], []
    for word in tqdm(args.models, desc="models", leave=False, disable=None):
        each = contestant(word, args.pretrained, device)
        transform = evaluation_transform(each.config)
        columns.append([salience(each.model, transform(image)[None].to(device), args.samples) for image in images])
        contestants.append(each._replace(model=nn.Identity()))  # what is drawn needs no weights
    return lambda theme: draw_salience(images, contestants, columns, SEQUENTIAL[theme])


def draw_salience(
    images: list[Image.Image], contestants: list[Contestant], columns: list[list[Salience]], colours: str
) -> plt.Figure:
    """A row for each picture: itself, and the salient map of each model; what it sees, where it was trained."""
    figure, table = panels(len(images), 1 + len(contestants), 2.0, 2.15)
    figure.suptitle("salient maps", fontsize=10)
    for row, image in zip(table, images, strict=True):
        row[0].imshow(centre(image))
    for axes, title in zip(table[0], ["picture", *(each.title for each in contestants)], strict=True):
        axes.set_title(title, fontsize=8)
    for column, (each, found) in enumerate(zip(contestants, columns, strict=True), start=1):
        for axes, answer in zip(table[:, column], found, strict=True):
            brightest = float(answer.map_HW.flatten().quantile(0.995)) or 1.0
            axes.imshow(answer.map_HW.numpy(), cmap=colours, vmin=0, vmax=brightest)
            if each.is_trained:
                axes.set_xlabel(f"{each.names[answer.number][:28]} {answer.probability:.0%}", fontsize=7)
    return figure


def centre(image: Image.Image) -> Image.Image:
    """The middle square of a picture, about what models are shown of it."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((224, 224), Image.Resampling.BICUBIC)
