"""What train.py is assembled from, as the options say: model, data, loss, optimizer, schedule."""

from __future__ import annotations

import argparse
import difflib
import importlib
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_info, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn

import natzoo  # noqa: F401  registers the models
from natzoo.checkpoints import DownloadError, load_weights, locate, read_weights
from natzoo.classification.data.datasets import MODEL_SEED, seed_all
from natzoo.classification.data.transforms import preprocessing
from natzoo.classification.distributed import World


def create_model(name: str, kwargs: dict[str, Any]) -> nn.Module:
    """timm.create_model with errors that help; arguments that are None are left to the model.

    Raises:
        ValueError: on a name that timm does not know, naming the nearest one; on arguments the model does not take.
    """
    if "/" not in name and not timm.is_model(name):
        nearest = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.0)
        raise ValueError(f"there is no model {name!r}: did you mean {nearest[0]!r}?")
    try:
        return timm.create_model(name, **{key: value for key, value in kwargs.items() if value is not None})
    except DownloadError:
        raise
    except OSError as error:
        url = timm.get_pretrained_cfg(name).url
        raise ValueError(
            f"{url} could not be downloaded ({error}): check the network, or get it another way."
        ) from error
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"model {name!r} cannot be made with {kwargs}: {error}.") from error


def create_training_model(
    args: argparse.Namespace, classes: list[str], world: World
) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and the record by which validate.py and predict.py build it again."""
    num_classes = args.num_classes or len(classes)
    given = {"num_classes": num_classes, "drop_path_rate": args.drop_path, "pretrained": args.pretrained or None}
    given = {key: value for key, value in given.items() if value is not None}

    def create() -> nn.Module:
        seed_all(args.seed, MODEL_SEED)
        return create_model(args.model, {**args.model_kwargs, **given})

    model = world.local_main_first(create) if args.pretrained else create()
    if args.initial_checkpoint:
        weights = read_weights(world.local_main_first(lambda: locate(args.initial_checkpoint)))
        for note in load_weights(model, weights, args.initial_checkpoint, new_classifier=True):
            world.say(f"{args.initial_checkpoint}: {note}")
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AttributeError, AssertionError) as error:
            raise ValueError(f"the model {args.model!r} cannot do with --grad-checkpointing: leave it out.") from error
    record = {
        "model": args.model,
        "model_kwargs": args.model_kwargs,
        "num_classes": num_classes,
        "classes": classes,
        "preprocessing": preprocessing(args, model),
    }
    return model, record


def create_loss(args: argparse.Namespace, num_classes: int) -> tuple[Mixup | None, nn.Module]:
    """Mixup, if any of it is on, and the loss that goes with it."""
    is_mixed = args.mixup > 0 or args.cutmix > 0
    if is_mixed and args.batch_size % 2:
        raise ValueError(f"--batch-size is {args.batch_size}, but mixup pairs images: make it even.")
    mixup = Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )
    if args.bce_loss:  # smooths by itself where there is no mixup
        loss = BinaryCrossEntropy(0.0 if is_mixed else args.smoothing, target_threshold=args.bce_target_thresh)
    elif is_mixed:
        loss = SoftTargetCrossEntropy()
    else:
        loss = nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    return mixup if is_mixed else None, loss


def peak_lr(args: argparse.Namespace, images_per_update: int) -> float:
    """--lr, scaled by the images of an update if --lr-base-size asks for that."""
    return args.lr if args.lr_base_size is None else args.lr * images_per_update / args.lr_base_size


def create_optimizer(args: argparse.Namespace, model: nn.Module, images_per_update: int) -> torch.optim.Optimizer:
    """Any of timm's optimizers; parameters of one axis and those in model.no_weight_decay() are not decayed.

    Args:
        args: the options; with --decay-rpb, what no_weight_decay() names is decayed, as in the published training.
        model: the model.
        images_per_update: of all processes, for --lr-base-size.

    Raises:
        ValueError: if there is no such optimizer here, or it does not take these options.
    """
    _check_installed(args.opt)
    lr = peak_lr(args, images_per_update)
    extra = {key: value for key, value in (("eps", args.opt_eps), ("betas", args.opt_betas)) if value is not None}
    try:
        groups = _parameter_groups(args, model, lr)
        return create_optimizer_v2(groups, args.opt, lr, weight_decay=0.0, momentum=args.momentum, **extra)
    except (AssertionError, TypeError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"the optimizer {args.opt!r} cannot be made with these options: {error}.") from error


def _parameter_groups(args: argparse.Namespace, model: nn.Module, lr: float) -> list[dict[str, Any]]:
    kept = model.no_weight_decay() if hasattr(model, "no_weight_decay") and not args.decay_rpb else ()
    if args.layer_decay is None:
        return param_groups_weight_decay(model, args.weight_decay, no_weight_decay_list=kept)
    groups = param_groups_layer_decay(model, args.weight_decay, no_weight_decay_list=kept, layer_decay=args.layer_decay)
    if args.sched == "none":  # timm's schedulers apply the scale, and to the lowest learning rate too
        for group in groups:
            group["lr"] = lr * group.pop("lr_scale")
    return groups


def _check_installed(opt: str) -> None:
    """Raises ValueError if an optimizer of another package is asked for which is not here, saying how to get it."""
    try:
        info = get_optimizer_info(opt.lower().split("_")[-1])
    except ValueError:
        return  # create_optimizer_v2 says it better
    if info.second_order:
        raise ValueError(f"--opt {opt} needs second derivatives, which attention kernels do not have: use another.")
    package = info.opt_class.split(".")[0] if isinstance(info.opt_class, str) else "torch"
    if package == "apex":
        try:
            importlib.import_module("apex.optimizers")
        except ImportError as error:
            raise ValueError(
                f"--opt {opt} needs NVIDIA's apex, which is not installed here: build it with its CUDA extensions from "
                "https://github.com/NVIDIA/apex (the package named apex on the package index is another one), or use "
                "--opt adamw, whose steps PyTorch fuses too."
            ) from error
    elif package not in ("torch", "timm"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f"--opt {opt} needs the package {package}, which is not installed here.") from error


def create_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int):
    """The scheduler of each update's learning rate, or None, and the number of epochs with the cooldown."""
    if args.sched != "none" and args.warmup_epochs >= args.epochs:
        raise ValueError(
            f"--warmup-epochs {args.warmup_epochs} leaves none of --epochs {args.epochs}: use fewer warm-up epochs."
        )
    wanted = "use cosine, poly, step, multistep or none"
    if args.sched == "plateau":
        raise ValueError("--sched plateau waits for a score, but schedules here go by updates: use cosine.")
    rate = args.decay_rate
    # Where it is not given, timm knows what suits the schedule.
    decay = {} if args.decay_epochs is None else {"decay_epochs": args.decay_epochs}
    try:
        scheduler, epochs = create_scheduler_v2(
            optimizer,
            sched=args.sched,
            num_epochs=args.epochs,
            warmup_epochs=args.warmup_epochs,
            warmup_lr=args.warmup_lr,
            min_lr=args.min_lr,
            cooldown_epochs=args.cooldown_epochs,
            decay_rate=(1.0 if args.sched == "poly" else 0.1) if rate is None else rate,
            decay_milestones=args.decay_milestones,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
            **decay,
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(f"the schedule {args.sched!r} cannot be made ({error}): {wanted}.") from error
    if scheduler is None and args.sched != "none":  # older timm say no more than that of a name they do not know
        raise ValueError(f"there is no schedule {args.sched!r}: {wanted}.")
    return scheduler, epochs
