"""Datasets of images with random access, and streams of webdataset shards.

All randomness depends only on the seed, the epoch and the index of an image, so an interrupted run continues exactly as
it would have, with any number of data-loading workers. Transforms must therefore keep no state. Datasets record images
that cannot be read; `check_bad_images` raises the error.
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
from natzoo.command_line import require_file

# Last number of a seed, which separates the random numbers of model weights from those of training steps.
MODEL_SEED, STEP_SEED = 1, 2

_IMAGENET_NAME = "ILSVRC2012_val_{:08d}"
_SHUFFLE_BUFFER = 8192  # encoded images of shards
_MAX_NAME_BYTES = 255  # of a bad image in a shard, in shared memory


# ----- datasets ------------------------------------------------------------------------------------------------------


class ImageDataset(Dataset):
    """The transformed images of a reader.

    Args:
        reader: a reader of readers.py.
        transform: turns a PIL image in RGB into a tensor; may be set later.
        replace: replace an image that cannot be read with the next one; if False, with a black one with target -1.
    """

    def __init__(self, reader: Any, transform: Callable | None = None, replace: bool = True):
        self.reader = reader
        self.transform = transform or _no_transform
        self.replace = replace
        # In shared memory, because data-loading workers record bad images too.
        self._is_bad = torch.zeros(len(reader), dtype=torch.bool).share_memory_()
        self._has_bad = torch.zeros(1, dtype=torch.bool).share_memory_()  # cheap to check after each batch

    @property
    def classes(self) -> list[str]:
        return self.reader.classes

    @property
    def source(self) -> str:
        return self.reader.source

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        for candidate in (number % len(self) for number in range(index, index + len(self))):
            try:
                file, target = self.reader[candidate]
                image = read_image(file)
            except (OSError, ValueError):  # raised by `read_image` and the readers
                self._is_bad[candidate] = True
                self._has_bad[0] = True
                if self.replace:
                    continue
                image, target = Image.new("RGB", (64, 64)), -1
            return self.transform(image), target
        raise ValueError(f"{self.source} has no readable image among {len(self)}.")

    def resume_key(self, is_within_epoch: bool = True) -> dict[str, int]:
        """Return the values that a resumed run must share, within an epoch or between epochs; kept in checkpoints."""
        return {"number of training images": len(self)}

    def bad_images(self) -> list[str]:
        """Return the names of the images that could not be read so far, in this process and its workers."""
        if not self._has_bad:
            return []
        return [self.reader.filename(index) for index in self._is_bad.nonzero().flatten().tolist()]


class SyntheticDataset(Dataset):
    """Noise, to measure training speed. Each image is a shifted copy of one fixed image.

    Args:
        length: number of images.
        num_classes: number of classes.
    """

    source = "--synthetic"

    def __init__(self, length: int, num_classes: int):
        self.length = length
        self.classes = [str(number) for number in range(num_classes)]
        self.noise = torch.empty(0)

    def create_noise(self, input_size: list[int]) -> None:
        """Draw the fixed image.

        Args:
            input_size: [channels, height, width] in pixels.
        """
        self.noise = torch.randn(input_size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.noise.roll(index, dims=-1), index % len(self.classes)

    def resume_key(self, is_within_epoch: bool = True) -> dict[str, int]:
        return {"number of training images": len(self)}

    def bad_images(self) -> list[str]:
        return []


class SeededDataset(Dataset):
    """Images by (epoch, index), which also seed their augmentation."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        seed_cpu(self.seed, epoch, index)
        return self.dataset[index]


