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
import stat
import struct
import zlib
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from natzoo.classification.data.readers import read_shards
from natzoo.classification.distributed import World
from natzoo.command_line import printable, read_json
from natzoo.images import check_image_size

# Last number of a seed, which separates the random numbers of model weights from those of training steps.
MODEL_SEED, STEP_SEED = 1, 2

# Formats of IMAGE_SUFFIXES. Pillow recognizes formats by content, and passes some others to external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
# Raised by Pillow for damaged files; MemoryError for parts that are shorter than announced.
_DECODER_ERRORS = (
    *(OSError, ValueError, TypeError, SyntaxError, LookupError, ArithmeticError, AttributeError, EOFError),
    *(struct.error, zlib.error, MemoryError, NotImplementedError, Image.DecompressionBombError),
)
_IMAGENET_NAME = "ILSVRC2012_val_{:08d}"
_SHUFFLE_BUFFER = 8192  # encoded images of shards
_MAX_PROBLEM_BYTES = 500  # of the description of a bad image in a shard, in shared memory


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

    @property
    def digest(self) -> str:
        """A hash that changes with the names and sizes of the images."""
        return self.reader.digest

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

    def first_problem(self) -> str | None:
        """Return what is wrong with the first image that could not be read, or None."""
        if not self._has_bad:
            return None
        index = int(self._is_bad.nonzero()[0])
        name = self.reader.filename(index)
        try:
            read_image(self.reader[index][0], name)
        except (OSError, ValueError) as error:
            return str(error)
        return f"{name} could not be read at first"


class SyntheticDataset(Dataset):
    """Noise, to measure training speed. Each image is a shifted copy of one fixed image.

    Args:
        length: number of images.
        num_classes: number of classes.
    """

    source = "--synthetic"
    digest = ""

    def __init__(self, length: int, num_classes: int):
        self.length = length
        self.classes = [str(number) for number in range(num_classes)]
        self.noise = torch.empty(0)

    def create_noise(self, input_size: list[int]) -> None:
        """Draw the fixed image.

        Args:
            input_size: [channels, height, width] in pixels.
        """
        self.noise = torch.randint(256, input_size, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.noise.roll(index, dims=-1), index % len(self.classes)

    def resume_key(self, is_within_epoch: bool = True) -> dict[str, int]:
        return {"number of training images": len(self)}

    def bad_images(self) -> list[str]:
        return []

    def first_problem(self) -> str | None:
        return None


class SeededDataset(Dataset):
    """Images by (epoch, index, view), which also seed their augmentation."""

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int]:
        epoch, index, view = key
        seed_cpu(self.seed, epoch, index, *((view,) if view else ()))  # the first view is that of no repetition
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
            labels = read_json(Path(path), "use a JSON file, or no value for timm's copy", "--real-labels", limit=2**28)
        else:
            labels = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json") or b"")
        _check_real_labels(labels, path, len(dataset.classes))
        indices = {_IMAGENET_NAME.format(number): number - 1 for number in range(1, len(labels) + 1)}
        self.targets = torch.full((len(dataset), max(1, *map(len, labels))), -1)
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

    def first_problem(self) -> str | None:
        return self.dataset.first_problem()


def _check_real_labels(labels: Any, path: str | None, num_classes: int) -> None:
    """Raise ValueError unless the content of a file is a list of lists of class numbers."""
    path = path or "(timm's copy)"
    if not isinstance(labels, list) or not labels:
        raise ValueError(f"--real-labels {path} is not a list with a list of class numbers per image.")
    for number, row in enumerate(labels):
        is_list = isinstance(row, list) and len(row) <= num_classes
        if not is_list or not all(type(item) is int and 0 <= item < num_classes for item in row):
            raise ValueError(
                f"--real-labels {path} has {row!r:.100} in row {number}; it must be a list of class numbers from 0 to "
                f"{num_classes - 1}."
            )


