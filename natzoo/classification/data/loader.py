"""Datasets and loaders from the options, and which images each process sees, in which order."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from natzoo.classification.data.datasets import ImageDataset, SeededDataset, ShardDataset, SyntheticDataset
from natzoo.classification.data.readers import open_reader, read_class_map
from natzoo.classification.data.transforms import evaluation_transform, training_transform
from natzoo.classification.distributed import World
from natzoo.classification.signals import ignore_signals_in_worker

AnyDataset = ImageDataset | SyntheticDataset | ShardDataset


class SeededBatchSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of keys (epoch, index, view) for one process, in an order that depends on the seed and the epoch.

    Processes take the batches of the epoch in turn: two processes see in one step what one process sees in two.

    Args:
        length: number of images.
        batch_size: batch size per process.
        seed: seed of the order.
        world: the processes.
        repeats: views of an image in an epoch, which then has a part of the images (repeated augmentation).

    Attributes:
        epoch: the epoch, set before iterating.
        first: number of the first batch, set before iterating.
    """

    def __init__(self, length: int, batch_size: int, seed: int, world: World, repeats: int = 1):
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.repeats = repeats
        self.epoch = 0
        self.first = 0

    def __len__(self) -> int:
        return self.length // self.batch_size // self.world.size

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        order = self._order()
        for step in range(self.first, len(self)):
            start = (step * self.world.size + self.world.rank) * self.batch_size
            positions = range(start, start + self.batch_size)
            yield [(self.epoch, order[position], position % self.repeats) for position in positions]

    def _order(self) -> list[int]:
        """Return the images of an epoch; the views of an image follow each other."""
        if self.repeats == 1:
            return np.random.Generator(np.random.PCG64((self.seed, self.epoch))).permutation(self.length).tolist()
        images = range(self.length)
        sampler = RepeatAugSampler(images, num_replicas=1, rank=0, num_repeats=self.repeats, selected_round=0)
        sampler.set_epoch(int(np.random.SeedSequence((self.seed, self.epoch)).generate_state(1)[0]))
        return list(sampler)


def create_training_dataset(args: argparse.Namespace, world: World) -> AnyDataset:
    """Create the training dataset; `create_training_loader` sets its transform.

    Raises:
        ValueError, FileNotFoundError: if there are no images, or they cannot be read.
    """
    classes = read_class_map(args.class_map)
    if args.synthetic:
        if args.data:
            raise ValueError(f"--synthetic creates its own images; remove {args.data}.")
        return SyntheticDataset(args.synthetic, args.num_classes or len(classes or range(1000)))
    if uses_shards(args):
        return _create_shards(args, args.train_split, classes, world, is_training=True)
    columns = args.input_key, args.target_key
    return ImageDataset(open_reader(args.dataset, args.data, args.train_split, classes, columns))


def create_validation_dataset(
    args: argparse.Namespace, classes: list[str] | None, config: dict[str, Any], world: World
) -> AnyDataset:
    """Create the validation dataset, whose uint8 images `Normalize` normalizes; with --synthetic it has a single batch.

    Args:
        args: the options.
        classes: class names in the order of the class numbers; None takes them from the data.
        config: what `preprocessing` returned.
        world: the processes.

    Raises:
        ValueError, FileNotFoundError: if there are no images, or they cannot be read.
    """
    if args.synthetic:
        noise = SyntheticDataset(args.val_batch_size or args.batch_size, len(classes or ()))
        noise.create_noise(config["input_size"])
        return noise
    if uses_shards(args):
        shards = _create_shards(args, args.val_split, classes, world, is_training=False)
        shards.transform = evaluation_transform(config, normalize=False)
        return shards
    columns = args.input_key, args.target_key
    reader = open_reader(args.dataset, args.data, args.val_split, classes, columns)
    return ImageDataset(reader, evaluation_transform(config, normalize=False), replace=False)


def create_training_loader(
    args: argparse.Namespace, dataset: AnyDataset, config: dict[str, Any], world: World, pin_memory: bool
) -> DataLoader:
    """Create the loader of augmented batches, the same number per process; iterate it with `iterate_epoch`.

    Args:
        args: the options.
        dataset: what `create_training_dataset` returned.
        config: what `preprocessing` returned.
        world: the processes.
        pin_memory: whether to copy batches to pinned memory, for a GPU.

    Raises:
        ValueError: if there are not enough images for one batch per process.
    """
    if isinstance(dataset, SyntheticDataset):
        dataset.create_noise(config["input_size"])
    else:
        dataset.transform = training_transform(args, config)
    kwargs = _worker_kwargs(args.workers, pin_memory)
    if isinstance(dataset, ShardDataset):
        if args.aug_repeats > 1:
            raise ValueError("--aug-repeats requires random access, which webdataset shards lack; use folders.")
        dataset.set_workers(args.workers)
        loader = DataLoader(dataset, args.batch_size, drop_last=True, **kwargs)
    else:
        sampler = SeededBatchSampler(len(dataset), args.batch_size, args.seed, world, args.aug_repeats)
        loader = DataLoader(SeededDataset(dataset, args.seed), batch_sampler=sampler, **kwargs)
    if len(loader) == 0:
        needed = f"--batch-size {args.batch_size}" + (f" x {world.size} processes" if world.size > 1 else "")
        raise ValueError(f"{dataset.source} has {len(dataset)} images, fewer than {needed}; lower --batch-size.")
    return loader


def iterate_epoch(loader: DataLoader, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Return this process's batches of an epoch, starting with batch number `first`."""
    if isinstance(loader.dataset, ShardDataset):
        loader.dataset.set_epoch(epoch)
        batches = iter(loader)
        for _ in range(first):
            next(batches)
        return batches
    sampler: Any = loader.batch_sampler
    sampler.epoch, sampler.first = epoch, first
    return iter(loader)


def create_evaluation_loader(
    dataset: AnyDataset, batch_size: int, workers: int, pin_memory: bool, world: World | None = None
) -> DataLoader:
    """Create the loader of this process's share of the images: every `world.size`-th one, in order."""
    if isinstance(dataset, ShardDataset):
        dataset.set_workers(workers)
        return DataLoader(dataset, batch_size, **_worker_kwargs(workers, pin_memory))
    world = world or World()
    share = range(world.rank, len(dataset), world.size)
    return DataLoader(dataset, batch_size, sampler=share, **_worker_kwargs(workers, pin_memory))


def _worker_kwargs(workers: int, pin_memory: bool) -> dict[str, Any]:
    # Python 3.14 no longer forks by default; a worker would then import PyTorch again, which takes seconds.
    context = "fork" if workers > 0 and sys.platform == "linux" else None
    return {
        "num_workers": workers,
        "multiprocessing_context": context,
        "persistent_workers": workers > 0,
        "pin_memory": pin_memory,
        "worker_init_fn": ignore_signals_in_worker,
    }


def uses_shards(args: argparse.Namespace) -> bool:
    """Return whether --dataset means webdataset shards, which have class numbers but no class names."""
    return args.dataset.partition("/")[0] == "wds"


def _create_shards(
    args: argparse.Namespace, split: str, classes: list[str] | None, world: World, is_training: bool
) -> ShardDataset:
    if classes is None:
        if args.num_classes is None:
            raise ValueError("--class-map or --num-classes is required, because webdataset shards have no class names.")
        classes = [str(number) for number in range(args.num_classes)]
    schemes = args.allow_remote_shards or ()
    return ShardDataset(args.data or "", split, classes, args.batch_size, args.seed, is_training, world, schemes)
