"""Data sets of images: what cannot be read is noted; what is random depends on the seed, the epoch and the index alone.

So an interrupted run goes on exactly as it would have, with any number of loading processes; transforms must keep no
state of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from classification.ranks import Ranks

# Appended to seeds, to keep apart the random numbers of the model's weights and of the training steps.
MODEL_SEED, STEP_SEED = 1, 2


class Images(Dataset):
    """The images of a reader, transformed.

    An image that cannot be read is noted, and stands for the next one; with `replace=False` it becomes a black one with
    the target -1. `bad_images` names those met so far, also by loading processes.

    Args:
        reader: of readers.py.
        transform: makes a tensor of a PIL image in RGB.
        replace: whether the next image takes the place of one that cannot be read.
    """

    def __init__(self, reader: Any, transform: Callable | None, replace: bool = True):
        self.reader = reader
        self.transform = transform
        self.replace = replace
        self._is_bad = torch.zeros(len(reader), dtype=torch.bool).share_memory_()
        self._has_bad = torch.zeros(1, dtype=torch.bool).share_memory_()  # so that looking at every batch is cheap

    @property
    def classes(self) -> list[str]:
        return self.reader.classes

    @property
    def where(self) -> str:
        return self.reader.where

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        for candidate in (number % len(self) for number in range(index, index + len(self))):
            try:
                file, target = self.reader[candidate]
                image = read_image(file)
            except (OSError, ValueError):  # as `read_image` and the readers raise it
                self._is_bad[candidate] = True
                self._has_bad[0] = True
                if self.replace:
                    continue
                image, target = Image.new("RGB", (64, 64)), -1
            return self.transform(image), target
        raise ValueError(f"none of the {len(self)} images in {self.where} can be read.")

    def extent(self, is_within_epoch: bool = True) -> dict[str, int]:
        """What a run that goes on must have the same, within an epoch or at its end."""
        return {"number of training images": len(self)}

    def bad_images(self) -> list[str]:
        """Names of the images that could not be read so far."""
        if not self._has_bad:
            return []
        return [self.reader.filename(index) for index in self._is_bad.nonzero().flatten().tolist()]


class SyntheticImages(Dataset):
    """Noise, to measure how fast a model trains: an image costs a copy of one that is there, moved aside.

    Args:
        length: number of images.
        num_classes: number of classes.
    """

    where = "--synthetic"

    def __init__(self, length: int, num_classes: int):
        self.length = length
        self.classes = [str(number) for number in range(num_classes)]
        self.noise: Tensor | None = None

    def make_noise(self, input_size: list[int]) -> None:
        """Draws the pixels that all images are made of; [channels, height, width]."""
        self.noise = torch.randn(input_size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.noise.roll(index, dims=-1), index % len(self.classes)

    def extent(self, is_within_epoch: bool = True) -> dict[str, int]:
        return {"number of training images": len(self)}

    def bad_images(self) -> list[str]:
        return []


class SeededImages(Dataset):
    """Images by (epoch, index), with all randomness of their augmentation seeded by the two."""

    def __init__(self, images: Dataset, seed: int):
        self.images = images
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        seed_cpu(self.seed, epoch, index)
        return self.images[index]


def seed_cpu(*key: int) -> int:
    """Seeds Python, NumPy and torch's generator of the CPU from a tuple of numbers; returns the last one's seed.

    An image takes it 20 times as long to seed the generators of all devices, which are of no use to it.
    """
    python, numpy, torch_seed = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(torch_seed)
    return torch_seed


def seed_all(*key: int) -> None:
    """The same, and the generators of all devices."""
    torch.manual_seed(seed_cpu(*key))


def read_image(file: str | Path | BinaryIO, name: str | Path | None = None) -> Image.Image:
    """A picture in RGB.

    Raises:
        ValueError: naming the file, if it is missing, broken or no image; Pillow has many kinds of error for that.
    """
    try:
        with Image.open(file) as image:
            return _of_eight_bits(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name or file} cannot be read as an image: {error}.") from error


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of 16 bits scaled to 8, which Pillow cuts off at 255 instead; others as they are."""
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if image.mode == "I" and pixels.max() <= 255:  # of 32 bits, whose range nothing tells
        return image
    return Image.fromarray((pixels.clip(0, 65535) // 257).astype(np.uint8))


def all_bad_images(images: Any, ranks: Ranks) -> list[str]:
    """Names of the images that some process could not read; all processes must call it."""
    return sorted(set().union(*ranks.gather(images.bad_images())))


def check_images(images: Any, skip: bool) -> None:
    """Raises ValueError naming the first image that could not be read, unless they are to be skipped."""
    bad = [] if skip else images.bad_images()
    if bad:
        raise ValueError(f"{bad[0]} cannot be read as an image: mend or remove it, or go on with --skip-bad-images.")