class RealLabelsDataset(Dataset):
    """ImageNet's validation images with all labels that apply ("Are we done with ImageNet?", arXiv:2006.07159).

    Targets are class numbers padded with -1 to the largest number of labels. Images without labels do not count towards
    the accuracy.

    Args:
        dataset: ImageNet's validation images with their original file names.
        path: JSON file with a list of class numbers per image, in order; timm's copy of the published file if None.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if an image has no entry.
    """

    def __init__(self, dataset: ImageDataset, path: str | None = None):
        self.dataset = dataset
        self.source = f"{dataset.source} with real labels"
        if path:
            require_file(Path(path), "use a JSON file, or no value for timm's copy", "--real-labels")
        text = Path(path).read_bytes() if path else pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
        labels = json.loads(text or b"")
        indices = {_IMAGENET_NAME.format(number): number - 1 for number in range(1, len(labels) + 1)}
        self.targets = torch.full((len(dataset), max(map(len, labels))), -1)
        for index in range(len(dataset)):
            name = PurePosixPath(dataset.reader.filename(index)).stem
            if name not in indices:
                raise ValueError(f"{name} has no real labels; --real-labels requires ImageNet's validation images.")
            found = labels[indices[name]]
            self.targets[index, : len(found)] = torch.tensor(found, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.dataset[index]
        return image, self.targets[index] if target >= 0 else torch.full_like(self.targets[index], -1)

    def bad_images(self) -> list[str]:
        return self.dataset.bad_images()


class ShardDataset(IterableDataset):
    """A stream of webdataset shards: tar files read sequentially, as object stores and slow disks prefer.

    Each process and each of its data-loading workers reads whole shards of its own. In training every worker yields the
    same number of images, and repeats some of them if necessary. In evaluation every image is read once. Unreadable
    images are skipped with a warning; `bad_images` names the first one of each shard.

    A stream cannot start in the middle: a run that resumes within an epoch reads and drops what it has already seen.
    The order depends on the number of processes and workers, which must not change within an epoch.

    Args:
        root: folder of the shards and _info.json, or a prefix of the shard names such as a URL.
        split: a split of _info.json, or shard names and a number of images: `train-{0000..0127}.tar|1281167`.
        classes: class names in the order of the class numbers.
        batch_size: batch size; the number of training images per worker is a multiple of it.
        seed: seed of order and augmentation.
        is_training: whether to shuffle and to yield the same number of images per worker.
        world: the processes.

    Attributes:
        length: number of images; writable, for measurements on part of an epoch.

    Raises:
        ValueError: if webdataset is not installed, or the split does not exist.
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
        self.source = f"{root}[{split}]"
        self.classes = classes
        self.batch_size = batch_size
        self.seed = seed
        self.is_training = is_training
        self.world = world
        self.transform: Callable = _no_transform
        if importlib.util.find_spec("webdataset") is None:
            raise ValueError("--dataset wds requires the package webdataset; run pip install webdataset.")
        try:
            self.split = create_reader("wds/", root=root, split=split, is_training=is_training).split_info
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            if isinstance(error, KeyError):
                reason = f"_info.json has no key {reason} where it is expected"
            raise ValueError(f"{self.source} cannot be read as webdataset shards: {reason}") from error
        self.urls = [os.path.join(root, name) for name in self.split.filenames]
        self.length = self.split.num_samples
        self.workers = 1
        # In shared memory, for data-loading workers.
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        self._bad = torch.zeros(len(self.urls), _MAX_NAME_BYTES, dtype=torch.uint8).share_memory_()

    def set_workers(self, workers: int) -> None:
        """Set the number of data-loading workers; call it before `len`.

        Raises:
            ValueError: if there are fewer training shards than workers of all processes.
        """
        self.workers = max(1, workers)  # without workers, this process reads
        needed = self.workers * self.world.size
        if self.is_training and len(self.urls) < needed:
            raise ValueError(
                f"{self.source} has {len(self.urls)} shards, fewer than {self.world.size} processes x {self.workers} "
                "--workers; use fewer workers or more shards."
            )

    def set_epoch(self, epoch: int) -> None:
        self._epoch[0] = epoch

    def __len__(self) -> int:
        """Return the number of images of this process in training, of all processes in evaluation."""
        return self._images_per_worker() * self.workers if self.is_training else self.length

    def resume_key(self, is_within_epoch: bool = True) -> dict[str, int]:
        """Return the values that a resumed run must share; within an epoch including the number of streams."""
        streams = {"number of processes x --workers that read shards": self.world.size * self.workers}
        return {"number of training images": self.length, **(streams if is_within_epoch else {})}

    def _images_per_worker(self) -> int:
        return math.ceil(self.length / (self.world.size * self.workers * self.batch_size)) * self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        worker = self.world.rank * self.workers + (info.id if info else 0)
        key = (self.seed, int(self._epoch), worker)
        generator = random.Random(int(np.random.SeedSequence(key).generate_state(1)[0]))
        shards = np.arange(len(self.urls))
        if self.is_training:
            shards = np.random.Generator(np.random.PCG64(key[:2])).permutation(len(self.urls))
        shards = shards[worker :: self.world.size * self.workers].tolist()
        count = 0
        while True:
            previous = count
            for image, target in self._read(shards, generator):
                seed_cpu(*key, count)
                yield self.transform(image), target
                count += 1
                if self.is_training and count == self._images_per_worker():
                    return
            if not self.is_training:
                return
            if count == previous:
                raise ValueError(f"{self.source} has no readable image in the shards {shards}.")

    def _read(self, shards: list[int], generator: random.Random) -> Iterator[tuple[Image.Image, int]]:
        """Yield the images and targets of some shards once, shuffled in training."""
        import webdataset

        numbers = {self.urls[number]: number for number in shards}
        stages: list[Any] = [webdataset.tarfile_to_samples(handler=lambda error: self._record_shard(numbers, error))]
        if self.is_training:
            stages.append(webdataset.shuffle(_SHUFFLE_BUFFER, initial=_SHUFFLE_BUFFER // 4, rng=generator))
        if not numbers:
            return
        for sample in webdataset.DataPipeline(webdataset.SimpleShardList(list(numbers)), *stages):
            try:
                yield self._decode(sample)
            except (ValueError, KeyError) as error:
                self._record(numbers[sample["__url__"]], f"{sample['__url__']}/{sample['__key__']}", error)

    def _decode(self, sample: dict[str, Any]) -> tuple[Image.Image, int]:
        content = next((sample[suffix] for suffix in ("jpg", "jpeg", "png", "webp") if suffix in sample), None)
        if content is None:
            raise ValueError("no .jpg, .jpeg, .png or .webp")
        column = self.split.alt_label
        target = json.loads(sample["json"])[column] if column else sample["cls"]
        return read_image(io.BytesIO(content), sample["__key__"]), int(target)

    def _record_shard(self, numbers: dict[str, int], error: Exception) -> bool:
        """Record a shard that cannot be opened or is damaged; webdataset appends its URL to the error."""
        url = next((part for part in error.args if isinstance(part, str) and part in numbers), None)
        number = next(iter(numbers.values())) if url is None else numbers[url]
        self._record(number, url or self.source, error)
        return True

    def _record(self, shard: int, name: str, error: Exception) -> None:
        logging.getLogger(__name__).warning("skipping %s: %s", name, error)
        if not self._bad[shard, 0]:
            text = name.encode()[:_MAX_NAME_BYTES]
            self._bad[shard, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def bad_images(self) -> list[str]:
        """Return the first unreadable image of each shard, or the shard itself."""
        rows = self._bad[self._bad[:, 0] > 0].numpy()
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def _no_transform(image: Image.Image) -> Tensor:
    raise RuntimeError("transform is not set; create_training_loader sets it")


# ----- random seeds --------------------------------------------------------------------------------------------------


def seed_cpu(*key: int) -> int:
    """Seed Python, NumPy and torch's CPU generator from a tuple of numbers, and return torch's seed.

    Per image this is 20 times faster than `seed_all`, which also seeds the generators of all devices.
    """
    python, numpy, torch_seed = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(torch_seed)
    return torch_seed


def seed_all(*key: int) -> None:
    """Seed Python, NumPy and torch on all devices from a tuple of numbers."""
    torch.manual_seed(seed_cpu(*key))


# ----- images --------------------------------------------------------------------------------------------------------


def read_image(file: str | Path | BinaryIO, name: str | Path | None = None) -> Image.Image:
    """Read an image in RGB.

    Args:
        file: path or open file.
        name: name for the message; the path if None.

    Raises:
        ValueError: if the file is missing, damaged or not an image.
    """
    try:
        with Image.open(file) as image:
            return _to_8_bits(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, TypeError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name or file} cannot be read as an image: {error}.") from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray images to 8 bits; Pillow would clip them at 255."""
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if image.mode == "I" and pixels.max() <= 255:  # 32 bits per pixel with an unknown range
        return image
    return Image.fromarray((pixels.clip(0, 65535) // 257).astype(np.uint8))


def gather_bad_images(dataset: Any, world: World) -> list[str]:
    """Return the names of the images that any process could not read. All processes must call it."""
    return sorted(set().union(*world.gather(dataset.bad_images())))


def check_bad_images(dataset: Any, skip: bool) -> None:
    """Raise ValueError naming the first image that could not be read, unless `skip` is set."""
    bad = [] if skip else dataset.bad_images()
    if bad:
        raise ValueError(
            f"{bad[0]} cannot be read as an image; repair or remove it, or continue with --skip-bad-images."
        )
