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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification.devices import autocast_of, enough_memory, pick_device, use_tensor_cores
from classification.evaluation import Flipped, check_classes, evaluate
from classification.images import Images, all_bad_images
from classification.interruption import Interrupted, Watch
from classification.loaders import evaluation_loader, is_sharded, validation_images
from classification.models import add_model_options, preprocessing, requested_model
from classification.options import WORKERS, add_column_options, non_negative, positive
from classification.ranks import Ranks, join
from classification.readers import read_class_map
from classification.real_labels import RealLabels
from natzoo import command_line
from natzoo.checkpoints import DownloadError, write_table, zoo_entries

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


def obtain(args: argparse.Namespace, device: torch.device, ranks: Ranks) -> tuple[nn.Module, dict[str, Any]]:
    """The model that the options name, and its record.

    Raises:
        DownloadError: in all processes, if one of them could not download it.
        ValueError, FileNotFoundError: as `requested_model`.
    """
    found, reason = None, None
    try:
        found = ranks.in_turn(lambda: requested_model(args, device))
    except DownloadError as error:
        reason = str(error)
    reasons = [reason for reason in ranks.gather(reason) if reason is not None]
    if reasons:
        raise DownloadError(reasons[0])
    return found


def validate(args: argparse.Namespace, ranks: Ranks, watch: Watch) -> dict[str, Any]:
    """Evaluates the model that the options name, and returns its row of the table.

    Raises:
        Interrupted: if a signal tells any of the processes to end.
    """
    device = pick_device(args.device)
    use_tensor_cores(device)
    model, record = obtain(args, device, ranks)
    config = preprocessing(args, model, record)
    classes = read_class_map(args.class_map) or record["classes"]
    if classes is None and is_sharded(args):
        classes = [str(number) for number in range(model.num_classes)]
    images = validation_images(args, classes, config, ranks)
    check_classes(images, model.num_classes, are_named=record["classes"] is not None)
    if args.real_labels is not None:
        if not isinstance(images, Images):
            raise ValueError("--real-labels goes by the names of files, which shards do not keep: use folders or tar.")
        images = RealLabels(images, args.real_labels or None)
    loader = evaluation_loader(images, args.batch_size, args.workers, device.type == "cuda", ranks)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    name = args.model or record["model"]
    seen: nn.Module = Flipped(model) if args.tta == "flip" else model
    autocast, stop = autocast_of(args.amp, device), functools.partial(ranks.leave_on_signal, watch)
    result = evaluate(seen, loader, device, autocast, args.skip_bad_images, ranks, stop)
    bad = all_bad_images(images, ranks)
    is_usual = args.real_labels is None and args.tta == "none" and config == preprocessing(argparse.Namespace(), model)
    row = _row(name, model, config, result, is_published=args.pretrained and is_usual)
    ranks.say(
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
    with Watch() as watch, join(args.device, watch) as (ranks, args.device):
        rows, failed = [], []
        for name in chosen_models(args.models) if args.models else [args.model]:
            args.model = name
            try:
                with enough_memory("lower --batch-size, or use --amp bf16"):
                    result = validate(args, ranks, watch)
            except DownloadError as error:  # the next one may be here already
                if not args.models:
                    raise
                ranks.say(f"{name} is left out: {error}")
                failed.append(name)
                continue
            except Interrupted:
                ranks.say(f"stopped by {watch.name}")
                sys.exit(watch.status)
            rows.append(result.pop("row"))
            if args.results_file and ranks.is_first:
                args.results_file.parent.mkdir(parents=True, exist_ok=True)
                write_table(args.results_file, COLUMNS, rows)
        if failed:
            raise ValueError(
                f"{len(failed)} of {len(failed) + len(rows)} models could not be had: {', '.join(failed)}."
            )
    return result


if __name__ == "__main__":
    command_line.run(main)
