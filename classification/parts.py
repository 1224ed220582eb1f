"""What train.py is assembled from, as the options say: model, data, loss, optimizer, schedule."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from timm.data import Mixup, create_transform
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.utils.data import DataLoader

from classification.images import (
    MODEL_SEED,
    FolderImages,
    evaluation_loader,
    seed_all,
    split_folder,
    training_loader,
)
from classification.models import create_model, evaluation_transform, preprocessing
from natzoo.checkpoints import load_weights, read_weights


def build_model(args: argparse.Namespace, classes: list[str], device: torch.device) -> tuple[nn.Module, dict[str, Any]]:
    """The model on its device, and the record by which validate.py and predict.py build it again."""
    seed_all(args.seed, MODEL_SEED)
    num_classes = args.num_classes or len(classes)
    given = {"num_classes": num_classes, "drop_path_rate": args.drop_path, "pretrained": args.pretrained or None}
    given = {key: value for key, value in given.items() if value is not None}
    model = create_model(args.model, {**args.model_kwargs, **given})
    if args.initial_checkpoint:
        weights = read_weights(args.initial_checkpoint)
        for note in load_weights(model, weights, args.initial_checkpoint, new_classifier=True):
            print(f"{args.initial_checkpoint}: {note}")
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    record = {
        "model": args.model,
        "model_kwargs": args.model_kwargs,
        "num_classes": num_classes,
        "classes": classes,
        "preprocessing": preprocessing(args, model),
    }
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    return model.to(device, memory_format=memory_format), record


def build_loaders(
    args: argparse.Namespace, train: FolderImages, record: dict[str, Any], device: torch.device
) -> tuple[DataLoader, DataLoader]:
    """The loaders of training and of validation batches."""
    config = record["preprocessing"]
    try:
        train.transform = create_transform(
            config["input_size"],
            is_training=True,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            auto_augment=None if args.aa == "none" else args.aa,
            interpolation=args.train_interpolation,
            mean=config["mean"],
            std=config["std"],
            re_prob=args.reprob,
            re_mode=args.remode,
        )
    except AssertionError as error:
        raise ValueError(f"--aa {args.aa} is not an augmentation that timm knows: try rand-m9-mstd0.5-inc1.") from error
    val_folder = split_folder(args.data, args.val_split)
    val = FolderImages(val_folder, train.classes, evaluation_transform(config), replace=False)
    pin_memory = device.type == "cuda"
    return (
        training_loader(train, args.batch_size, args.workers, args.seed, pin_memory),
        evaluation_loader(val, args.val_batch_size or args.batch_size, args.workers, pin_memory),
    )


def build_loss(args: argparse.Namespace, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """Mixup, if any of it is on, and the loss that goes with it."""
    if args.mixup <= 0 and args.cutmix <= 0:
        return None, nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    if args.batch_size % 2:
        raise ValueError(f"--batch-size is {args.batch_size}, but mixup pairs images: make it even.")
    mixup = Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )
    return mixup, SoftTargetCrossEntropy()


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Any of timm's optimizers; parameters of one axis and those in model.no_weight_decay() are not decayed."""
    extra = {"eps": args.opt_eps, "betas": args.opt_betas, "layer_decay": args.layer_decay}
    extra = {key: value for key, value in extra.items() if value is not None}
    try:
        return create_optimizer_v2(model, args.opt, args.lr, args.weight_decay, args.momentum, **extra)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"the optimizer {args.opt!r} cannot be made with these options: {error}.") from error


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int):
    """The scheduler of each update's learning rate, or None, and the number of epochs with the cooldown."""
    if args.sched != "none" and args.warmup_epochs >= args.epochs:
        raise ValueError(
            f"--warmup-epochs {args.warmup_epochs} leaves none of --epochs {args.epochs}: use fewer warm-up epochs."
        )
    try:
        return create_scheduler_v2(
            optimizer,
            sched=args.sched,
            num_epochs=args.epochs,
            warmup_epochs=args.warmup_epochs,
            warmup_lr=args.warmup_lr,
            min_lr=args.min_lr,
            cooldown_epochs=args.cooldown_epochs,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(f"the schedule {args.sched!r} cannot be made: use cosine, poly, step or none.") from error
