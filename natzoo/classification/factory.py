"""Create the model, the loss, the optimizer and the learning-rate schedule of a run from its options."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import re
from contextlib import nullcontext
from typing import Any

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, get_optimizer_info, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

import natzoo  # noqa: F401  registers the models
from natzoo.checkpoints import DownloadError, load_weights, locate, read_checkpoint, weights_of
from natzoo.checkpoints.record import RECORD
from natzoo.checkpoints.sources import local_files_if_offline
from natzoo.classification.data.datasets import MODEL_SEED, seed_all
from natzoo.classification.data.transforms import preprocessing, requested_channels
from natzoo.classification.distributed import World
from natzoo.classification.freezing import freeze
from natzoo.command_line import closest
from natzoo.models._layers import Classifier
from natzoo.schema import shown

# Prefixes of models that timm does not register: on the Hugging Face hub, or in a folder.
SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")
# An nn.Module with attributes of timm's models, such as num_classes, which type checkers do not know.
TimmModel = Any


def create_model(name: str, kwargs: dict[str, Any]) -> TimmModel:
    """Create a model with timm.create_model; arguments that are None keep the model's defaults.

    Raises:
        ValueError: if timm does not know the name (the message suggests the closest one), if the weights cannot be
            downloaded, or if the model does not accept the arguments.
    """
    if not name.startswith(SOURCES) and not timm.is_model(name):
        closest = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.0)
        raise ValueError(f"--model {name} is unknown; did you mean {closest[0]}?")
    try:
        with local_files_if_offline() if name.startswith(SOURCES[:2]) else nullcontext():
            return timm.create_model(name, **{key: value for key, value in kwargs.items() if value is not None})
    except DownloadError:
        raise
    except OSError as error:
        url = timm.get_pretrained_cfg(name).url if timm.is_model(name) else f"--model {name}"
        raise ValueError(f"{url} could not be downloaded or read ({error}); check the name and the network.") from error
    except Exception as error:  # models raise errors of many kinds for wrong arguments
        if isinstance(error, ValueError) and kwargs.get("pretrained"):  # it names the weights
            raise
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown:
            raise ValueError(
                f"--model {name} has no argument {unknown[1]}; {_arguments_like(unknown[1], name)}"
            ) from error
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise ValueError(f"--model {name} cannot be created with {shown(kwargs)}: {reason}.") from error


def _arguments_like(word: str, name: str) -> str:
    """Return a hint which argument of a model the user may have meant."""
    with torch.device("meta"):
        arguments = list(inspect.signature(type(timm.create_model(name))).parameters)
    found = closest(word, arguments)
    return f"did you mean {' or '.join(found)}?" if found else f"it has {', '.join(arguments)}."


def input_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """Return --model-kwargs, with what --in-chans, --img-size and --input-size mean for the model.

    Models of a fixed size, such as Swin, are created for the size of the images; others accept any size.

    Raises:
        ValueError: if the options disagree.
    """
    kwargs = dict(args.model_kwargs)
    channels = requested_channels(args)
    if channels not in (None, 3):
        kwargs["in_chans"] = channels
    size = args.input_size[1:] if args.input_size else [args.img_size] * 2 if args.img_size else None
    cfg = timm.get_pretrained_cfg(args.model) if args.model and timm.is_model(args.model) else None
    if size and cfg and cfg.fixed_input_size and list(cfg.input_size[1:]) != size:
        kwargs.setdefault("img_size", tuple(size))
    return kwargs


def check_input_size(model: TimmModel, config: dict[str, Any]) -> None:
    """Check that a model of timm takes images of another size than its own, by trying; ours accept any size.

    Args:
        model: the model.
        config: what `preprocessing` returned.

    Raises:
        ValueError: if it does not.
    """
    size = config["input_size"]
    if isinstance(model, Classifier) or size[1:] == list(model.pretrained_cfg.get("input_size", ())[1:]):
        return
    parameter, is_training = next(model.parameters()), model.training
    try:
        with torch.no_grad():
            model.eval()(parameter.new_zeros(1, *size))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or ["timm does not say why"])[0].rstrip(".")
        raise ValueError(
            f"--img-size: the model does not take images of {size[1]}x{size[2]} pixels: {reason}."
        ) from error
    finally:
        model.train(is_training)


def describe_model(name: str, kwargs: dict[str, Any]) -> str:
    """Return the name of a model and its arguments, for messages."""
    text = ", ".join(f"{key}={value}" for key, value in kwargs.items() if value is not None)
    return f"{name} ({text})" if text else name


def create_training_model(
    args: argparse.Namespace, classes: list[str], world: World, device: torch.device
) -> tuple[TimmModel, dict[str, Any]]:
    """Create the model of a run with its initial weights, on the CPU.

    Args:
        args: the options.
        classes: class names in the order of the class numbers.
        world: the processes.
        device: device of the training.

    Returns:
        the model, and the record from which validate.py and predict.py create it again.

    Raises:
        ValueError: if the model cannot be created or does not take the images, the weights do not fit, or an option
            does not fit the model or the device.
        FileNotFoundError: if the file of --initial-checkpoint does not exist.
    """
    num_classes = args.num_classes or len(classes)
    kwargs = {"num_classes": num_classes, "drop_path_rate": args.drop_path, "pretrained": args.pretrained or None}
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    model_kwargs = input_kwargs(args)

    def create() -> TimmModel:
        seed_all(args.seed, MODEL_SEED)
        return create_model(args.model, {**model_kwargs, **kwargs})

    model = world.local_main_first(create) if args.pretrained else create()
    config = preprocessing(args, model)
    check_input_size(model, config)
    if args.img_size_start:
        if args.img_size_start > min(config["input_size"][1:]):
            raise ValueError(f"--img-size-start {args.img_size_start} exceeds the size of the images; lower it.")
        check_input_size(model, {**config, "input_size": [config["input_size"][0], *[args.img_size_start] * 2]})
    if args.initial_checkpoint:
        path = world.local_main_first(lambda: locate(args.initial_checkpoint))
        checkpoint = read_checkpoint(path)
        source = dict.get(checkpoint, RECORD)
        name = source.get("model") if isinstance(source, dict) else None
        name = name if isinstance(name, str) and timm.is_model(name) else None
        world.print(f"Initial weights: {args.initial_checkpoint}{f' of the model {name}' if name else ''}")
        for note in load_weights(model, weights_of(checkpoint, path), args.initial_checkpoint, new_classifier=True):
            world.print(f"{args.initial_checkpoint}: {note}")
    if args.sync_bn:
        if device.type != "cuda":
            raise ValueError("--sync-bn requires GPUs, because PyTorch supports it only there; remove it.")
        model = convert_sync_batchnorm(model)
    freeze(args, model)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing()
        except (AttributeError, AssertionError) as error:
            raise ValueError(f"--grad-checkpointing is not supported by the model {args.model}.") from error
    record = {
        "model": args.model,
        "model_kwargs": model_kwargs,
        "num_classes": num_classes,
        "classes": classes,
        "preprocessing": config,
    }
    return model, record


def create_loss(args: argparse.Namespace, num_classes: int, dataset: Any = None) -> tuple[Mixup | None, nn.Module]:
    """Create timm's Mixup and the loss that fits its targets.

    Args:
        args: the options.
        num_classes: number of classes of the model.
        dataset: the training dataset, for --class-weights balanced.

    Returns:
        Mixup (None if mixup and cutmix are off), and the loss.

    Raises:
        ValueError: if mixup or cutmix is on and the batch size is odd, or --class-weights does not fit the classes.
    """
    weights = class_weights(args, num_classes, dataset)
    is_mixed = args.mixup > 0 or args.cutmix > 0
    if is_mixed and args.batch_size % 2:
        raise ValueError(f"--batch-size {args.batch_size} is odd, but mixup pairs images; use an even number.")
    mixup = Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )
    if args.bce_loss:  # without mixup, the loss smooths the labels itself
        loss = BinaryCrossEntropy(
            0.0 if is_mixed else args.smoothing, target_threshold=args.bce_target_thresh, weight=weights
        )
    elif is_mixed and weights is None:
        loss = SoftTargetCrossEntropy()
    else:
        loss = nn.CrossEntropyLoss(weights, label_smoothing=0.0 if is_mixed else args.smoothing)
    return mixup if is_mixed else None, loss


def class_weights(args: argparse.Namespace, num_classes: int, dataset: Any) -> Tensor | None:
    """Return the weights of --class-weights, [classes] in float32; None without the option.

    "balanced" is scikit-learn's: images / (classes * images of the class).

    Raises:
        ValueError: if their number is not that of the classes, or the dataset cannot count its images per class.
    """
    values = args.class_weights
    if values is None:
        return None
    if values == ["balanced"]:
        labels = getattr(getattr(dataset, "reader", None), "targets", None)
        if labels is None:
            raise ValueError("--class-weights balanced requires folders or tar files of images; list the weights.")
        from sklearn.utils.class_weight import compute_class_weight

        found = np.unique(labels)
        weights = torch.zeros(num_classes)  # of classes without images
        balanced = compute_class_weight("balanced", classes=found, y=np.asarray(labels))
        weights[torch.from_numpy(found)] = torch.from_numpy(balanced).float()
        return weights
    if "balanced" in values or len(values) != num_classes:
        raise ValueError(
            f"--class-weights has {len(values)} values for {num_classes} classes; use one per class, or balanced."
        )
    return torch.tensor(values, dtype=torch.float32)


def peak_lr(args: argparse.Namespace, images_per_update: int) -> float:
    """Return --lr, scaled by the number of images per update if --lr-base-size is given."""
    return args.lr if args.lr_base_size is None else args.lr * images_per_update / args.lr_base_size


def create_optimizer(args: argparse.Namespace, model: TimmModel, images_per_update: int) -> torch.optim.Optimizer:
    """Create one of timm's optimizers.

    Weight decay skips 1-D parameters and those in `model.no_weight_decay()`. With --decay-rpb it includes the latter,
    as the published training did.

    Args:
        args: the options.
        model: the model.
        images_per_update: number of images per update, over all processes.

    Raises:
        ValueError: if the optimizer is unknown or not installed, or does not accept the options.
    """
    _check_installed(args.opt)
    lr = peak_lr(args, images_per_update)
    kwargs = {key: value for key, value in (("eps", args.opt_eps), ("betas", args.opt_betas)) if value is not None}
    try:
        groups = _parameter_groups(args, model, lr)
        return create_optimizer_v2(groups, args.opt, lr, weight_decay=0.0, momentum=args.momentum, **kwargs)
    except (AssertionError, TypeError, ValueError, ImportError, RuntimeError) as error:
        raise ValueError(f"--opt {args.opt} cannot be created with these options: {error}.") from error


def _parameter_groups(args: argparse.Namespace, model: TimmModel, lr: float) -> list[dict[str, Any]]:
    no_decay = model.no_weight_decay() if hasattr(model, "no_weight_decay") and not args.decay_rpb else ()
    if args.layer_decay is None:
        return param_groups_weight_decay(model, args.weight_decay, no_weight_decay_list=no_decay)
    groups = param_groups_layer_decay(
        model, args.weight_decay, no_weight_decay_list=no_decay, layer_decay=args.layer_decay
    )
    if args.sched == "none":  # otherwise timm's scheduler applies the scale, also to --min-lr
        for group in groups:
            group["lr"] = lr * group.pop("lr_scale")
    return groups


def _check_installed(opt: str) -> None:
    """Raise ValueError if an optimizer requires second derivatives, or a package that is not installed."""
    try:
        info = get_optimizer_info(opt.lower().split("_")[-1])
    except ValueError:
        return  # unknown name; create_optimizer_v2 raises a better message
    if info.second_order:
        raise ValueError(f"--opt {opt} requires second derivatives, which attention kernels do not provide.")
    package = info.opt_class.split(".")[0] if isinstance(info.opt_class, str) else "torch"
    if package == "apex":
        try:
            importlib.import_module("apex.optimizers")
        except ImportError as error:
            raise ValueError(
                f"--opt {opt} requires NVIDIA's apex with its CUDA extensions; build it from "
                "https://github.com/NVIDIA/apex (the package apex on the package index is a different one), or use "
                "--opt adamw, which PyTorch fuses too."
            ) from error
    elif package not in ("torch", "timm"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ValueError(f"--opt {opt} requires the package {package}; install it.") from error


def create_scheduler(
    args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int
) -> tuple[Scheduler | None, int]:
    """Create one of timm's schedulers, stepped after each update.

    Returns:
        the scheduler (None for --sched none), and the number of epochs including the cooldown.

    Raises:
        ValueError: if the schedule is unknown or does not accept the options.
    """
    if args.sched != "none" and args.warmup_epochs >= args.epochs:
        raise ValueError(
            f"--warmup-epochs {args.warmup_epochs} must be less than --epochs {args.epochs}; use fewer warm-up epochs."
        )
    choices = "use cosine, poly, step, multistep or none"
    if args.sched == "plateau":
        raise ValueError("--sched plateau is not supported, because schedules step after updates; use cosine.")
    rate = args.decay_rate
    # Pass --decay-epochs only if given: timm's default depends on the schedule.
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
            noise=args.lr_noise,
            noise_pct=args.lr_noise_pct,
            noise_std=args.lr_noise_std,
            noise_seed=args.seed,
            cycle_mul=args.lr_cycle_mul,
            cycle_decay=args.lr_cycle_decay,
            cycle_limit=args.lr_cycle_limit,
            k_decay=args.lr_k_decay,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
            **decay,
        )
    except (AssertionError, ValueError) as error:
        raise ValueError(f"--sched {args.sched} cannot be created ({error}); {choices}.") from error
    if scheduler is None and args.sched != "none":  # older timm returns None for unknown names
        raise ValueError(f"--sched {args.sched} is unknown; {choices}.")
    return scheduler, epochs
