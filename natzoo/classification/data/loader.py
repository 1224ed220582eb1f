"""Batches for each process: which images, in which order, from which place in the epoch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from natzoo.classification.data.datasets import Images, SeededDataset, ShardDataset, SyntheticDataset
from natzoo.classification.data.readers import open_reader, read_class_map
from natzoo.classification.data.transforms import evaluation_transform, training_transform
from natzoo.classification.distributed import World
from natzoo.classification.signals import ignore_signals_in_worker

TrainingImages = Images | SyntheticDataset | ShardDataset


class SeededBatchSampler(Sampler[list[tuple[int, int]]]):
    """One process's batches of keys (epoch, index), in an order that depends on the seed and the epoch.

    The epoch's batches are dealt out in turn, so that two processes see in one step what one process sees in two.
    `epoch`, and `first`, the number of the batch to begin with, are for the loop to set.
    """

    def __init__(self, length: int, batch_size: int, seed: int, world: World):
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.world = world
        self.epoch = 0
        self.first = 0

    def __len__(self) -> int:
        return self.length // self.batch_size // self.world.size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.Generator(np.random.PCG64((self.seed, self.epoch))).permutation(self.length)
        for step in range(self.first, len(self)):
            start = (step * self.world.size + self.world.rank) * self.batch_size
            yield [(self.epoch, int(index)) for index in order[start : start + self.batch_size]]


def create_training_dataset(args: argparse.Namespace, world: World) -> TrainingImages:
    """The images to train on, as the options say; the transform comes with the loader.

    Raises:
        ValueError, FileNotFoundError: if there are none.
    """
    classes = read_class_map(args.class_map)
    if args.synthetic:
        if args.data:
            raise ValueError(f"--synthetic makes images of its own: leave out {args.data}.")
        return SyntheticDataset(args.synthetic, args.num_classes or len(classes or range(1000)))
    if uses_shards(args):
        return _shards(args, args.train_split, classes, world, is_training=True)
    return Images(open_reader(args.dataset, args.data, args.train_split, classes, _columns(args)), transform=None)


def create_validation_dataset(
    args: argparse.Namespace, classes: list[str] | None, config: dict[str, Any], world: World
) -> TrainingImages:
    """The images to evaluate on, of these classes, or of those that they have; of --synthetic one batch.

    Raises:
        ValueError, FileNotFoundError: if there are none.
    """
    if args.synthetic:
        images = SyntheticDataset(args.val_batch_size or args.batch_size, len(classes))
        images.make_noise(config["input_size"])
        return images
    if uses_shards(args):
        images = _shards(args, args.val_split, classes, world, is_training=False)
        images.transform = evaluation_transform(config)
        return images
    reader = open_reader(args.dataset, args.data, args.val_split, classes, _columns(args))
    return Images(reader, evaluation_transform(config), replace=False)


def create_training_loader(
    args: argparse.Namespace, images: TrainingImages, config: dict[str, Any], world: World, pin: bool
):
    """Augmented batches of equal size, as many for each process; `iterate_epoch` begins an epoch.

    Raises:
        ValueError: if there are fewer images than a batch of each process holds.
    """
    if isinstance(images, SyntheticDataset):
        images.make_noise(config["input_size"])
    else:
        images.transform = training_transform(args, config)
    rest = _rest(args.workers, pin)
    if isinstance(images, ShardDataset):
        images.prepare(args.workers)
        loader = DataLoader(images, args.batch_size, drop_last=True, **rest)
    else:
        order = SeededBatchSampler(len(images), args.batch_size, args.seed, world)
        loader = DataLoader(SeededDataset(images, args.seed), batch_sampler=order, **rest)
    if len(loader) == 0:
        raise ValueError(
            f"{images.where} holds {len(images)} images, fewer than --batch-size {args.batch_size}"
            + (f" for each of {world.size} processes: lower it." if world.size > 1 else ": lower it.")
        )
    return loader


def iterate_epoch(loader: DataLoader, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's batches of an epoch, from the number `first` on."""
    if isinstance(loader.dataset, ShardDataset):
        loader.dataset.set_epoch(epoch)
        batches = iter(loader)
        for _ in range(first):
            next(batches)
        return batches
    loader.batch_sampler.epoch, loader.batch_sampler.first = epoch, first
    return iter(loader)


def create_evaluation_loader(
    images: TrainingImages, batch_size: int, workers: int, pin: bool, world: World | None = None
) -> DataLoader:
    """This process's share of the images, in order: every `world.size`-th one."""
    if isinstance(images, ShardDataset):
        images.prepare(workers)
        return DataLoader(images, batch_size, **_rest(workers, pin))
    world = world or World()
    share = range(world.rank, len(images), world.size)
    return DataLoader(images, batch_size, sampler=share, **_rest(workers, pin))


def _rest(workers: int, pin: bool) -> dict[str, Any]:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": pin,
        "worker_init_fn": ignore_signals_in_worker,
    }


def _columns(args: argparse.Namespace) -> tuple[str, str]:
    return args.input_key, args.target_key


def uses_shards(args: argparse.Namespace) -> bool:
    """Whether --dataset means webdataset shards, which know classes by number alone."""
    return args.dataset.partition("/")[0] == "wds"


def _shards(
    args: argparse.Namespace, split: str, classes: list[str] | None, world: World, is_training: bool
) -> ShardDataset:
    if classes is None:
        if args.num_classes is None:
            raise ValueError("webdataset shards do not tell their classes: give --class-map or --num-classes.")
        classes = [str(number) for number in range(args.num_classes)]
    return ShardDataset(args.data or "", split, classes, args.batch_size, args.seed, is_training, world)
