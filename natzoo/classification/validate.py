"""Evaluate image classifiers: top-1 and top-5 accuracy."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from natzoo import command_line
from natzoo.checkpoints import DownloadError, write_atomically, write_table, zoo_entries
from natzoo.classification.confusion import draw_confusion, write_per_class
from natzoo.classification.data.batches import Normalize
from natzoo.classification.data.datasets import ImageDataset, RealLabelsDataset, gather_bad_images
from natzoo.classification.data.loader import create_evaluation_loader, create_validation_dataset, uses_shards
from natzoo.classification.data.readers import read_class_map
from natzoo.classification.data.transforms import preprocessing
from natzoo.classification.distributed import World, init_world
from natzoo.classification.evaluation import FlipTTA, check_classes, evaluate, missing_classes_warning
from natzoo.classification.factory import describe_model
from natzoo.classification.imagenet_sets import (
    CORRUPTION_COLUMNS,
    SET_COLUMNS,
    SETS,
    add_differences,
    evaluate_set,
    markdown_table,
    parse_set,
)
from natzoo.classification.inference import add_model_options, class_names, requested_model
from natzoo.classification.options import WORKERS, HelpFormatter, add_dataset_options, batch_size, workers
from natzoo.classification.signals import Interrupted, SignalHandler
from natzoo.command_line import counted
from natzoo.device import (
    autocast_context,
    enable_tf32,
    explain_memory_errors,
    pick_device,
    slow_precision,
)

# timm's columns, then ours.
COLUMNS = (
    *("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"),
    *("loss", "images", "published_top1", "difference"),
)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of validate.py."""
    parser = command_line.Parser(
        description="Evaluate image classifiers: top-1 and top-5 accuracy.", formatter_class=HelpFormatter
    )
    parser.add_argument("data", nargs="?", metavar="DATA", help="folder with val/, or with one subfolder per class")
    add_model_options(parser)
    parser.add_argument(
        "--models",
        nargs="+",
        metavar="PATTERN",
        help="evaluate all published models whose name matches, such as 'nat_*'",
    )
    parser.add_argument("--results-file", type=Path, metavar="CSV", help="write a table with one row per model")
    parser.add_argument("--per-class", type=Path, metavar="CSV", help="write accuracy and precision of each class")
    parser.add_argument("--confusion", type=Path, metavar="PNG", help="draw the confusion matrix")
    parser.add_argument(
        "--sets",
        nargs="+",
        type=imagenet_set,
        metavar="NAME=FOLDER",
        help=f"instead of DATA: test sets of ImageNet models ({', '.join(SETS)}; short: v2, a, r, real, c)",
    )
    parser.add_argument(
        "--results-dir",
        type=Path,
        metavar="FOLDER",
        help="with --sets: write results-NAME.csv as timm does, and table.md for a model card",
    )
    add_dataset_options(parser)
    parser.add_argument("--val-split", default="val", metavar="NAME", help="name of the validation split")
    parser.add_argument("--class-map", metavar="FILE", help="text file with one class name per line, in class order")
    parser.add_argument(
        "--real-labels",
        nargs="?",
        const="",
        metavar="JSON",
        help="use the reassessed ImageNet labels (ReaL), from JSON or timm's copy",
    )
    parser.add_argument(
        "--tta",
        choices=["none", "flip"],
        default="none",
        help="test-time augmentation; flip averages with the mirrored image",
    )
    parser.add_argument("--batch-size", type=batch_size, default=256, metavar="N", help="batch size per GPU")
    parser.add_argument("--workers", type=workers, default=WORKERS, metavar="N", help="data-loading workers per GPU")
    parser.add_argument("--amp", choices=["none", "bf16", "fp16"], default="none", help="mixed-precision data type")
    parser.add_argument("--channels-last", action="store_true", help="use the channels-last memory format")
    parser.add_argument(
        "--skip-bad-images", action="store_true", help="ignore images that cannot be read, instead of stopping"
    )
    parser.set_defaults(synthetic=None, seed=0)  # options of train.py that the data loader reads
    return parser


