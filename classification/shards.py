"""Webdataset shards: tar files read from end to end, as object stores and slow disks like it, through timm's reader.

A stream cannot be entered in the middle: a run that goes on within an epoch reads again, and drops, what it has seen.
The order of the images depends on the number of processes and of --workers, which must stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import IterableDataset

from classification.images import seed_all


class ShardImages(IterableDataset):
    """The images of a split, this process's and this loader's share of them.

    Images that cannot be read are left out by the reader, with a warning.

    Args:
        root: folder of the shards, beside _info.json; or what goes before their names, such as an address.
        split: a name in _info.json, or names of shards and the number of images: `train-{0000..0127}.tar|1281167`.
        classes: names of the classes in the order of their numbers.
        batch_size: images of a batch, of which a share is a multiple in training.
        seed: of the order and the augmentation.
        is_training: whether images come shuffled, and to each process as many.

    Raises:
        ValueError: if the package webdataset is missing, or there is no such split.
    """

    def __init__(self, root: str, split: str, classes: list[str], batch_size: int, seed: int, is_training: bool):
        self.where = f"{root}[{split}]"
        self.classes = classes
        self.transform: Callable | None = None
        self.seed = seed
        try:
            self._reader = create_reader(
                "wds/", root=root, split=split, is_training=is_training, batch_size=batch_size, seed=seed
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"webdataset shards {self.where} cannot be read: {reason}") from error

    def prepare(self, workers: int) -> None:
        """Tells how many loading processes share the images; must come before `len`."""
        self._reader.set_loader_cfg(num_workers=workers)

    def set_epoch(self, epoch: int) -> None:
        self._reader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._reader)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        reader = self._reader
        reader._lazy_init()  # tells the reader which loading process it is in
        key = (self.seed, reader.epoch_count.value, reader.global_worker_id)  # the epoch is shared with all of them
        # The shuffling buffer's random numbers would go on from epoch to epoch: it is made anew, from the epoch's seed.
        reader.worker_seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        reader.ds = None
        for number, (image, target) in enumerate(reader):
            seed_all(*key, number)
            yield self.transform(image), target

    def bad_images(self) -> list[str]:
        return []