class ShardDataset(IterableDataset):
    """A stream of webdataset shards: tar files read sequentially, as object stores and slow disks prefer.

    Each process and each of its data-loading workers reads whole shards of its own. In training every worker yields the
    same number of images, and repeats some of them if necessary. In evaluation every image is read once. Unreadable
    images are skipped with a warning; `bad_images` names the first one of each shard.

    A stream cannot start in the middle: a run that resumes within an epoch reads and drops what it has already seen.
    The order depends on the number of processes and workers, which must not change within an epoch.

    Args:
        root, split: as for `read_shards`.
        classes: class names in the order of the class numbers.
        batch_size: batch size; the number of training images per worker is a multiple of it.
        seed: seed of order and augmentation.
        is_training: whether to shuffle and to yield the same number of images per worker.
        world: the processes.
        schemes: schemes of shards that are not files in `root`, which are allowed.

    Attributes:
        length: number of images; writable, for measurements on part of an epoch.
        digest: a hash that changes with the shards.

    Raises:
        ValueError, FileNotFoundError: if webdataset is not installed, or as raised by `read_shards`.
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
        schemes: Collection[str] = (),
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
        self.shards = read_shards(root, split, schemes)
        self.urls, self.length, self.digest = self.shards.urls, self.shards.num_samples, self.shards.digest
        self.workers = 1
        # In shared memory, for data-loading workers.
        self._epoch = torch.zeros(1, dtype=torch.long).share_memory_()
        self._bad = torch.zeros(len(self.urls), _MAX_PROBLEM_BYTES, dtype=torch.uint8).share_memory_()

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
                yield self._decode(sample, f"{sample['__url__']}/{sample['__key__']}")
            except ValueError as error:
                self._record(numbers[sample["__url__"]], str(error))

    def _decode(self, sample: dict[str, Any], name: str) -> tuple[Image.Image, int]:
        content = next((sample[suffix] for suffix in ("jpg", "jpeg", "png", "webp") if suffix in sample), None)
        if content is None:
            raise ValueError(f"{name} has no .jpg, .jpeg, .png or .webp.")
        return read_image(io.BytesIO(content), name), self._label(sample, name)

    def _label(self, sample: dict[str, Any], name: str) -> int:
        """Return the class number of a sample.

        Raises:
            ValueError: if it has none, or none of `classes`.
        """
        key = self.shards.label_key
        try:
            label = json.loads(sample["json"])[key] if key else sample["cls"].decode()
            number = int(label) if isinstance(label, str) else label
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"{name} has no class number in {f'.json under {key!r}' if key else '.cls'}.") from error
        if type(number) is not int or not 0 <= number < len(self.classes):
            raise ValueError(f"{name} has the class {number!r:.50}, which is not from 0 to {len(self.classes) - 1}.")
        return number

    def _record_shard(self, numbers: dict[str, int], error: Exception) -> bool:
        """Record a shard that cannot be opened or is damaged; webdataset appends its URL to the error."""
        url = next((part for part in error.args if isinstance(part, str) and part in numbers), None)
        number = next(iter(numbers.values())) if url is None else numbers[url]
        reason = next((part for part in error.args if isinstance(part, str) and part != url), type(error).__name__)
        self._record(number, f"{url or self.source} cannot be read as a tar file: {reason}.")
        return True

    def _record(self, shard: int, problem: str) -> None:
        logging.getLogger(__name__).warning("skipping %s", printable(problem))
        if not self._bad[shard, 0]:
            text = problem.encode(errors="surrogateescape")[:_MAX_PROBLEM_BYTES]
            self._bad[shard, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def bad_images(self) -> list[str]:
        """Return what is wrong with the first unreadable image of each shard, or with the shard itself."""
        rows = self._bad[self._bad[:, 0] > 0].numpy()
        return [bytes(row).rstrip(b"\0").decode(errors="surrogateescape") for row in rows]

    def first_problem(self) -> str | None:
        return next(iter(self.bad_images()), None)


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
        ValueError: if the file is missing, damaged, not an image, or one of more pixels or another shape than
            `check_image_size` allows.
    """
    try:
        if isinstance(file, (str, Path)) and not stat.S_ISREG(os.stat(file).st_mode):
            raise OSError("it is not a regular file")
        with Image.open(file, formats=_FORMATS) as image:
            check_image_size(*image.size)
            return _to_8_bits(image).convert("RGB")
    except _DECODER_ERRORS as error:
        is_unknown = isinstance(error, UnidentifiedImageError)
        reason = "its format is unknown" if is_unknown else str(error).rstrip(".") or type(error).__name__
        raise ValueError(f"{name or file} cannot be read as an image: {reason}.") from error


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
    problem = None if skip else dataset.first_problem()
    if problem is not None:
        raise ValueError(f"{problem.rstrip('.')}; repair or remove it, or continue with --skip-bad-images.")