def imagenet_set(text: str) -> tuple[str, Path]:
    """Parse an argument of --sets."""
    try:
        return parse_set(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def chosen_models(patterns: list[str]) -> list[str]:
    """Return the names of the published ImageNet-1K classifiers that match any of the patterns.

    Raises:
        ValueError: if there is none.
    """
    known = [name for name, entry in zoo_entries().items() if "top1" in entry.facts]
    chosen = [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not chosen:
        raise ValueError(f"--models {' '.join(patterns)} matches none of the published models: {', '.join(known)}.")
    return chosen


def load_everywhere(args: argparse.Namespace, device: torch.device, world: World) -> tuple[Any, dict[str, Any]]:
    """Load the requested model in all processes.

    Returns:
        the model and its record.

    Raises:
        DownloadError: in all processes, if one of them could not download it.
        ValueError, FileNotFoundError: as raised by `requested_model`.
    """
    loaded: Any = None
    reason: str | None = None
    try:
        loaded = world.local_main_first(lambda: requested_model(args, device))
    except DownloadError as error:
        reason = str(error)
    reasons = [reason for reason in world.gather(reason) if reason is not None]
    if reasons:
        raise DownloadError(reasons[0])
    return loaded


def validate(args: argparse.Namespace, world: World, signals: SignalHandler) -> dict[str, Any]:
    """Evaluate the requested model.

    Returns:
        what `evaluate` returns, and `row`, its row of the table.

    Raises:
        Interrupted: if any of the processes received a signal.
    """
    device = pick_device(args.device)
    enable_tf32(device)
    slow = slow_precision(args.amp, device)
    if slow:
        world.print(slow)
    model, record = load_everywhere(args, device, world)
    config = preprocessing(args, model, record)
    classes = read_class_map(args.class_map) or record["classes"]
    if classes is None and uses_shards(args):
        classes = [str(number) for number in range(model.num_classes)]
    dataset: Any = create_validation_dataset(args, classes, config, world)
    check_classes(dataset, model.num_classes, matched_by_name=record["classes"] is not None)
    missing = missing_classes_warning(dataset, dataset.classes)
    if missing:
        world.print(missing)
    if args.real_labels is not None:
        if not isinstance(dataset, ImageDataset):
            raise ValueError(
                "--real-labels requires file names, which webdataset shards lack; use folders or tar files."
            )
        dataset = RealLabelsDataset(dataset, args.real_labels or None)
    loader = create_evaluation_loader(dataset, args.batch_size, args.workers, device.type == "cuda", world)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    name = args.model or record["model"]
    confusion_KK = None
    if args.per_class or args.confusion:
        confusion_KK = torch.zeros(model.num_classes, model.num_classes, dtype=torch.int64)
    evaluated: nn.Module = FlipTTA(model) if args.tta == "flip" else model
    result = evaluate(
        evaluated,
        loader,
        device,
        autocast_context(args.amp, device),
        skip_bad_images=args.skip_bad_images,
        world=world,
        before_batch=functools.partial(world.raise_if_signalled, signals),
        normalize=Normalize(config, device),
        confusion_KK=confusion_KK,
    )
    if confusion_KK is not None and world.is_main_process:
        names = class_names(record, model.num_classes)
        if args.per_class:
            write_per_class(args.per_class, names, confusion_KK.numpy())
        if args.confusion:
            draw_confusion(args.confusion, names, confusion_KK.numpy())
    bad = gather_bad_images(dataset, world)
    is_comparable = (
        args.real_labels is None and args.tta == "none" and config == preprocessing(argparse.Namespace(), model)
    )
    row = _make_row(name, model, config, result, is_published=args.pretrained and is_comparable)
    described = describe_model(name, record.get("model_kwargs", args.model_kwargs))
    if args.checkpoint:
        described += f" from {args.checkpoint}"
    world.print(
        f"{described} on {dataset.source}: {counted(int(result['count']), 'image')}, top-1 {result['top1']:.2f}%, "
        + (f"top-5 {result['top5']:.2f}%, " if model.num_classes > 5 else "")
        + f"loss {result['loss']:.4f}"
        + (f" (published: {row['published_top1']}%)" if row["published_top1"] != "" else "")
        + "\n  ".join([f"\nIgnored {counted(len(bad), 'unreadable image')}:", *bad] if bad else ())
    )
    return {**result, "row": row}


def validate_sets(
    args: argparse.Namespace, rows: dict[str, list[dict[str, Any]]], world: World, signals: SignalHandler
) -> dict[str, Any]:
    """Evaluate the requested model on all sets of --sets and append a row to the rows of each.

    Returns:
        what `evaluate` returns for the last set.

    Raises:
        Interrupted: if any of the processes received a signal.
    """
    device = pick_device(args.device)
    enable_tf32(device)
    model, record = load_everywhere(args, device, world)
    config = preprocessing(args, model, record)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    name = args.model or record["model"]
    result: dict[str, Any] = {}
    for set_name, folder in args.sets:
        result = evaluate_set(
            set_name,
            folder,
            model,
            record["classes"],
            config,
            args,
            device,
            world,
            before_batch=functools.partial(world.raise_if_signalled, signals),
        )
        extra = {key: round(result[key], 3) for key in CORRUPTION_COLUMNS if key in result and key not in COLUMNS}
        rows[set_name].append({**_make_row(name, model, config, result, is_published=False), **extra})
    return result


def _report_sets(folder: Path | None, rows: dict[str, list[dict[str, Any]]], world: World) -> None:
    """Print the accuracies on all sets, and write them into the folder of --results-dir."""
    table = markdown_table(rows)
    world.print(table.rstrip())
    if folder is None or not world.is_main_process:
        return
    command_line.create_folder(folder, "--results-dir")
    for name, complete in add_differences(rows).items():
        columns = CORRUPTION_COLUMNS if name == "imagenet-c" else SET_COLUMNS if SETS[name].base else SET_COLUMNS[:9]
        table_rows = ({column: row[column] for column in columns} for row in complete)
        write_table(folder / f"results-{name}.csv", columns, table_rows)
    write_atomically(folder / "table.md", lambda file: file.write(table.encode()))


def _make_row(
    name: str, model: nn.Module, config: dict, result: dict[str, float], is_published: bool
) -> dict[str, Any]:
    """Return the row of a model in the results file."""
    entry = zoo_entries().get(name.split(".")[0])
    published: Any = entry.facts.get("top1", "") if entry and is_published else ""
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


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run validate.py with a command line and return the figures of the last model."""
    args = make_parser().parse_args(argv)
    if args.models and (args.model or args.checkpoint or not args.pretrained):
        raise ValueError("--models requires --pretrained, and cannot be combined with --model or --checkpoint.")
    if (args.models or args.sets) and (args.per_class or args.confusion):
        raise ValueError("--per-class and --confusion describe one model on DATA; remove --models and --sets.")
    if args.sets and (args.data or args.real_labels is not None or args.class_map or args.results_file):
        raise ValueError("--sets replaces DATA, --real-labels, --class-map and --results-file; use --results-dir.")
    if args.results_dir and not args.sets:
        raise ValueError("--results-dir requires --sets; use --results-file for other data.")
    with SignalHandler() as signals, init_world(args.device, signals) as (world, args.device):
        rows: list[dict[str, Any]] = []
        result: dict[str, Any] = {}
        failed: list[str] = []
        of_sets: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in args.sets or ()}
        names = chosen_models(args.models) if args.models else [args.model]
        for name in names:
            args.model = name
            try:
                with explain_memory_errors("lower --batch-size, or use --amp bf16"):
                    if args.sets:
                        result = validate_sets(args, of_sets, world, signals)
                    else:
                        result = validate(args, world, signals)
            except DownloadError as error:  # continue; the next model may be in the cache
                if not args.models:
                    raise
                world.print(f"Skipped {name}: {error}")
                failed.append(name)
                continue
            except Interrupted:
                world.print(f"Stopped by {signals.name}.")
                sys.exit(signals.exit_status)
            if args.sets:
                _report_sets(args.results_dir, of_sets, world)
                continue
            rows.append(result.pop("row"))
            if args.results_file and world.is_main_process:
                command_line.create_folder(args.results_file.parent, "--results-file")
                write_table(args.results_file, COLUMNS, rows)
        if failed:
            raise ValueError(f"{', '.join(failed)} could not be downloaded ({len(failed)} of {len(names)} models).")
    return result


if __name__ == "__main__":
    command_line.run(main)
