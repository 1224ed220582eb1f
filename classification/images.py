"""Images and classes from folders. What is random about an image depends on the seed, the epoch and its index alone.

So an interrupted run goes on exactly as it would have, with any number of loading processes; transforms must keep no
state of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

# Appended to seeds, to keep apart the random numbers of the model's weights and of the training steps.
MODEL_SEED, STEP_SEED = 1, 2

_SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid", "eval", "test")}


class FolderImages(Dataset):
    """Images of a folder that holds one folder a class.

    An image that cannot be read is noted, and stands for the next one; with `replace=False` it becomes a black one with
    the target -1. `bad_images` names those met so far, also by loading processes.

    Args:
        root: the folder.
        classes: names of the classes in the order of their numbers; the folders' names, sorted, unless given.
        transform: makes a tensor of a PIL image in RGB.
        replace: whether the next image takes the place of one that cannot be read.

    Raises:
        FileNotFoundError: if the folder is missing.
        ValueError: if it holds no class folders, a class folder without images, or a class that `classes` lacks.
    """

    def __init__(self, root: Path, classes: list[str] | None, transform: Callable, replace: bool = True):
        self.root = root
        self.transform = transform
        self.replace = replace
        self.samples, self.classes = _find(root, classes)
        self._is_bad = torch.zeros(len(self.samples), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        for candidate in range(index, index + len(self)):
            path, target = self.samples[candidate % len(self)]
            try:
                image = read_image(path)
            except ValueError:
                self._is_bad[candidate % len(self)] = True
                if self.replace:
                    continue
                image, target = Image.new("RGB", (64, 64)), -1
            return self.transform(image), target
        raise ValueError(f"none of the {len(self)} images in {self.root} can be read.")

    def bad_images(self) -> list[str]:
        """Paths of the images that could not be read so far."""
        return [self.samples[index][0] for index in self._is_bad.nonzero().flatten().tolist()]


class SeededImages(Dataset):
    """Images by (epoch, index), with all randomness of their augmentation seeded by the two."""

    def __init__(self, images: FolderImages, seed: int):
        self.images = images
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        seed_all(self.seed, epoch, index)
        return self.images[index]


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, index) for every index, in an order that depends on the seed and on `epoch`, which the loop sets."""

    def __init__(self, length: int, seed: int):
        self.length = length
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.random.Generator(np.random.PCG64((self.seed, self.epoch))).permutation(self.length)
        return ((self.epoch, int(index)) for index in order)


def training_loader(images: FolderImages, batch_size: int, workers: int, seed: int, pin_memory: bool) -> DataLoader:
    """Shuffled batches of equal size; `loader.sampler.epoch` must be set before each epoch.

    Raises:
        ValueError: if there are fewer images than a batch holds.
    """
    if len(images) < batch_size:
        raise ValueError(f"{images.root} holds {len(images)} images, fewer than --batch-size {batch_size}: lower it.")
    return DataLoader(
        SeededImages(images, seed),
        batch_size,
        sampler=EpochSampler(len(images), seed),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        drop_last=True,
    )


def evaluation_loader(images: FolderImages, batch_size: int, workers: int, pin_memory: bool) -> DataLoader:
    """All images in order."""
    return DataLoader(images, batch_size, num_workers=workers, persistent_workers=workers > 0, pin_memory=pin_memory)


def seed_all(*key: int) -> None:
    """Seeds Python, NumPy and torch, on all devices, from a tuple of numbers."""
    python, numpy, torch_seed = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(torch_seed)


def read_image(path: str | Path) -> Image.Image:
    """A picture in RGB.

    Raises:
        ValueError: naming the file, if it is missing, broken or no image; Pillow has many kinds of error for that.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}.") from error


def check_images(images: FolderImages, skip: bool) -> None:
    """Raises ValueError naming the first image that could not be read, unless they are to be skipped."""
    bad = [] if skip else images.bad_images()
    if bad:
        raise ValueError(f"{bad[0]} cannot be read as an image: mend or remove it, or go on with --skip-bad-images.")


def split_folder(data: str | None, split: str) -> Path:
    """The folder of a split under a data set's folder; the latter itself if it holds the classes directly.

    Raises:
        FileNotFoundError: naming the folder that is missing.
    """
    if not data:
        raise FileNotFoundError("no data set was given: name the folder that holds train/ and val/.")
    root = Path(data)
    if not root.is_dir():
        raise FileNotFoundError(f"there is no data folder {root}: it should hold {split}/ with one folder a class.")
    for name in (split, *_SPLITS.get(split, ())):
        if (root / name).is_dir():
            return root / name
    if split == "val" and not any((root / name).is_dir() for names in _SPLITS.values() for name in names):
        return root
    raise FileNotFoundError(f"{root} has no folder {split}: it should hold {split}/ with one folder a class.")


def _find(root: Path, classes: list[str] | None) -> tuple[list[tuple[str, int]], list[str]]:
    """(path, class number) of every image, and the names of the classes."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}.")
    folders = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if not folders:
        raise ValueError(f"{root} holds no class folders: it should hold one folder of images a class.")
    folders.sort(key=natural_key)
    classes = classes or folders
    numbers = {name: number for number, name in enumerate(classes)}
    suffixes = get_img_extensions(as_set=True)
    samples = []
    for name in folders:
        if name not in numbers:
            raise ValueError(f"{root} has a class {name!r}, which the model was not trained on.")
        paths = sorted(str(path) for path in (root / name).rglob("*") if path.suffix.lower() in suffixes)
        if not paths:
            raise ValueError(f"the class folder {root / name} holds no images: fill it or remove it.")
        samples += [(path, numbers[name]) for path in paths]
    return samples, classes
