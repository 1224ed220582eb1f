"""Evaluate classifiers: top-1 and top-5 accuracy on a folder of images.

python classification/validate.py DATA --checkpoint output/nat/best.pth
python classification/validate.py IMAGENET --model nat_mini --pretrained --amp bf16
python classification/validate.py IMAGENET --models 'nat_*' 'dinat_*' --pretrained --results-file results.csv
torchrun --standalone --nproc-per-node 8 classification/validate.py IMAGENET --model nat_mini --pretrained
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from natzoo.checkpoints import DownloadError, write_table, zoo_entries
from natzoo.classification.data.datasets import Images, RealLabelsDataset, gather_bad_images
from natzoo.classification.data.loader import create_evaluation_loader, create_validation_dataset, uses_shards
from natzoo.classification.data.readers import read_class_map
from natzoo.classification.data.transforms import preprocessing
from natzoo.classification.device import autocast_context, enable_tf32, explain_memory_errors, pick_device
from natzoo.classification.distributed import World, init_world
from natzoo.classification.evaluation import FlipTTA, check_classes, evaluate
from natzoo.classification.inference import add_model_options, requested_model
from natzoo.classification.options import WORKERS, add_column_options, non_negative, positive
from natzoo.classification.signals import Interrupted, SignalHandler

# timm's, and what was published beside what was found.
COLUMNS = (
    *("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"),
    *("loss", "images", "published_top1", "difference"),
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Evaluate image classifiers.", allow_abbrev=False)
    parser.add_argument("data", nargs="?", help="folder that holds val/, or one folder a class")
    add_model_options(parser)
    parser.add_argument("--models", nargs="+", metavar="PATTERN", help="all published models of such names: 'nat_*'")
    parser.add_argument("--results-file", type=Path, metavar="CSV", help="table to write, a row a model")
    parser.add_argument("--dataset", default="", help="folder, tar, hfds/NAME or wds; by what DATA holds unless given")
    add_column_options(parser)
    parser.add_argument("--val-split", default="val", help="folder or tar file of the images under DATA")
    parser.add_argument("--class-map", metavar="FILE", help="text file of the classes in order, one a line")
    parser.add_argument("--real-labels", nargs="?", const="", metavar="JSON", help="score by ImageNet's real labels")
    parser.add_argument("--tta", choices=["none", "flip"], default="none", help="average with the mirrored image")
    parser.add_argument("--batch-size", type=positive, default=256, help="images at a time, a GPU")
    parser.add_argument("--workers", type=non_negative, default=WORKERS, help="processes that load images, a GPU")
    parser.add_argument("--amp", choices=["none", "bf16", "fp16"], default="none", help="mixed precision")
    parser.add_argument("--channels-last", action="store_true", help="memory format of convolutions")
    parser.add_argument("--skip-bad-images", action="store_true", help="go on where an image cannot be read")
    parser.set_defaults(synthetic=None, seed=0)  # of train.py, which the loaders ask for
    return parser


def chosen_models(patterns: list[str]) -> list[str]:
    """Names of the published ImageNet-1K classifiers that match.

    Raises:
        ValueError: if none does.
    """
    known = [name for name, entry in zoo_entries().items() if "top1" in entry.facts]
    chosen = [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(f"no published classifier is named {' or '.join(patterns)}: there are {', '.join(known)}.")
    return chosen


def obtain(args: argparse.Namespace, device: torch.device, world: World) -> tuple[nn.Module, dict[str, Any]]:
    """The model that the options name, and its record.

    Raises:
        DownloadError: in all processes, if one of them could not download it.
        ValueError, FileNotFoundError: as `requested_model`.
    """
    found, reason = None, None
    try:
        found = world.local_main_first(lambda: requested_model(args, device))
    except DownloadError as error:
        reason = str(error)
    reasons = [reason for reason in world.gather(reason) if reason is not None]
    if reasons:
        raise DownloadError(reasons[0])
    return found


def validate(args: argparse.Namespace, world: World, signal_handler: SignalHandler) -> dict[str, Any]:
    """Evaluates the model that the options name, and returns its row of the table.

    Raises:
        Interrupted: if a signal tells any of the processes to end.
    """
    device = pick_device(args.device)
    enable_tf32(device)
    model, record = obtain(args, device, world)
    config = preprocessing(args, model, record)
    classes = read_class_map(args.class_map) or record["classes"]
    if classes is None and uses_shards(args):
        classes = [str(number) for number in range(model.num_classes)]
    images = create_validation_dataset(args, classes, config, world)
    check_classes(images, model.num_classes, are_named=record["classes"] is not None)
    if args.real_labels is not None:
        if not isinstance(images, Images):
            raise ValueError("--real-labels goes by the names of files, which shards do not keep: use folders or tar.")
        images = RealLabelsDataset(images, args.real_labels or None)
    loader = create_evaluation_loader(images, args.batch_size, args.workers, device.type == "cuda", world)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    name = args.model or record["model"]
    seen: nn.Module = FlipTTA(model) if args.tta == "flip" else model
    autocast, stop = autocast_context(args.amp, device), functools.partial(world.raise_if_signalled, signal_handler)
    result = evaluate(seen, loader, device, autocast, args.skip_bad_images, world, stop)
    bad = gather_bad_images(images, world)
    is_usual = args.real_labels is None and args.tta == "none" and config == preprocessing(argparse.Namespace(), model)
    row = _row(name, model, config, result, is_published=args.pretrained and is_usual)
    world.say(
        f"{name} on {images.where}: {result['count']} images, "
        f"top-1 {result['top1']:.2f}%, top-5 {result['top5']:.2f}%, loss {result['loss']:.4f}"
        + (f"; published top-1 {row['published_top1']}%" if row["published_top1"] != "" else "")
        + "\n  ".join([f"; {len(bad)} unreadable images left out:", *bad] if bad else ())
    )
    return {**result, "row": row}


def _row(name: str, model: nn.Module, config: dict, result: dict[str, float], is_published: bool) -> dict[str, Any]:
    known = zoo_entries().get(name.split(".")[0])
    published = known.facts.get("top1", "") if known and is_published else ""
    return {
        "model": name,
        "top1": round(result["top1"], 3),
        "top1_err": round(100 - result["top1"], 3),
        "top5": round(result["top5"], 3),
        "top5_err": round(100 - result["top5"], 3),
        "param_count": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "img_size": config["input_size"][-1],
        "crop_pct": config["crop_pct"],
        "interpolation": config["interpolation"],
        "loss": round(result["loss"], 4),
        "images": result["count"],
        "published_top1": published,
        "difference": "" if published == "" else round(result["top1"] - published, 3),
    }


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Returns the figures of the last model."""
    args = make_parser().parse_args(argv)
    if args.models and (args.model or args.checkpoint or not args.pretrained):
        raise ValueError(
            "--models names published models: give it with --pretrained, without --model and --checkpoint."
        )
    with SignalHandler() as signal_handler, init_world(args.device, signal_handler) as (world, args.device):
        rows, failed = [], []
        for name in chosen_models(args.models) if args.models else [args.model]:
            args.model = name
            try:
                with explain_memory_errors("lower --batch-size, or use --amp bf16"):
                    result = validate(args, world, signal_handler)
            except DownloadError as error:  # the next one may be here already
                if not args.models:
                    raise
                world.say(f"{name} is left out: {error}")
                failed.append(name)
                continue
            except Interrupted:
                world.say(f"stopped by {signal_handler.name}")
                sys.exit(signal_handler.status)
            rows.append(result.pop("row"))
            if args.results_file and world.is_main_process:
                args.results_file.parent.mkdir(parents=True, exist_ok=True)
                write_table(args.results_file, COLUMNS, rows)
        if failed:
            raise ValueError(
                f"{len(failed)} of {len(failed) + len(rows)} models could not be had: {', '.join(failed)}."
            )
    return result
