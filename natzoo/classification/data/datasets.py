"""Data sets of images: what cannot be read is noted; what is random depends on the seed, the epoch and the index alone.

So an interrupted run goes on exactly as it would have, with any number of loading processes; transforms must keep no
state of their own.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import os
import pkgutil
import random
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from natzoo.classification.distributed import World

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


class SyntheticDataset(Dataset):
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


class SeededDataset(Dataset):
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


def gather_bad_images(images: Any, world: World) -> list[str]:
    """Names of the images that some process could not read; all processes must call it."""
    return sorted(set().union(*world.gather(images.bad_images())))


def check_bad_images(images: Any, skip: bool) -> None:
    """Raises ValueError naming the first image that could not be read, unless they are to be skipped."""
    bad = [] if skip else images.bad_images()
    if bad:
        raise ValueError(f"{bad[0]} cannot be read as an image: mend or remove it, or go on with --skip-bad-images.")


_BUFFER = 8192  # images, still packed, among which the next one is drawn
_NAME = 255  # bytes of a name that other processes get to see


class ShardDataset(IterableDataset):
    """The images of a split, this process's and this loading process's share of them: whole shards.

    In training each share is of as many images, some of them seen twice; in evaluation every image is seen once. One
    that cannot be read is left out with a warning, and the first of each shard is among `bad_images`.

    Args:
        root: folder of the shards, beside _info.json; or what goes before their names, such as an address.
        split: a name in _info.json, or names of shards and the number of images: `train-{0000..0127}.tar|1281167`.
        classes: names of the classes in the order of their numbers.
        batch_size: images of a batch, of which a share is a multiple in training.
        seed: of the order and the augmentation.
        is_training: whether images come shuffled, and to each process as many.
        world: the processes that share the images.

    Attributes:
        length: how many images there are, or are to be seen in an epoch of training.

    Raises:
        ValueError: if the package webdataset is missing, or there is no such split.
    """

    def __init__(
        self,
        root: str,
        split: str,
        classes: list[str],
        batch_size: int,
        seed: int,
        is_training: bool,
        world: World,
    ):
        self.where = f"{root}[{split}]"
        self.classes = classes
        self.batch_size = batch_size
        self.seed = seed
        self.is_training = is_training
        self.world = world
        self.transform: Callable | None = None
        if importlib.util.find_spec("webdataset") is None:
            raise ValueError("--dataset wds needs the package webdataset: pip install webdataset.")
        try:
            self.split = create_reader("wds/", root=root, split=split, is_training=is_training).split_info
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            if isinstance(error, KeyError):
                reason = f"_info.json has no key {reason} where it is looked for"
            raise ValueError(f"webdataset shards {self.where} cannot be read: {reason}") from error
        self.urls = [os.path.join(root, name) for name in self.split.filenames]
        self.length = self.split.num_samples
        self.workers = 1
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()  # the loading processes see it too
        self._bad = torch.zeros(len(self.urls), _NAME, dtype=torch.uint8).share_memory_()

    def prepare(self, workers: int) -> None:
        """Tells how many loading processes share the images; must come before `len`.

        Raises:
            ValueError: if there are not shards enough for each of them to train on.
        """
        self.workers = max(1, workers)  # with 0 it is this process
        needed = self.workers * self.world.size
        if self.is_training and len(self.urls) < needed:
            raise ValueError(
                f"{self.where} has {len(self.urls)} shards, fewer than {self.world.size} processes x {self.workers} "
                "--workers: use fewer workers, or more shards."
            )

    def set_epoch(self, epoch: int) -> None:
        self._epoch[0] = epoch

    def __len__(self) -> int:
        """The images of this process's share in training; in evaluation those of all processes."""
        return self._per_worker() * self.workers if self.is_training else self.length

    def extent(self, is_within_epoch: bool = True) -> dict[str, int]:
        """What a run that goes on must have the same; within an epoch also what the order of the images depends on."""
        streams = {"number of processes x --workers that read shards": self.world.size * self.workers}
        return {"number of training images": self.length, **(streams if is_within_epoch else {})}

    def _per_worker(self) -> int:
        return math.ceil(self.length / (self.world.size * self.workers * self.batch_size)) * self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        worker = self.world.rank * self.workers + (info.id if info else 0)
        key = (self.seed, int(self._epoch), worker)
        random_numbers = random.Random(int(np.random.SeedSequence(key).generate_state(1)[0]))
        numbers = np.arange(len(self.urls))
        if self.is_training:
            numbers = np.random.Generator(np.random.PCG64(key[:2])).permutation(len(self.urls))
        numbers = numbers[worker :: self.world.size * self.workers].tolist()
        seen = 0
        while True:
            before = seen
            for image, target in self._read(numbers, random_numbers):
                seed_cpu(*key, seen)
                yield self.transform(image), target
                seen += 1
                if self.is_training and seen == self._per_worker():
                    return
            if not self.is_training:
                return
            if seen == before:
                raise ValueError(f"none of the images in {self.where}, shards {numbers}, can be read.")

    def _read(self, numbers: list[int], random_numbers: random.Random) -> Iterator[tuple[Image.Image, int]]:
        """Images and targets of the shards of these numbers, once; mixed up in training."""
        import webdataset

        shards = {self.urls[number]: number for number in numbers}
        stages: list[Any] = [webdataset.tarfile_to_samples(handler=lambda error: self._note_shard(shards, error))]
        if self.is_training:
            stages.append(webdataset.shuffle(_BUFFER, initial=_BUFFER // 4, rng=random_numbers))
        if not shards:
            return
        for packed in webdataset.DataPipeline(webdataset.SimpleShardList(list(shards)), *stages):
            try:
                yield self._unpack(packed)
            except (ValueError, KeyError) as error:
                self._note(shards[packed["__url__"]], f"{packed['__url__']}/{packed['__key__']}", error)

    def _unpack(self, packed: dict[str, Any]) -> tuple[Image.Image, int]:
        content = next((packed[suffix] for suffix in ("jpg", "jpeg", "png", "webp") if suffix in packed), None)
        if content is None:
            raise ValueError("it has no .jpg, .jpeg, .png or .webp")
        column = self.split.alt_label
        target = json.loads(packed["json"])[column] if column else packed["cls"]
        return read_image(io.BytesIO(content), packed["__key__"]), int(target)

    def _note_shard(self, shards: dict[str, int], error: Exception) -> bool:
        """Notes a tar file that is broken, or cannot be opened; webdataset appends its address to the error."""
        url = next((part for part in error.args if isinstance(part, str) and part in shards), None)
        self._note(shards.get(url, next(iter(shards.values()))), url or self.where, error)
        return True

    def _note(self, shard: int, name: str, error: Exception) -> None:
        logging.getLogger(__name__).warning("%s is left out: %s", name, error)
        if not self._bad[shard, 0]:
            text = name.encode()[:_NAME]
            self._bad[shard, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def bad_images(self) -> list[str]:
        """Of each shard that has any, the first image that could not be read so far, or the shard itself."""
        rows = self._bad[self._bad[:, 0] > 0].numpy()
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


_IMAGENET_NAME = "ILSVRC2012_val_{:08d}"


class RealLabelsDataset(Dataset):
    """The images of a data set, with the numbers of all classes that fit them, filled up with -1; [as many as any has].

    Images without any such class are left out of the accuracy.

    Args:
        images: ImageNet's validation images, named as they came.
        path: JSON, for each image in their order a list of numbers; timm's copy of the published file unless given.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming an image that the file has no labels of.
    """

    def __init__(self, images: Images, path: str | None = None):
        self.images = images
        self.where = f"{images.where} with real labels"
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"there is no file of labels {path}: check the path given to --real-labels.")
        text = Path(path).read_bytes() if path else pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
        labels = json.loads(text)
        numbers = {_IMAGENET_NAME.format(number): number - 1 for number in range(1, len(labels) + 1)}
        self.targets = torch.full((len(images), max(map(len, labels))), -1)
        for index in range(len(images)):
            name = PurePosixPath(images.reader.filename(index)).stem
            if name not in numbers:
                raise ValueError(f"{name} has no real labels: they are of ImageNet's validation images alone.")
            found = labels[numbers[name]]
            self.targets[index, : len(found)] = torch.tensor(found, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.images[index]
        return image, self.targets[index] if target >= 0 else torch.full_like(self.targets[index], -1)

    def bad_images(self) -> list[str]:
        return self.images.bad_images()
