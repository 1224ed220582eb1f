"""Evaluate a classifier: top-1 and top-5 accuracy on a folder of images.

python classification/validate.py DATA --checkpoint output/nat/best.pth
python classification/validate.py IMAGENET --model nat_mini --pretrained
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification.devices import autocast_of, pick_device
from classification.evaluation import check_classes, evaluate
from classification.images import Images
from classification.loaders import evaluation_loader
from classification.models import add_model_options, evaluation_transform, preprocessing, requested_model
from classification.options import WORKERS, non_negative, positive
from classification.readers import open_reader
from natzoo import command_line


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Evaluate an image classifier.", allow_abbrev=False)
    parser.add_argument("data", help="folder that holds val/, or one folder a class")
    add_model_options(parser)
    parser.add_argument("--val-split", default="val", help="folder of the images under DATA")
    parser.add_argument("--batch-size", type=positive, default=256, help="images at a time")
    parser.add_argument("--workers", type=non_negative, default=WORKERS, help="processes that load images")
    parser.add_argument("--amp", choices=["none", "bf16", "fp16"], default="none", help="mixed precision")
    parser.add_argument("--skip-bad-images", action="store_true", help="go on where an image cannot be read")
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = make_parser().parse_args(argv)
    device = pick_device(args.device)
    model, record = requested_model(args, device)
    transform = evaluation_transform(preprocessing(args, model, record))
    images = Images(open_reader("", args.data, args.val_split, record["classes"]), transform, replace=False)
    check_classes(images, model.num_classes, are_named=record["classes"] is not None)
    loader = evaluation_loader(images, args.batch_size, args.workers, device.type == "cuda")
    result = evaluate(model, loader, device, autocast_of(args.amp, device), args.skip_bad_images)
    bad = len(images.bad_images())
    print(
        f"{images.where}: {len(images) - bad} images, top-1 {result['top1']:.2f}%, top-5 {result['top5']:.2f}%, "
        f"loss {result['loss']:.4f}" + (f"; {bad} unreadable images left out" if bad else "")
    )
    return result


if __name__ == "__main__":
    command_line.run(main)
