"""Webdataset shards: tar files read from end to end, as object stores and slow disks like it, through timm's reader.

A stream cannot be entered in the middle: a run that goes on within an epoch reads again, and drops, what it has seen.
The order of the images depends on the number of processes and of --workers, which must stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from timm.data.readers import create_reader
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

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
        self.epoch = 0
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
        self.epoch = epoch
        self._reader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._reader)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = get_worker_info()
        epoch = self._reader.epoch_count.value  # shared with the processes that live on
        for number, (image, target) in enumerate(self._reader):
            seed_all(self.seed, epoch, 0 if worker is None else worker.id, number)
            yield self.transform(image), target

    def bad_images(self) -> list[str]:
        return []
