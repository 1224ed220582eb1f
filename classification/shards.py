"""Webdataset shards: tar files read from end to end, as object stores and slow disks like it.

A stream cannot be entered in the middle: a run that goes on within an epoch reads again, and drops, what it has seen.
The order of the images depends on the number of processes and of --workers, which must stay the same within an epoch.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from classification.images import read_image, seed_cpu
from classification.ranks import Ranks

_BUFFER = 8192  # images, still packed, among which the next one is drawn
_NAME = 255  # bytes of a name that other processes get to see


class ShardImages(IterableDataset):
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
        ranks: the processes that share the images.

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
        ranks: Ranks,
    ):
        self.where = f"{root}[{split}]"
        self.classes = classes
        self.batch_size = batch_size
        self.seed = seed
        self.is_training = is_training
        self.ranks = ranks
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
        needed = self.workers * self.ranks.size
        if self.is_training and len(self.urls) < needed:
            raise ValueError(
                f"{self.where} has {len(self.urls)} shards, fewer than {self.ranks.size} processes x {self.workers} "
                "--workers: use fewer workers, or more shards."
            )

    def set_epoch(self, epoch: int) -> None:
        self._epoch[0] = epoch

    def __len__(self) -> int:
        """The images of this process's share in training; in evaluation those of all processes."""
        return self._per_worker() * self.workers if self.is_training else self.length

    def extent(self, is_within_epoch: bool = True) -> dict[str, int]:
        """What a run that goes on must have the same; within an epoch also what the order of the images depends on."""
        streams = {"number of processes x --workers that read shards": self.ranks.size * self.workers}
        return {"number of training images": self.length, **(streams if is_within_epoch else {})}

    def _per_worker(self) -> int:
        return math.ceil(self.length / (self.ranks.size * self.workers * self.batch_size)) * self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        worker = self.ranks.rank * self.workers + (info.id if info else 0)
        key = (self.seed, int(self._epoch), worker)
        random_numbers = random.Random(int(np.random.SeedSequence(key).generate_state(1)[0]))
        numbers = np.arange(len(self.urls))
        if self.is_training:
            numbers = np.random.Generator(np.random.PCG64(key[:2])).permutation(len(self.urls))
        numbers = numbers[worker :: self.ranks.size * self.workers].tolist()
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
