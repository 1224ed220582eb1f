"""Evaluate a classifier: top-1 and top-5 accuracy on a folder of images.

python classification/validate.py DATA --checkpoint output/nat/best.pth
python classification/validate.py IMAGENET --model nat_mini --pretrained
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification.devices import autocast_of, pick_device
from classification.images import FolderImages, check_images, evaluation_loader, split_folder
from classification.models import add_model_options, evaluation_transform, preprocessing, requested_model
from classification.options import WORKERS, non_negative, positive
from natzoo import command_line


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    skip_bad_images: bool = False,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and the mean cross entropy over all readable images of a loader.

    Raises:
        ValueError: if an image cannot be read and they are not to be skipped, or if none can.
    """
    model.eval()
    top1, top5, loss = AverageMeter(), AverageMeter(), AverageMeter()
    for x_BCHW, target_B in tqdm(loader, desc="evaluate", leave=False, disable=None):
        check_images(loader.dataset, skip_bad_images)
        is_readable = target_B >= 0
        if not is_readable.any():
            continue
        x_BCHW, target_B = x_BCHW[is_readable].to(device), target_B[is_readable].to(device)
        with autocast():
            logits = model(x_BCHW)
        hits = accuracy(logits, target_B, topk=(1, min(5, logits.shape[1])))
        for meter, value in zip((top1, top5, loss), (*hits, F.cross_entropy(logits.float(), target_B)), strict=True):
            meter.update(value.item(), len(target_B))
    if top1.count == 0:
        raise ValueError(f"none of the images in {loader.dataset.root} can be read.")
    return {"top1": top1.avg, "top5": top5.avg, "loss": loss.avg}


def check_classes(images: FolderImages, model: nn.Module, are_named: bool) -> None:
    """Raises ValueError if a folder's classes cannot be those of the model.

    Args:
        images: the folder.
        model: the model.
        are_named: whether the folder's classes were found by name among the model's; else the numbers must agree.
    """
    found, known = len(images.classes), model.num_classes
    if found > known or (found < known and not are_named):
        raise ValueError(f"{images.root} has {found} classes, but the model has {known}: check the data folder.")


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
    folder = split_folder(args.data, args.val_split)
    model, record = requested_model(args, device)
    transform = evaluation_transform(preprocessing(args, model, record))
    images = FolderImages(folder, record["classes"], transform, replace=False)
    check_classes(images, model, are_named=record["classes"] is not None)
    loader = evaluation_loader(images, args.batch_size, args.workers, device.type == "cuda")
    result = evaluate(model, loader, device, autocast_of(args.amp, device), args.skip_bad_images)
    bad = len(images.bad_images())
    print(
        f"{folder}: {len(images) - bad} images, top-1 {result['top1']:.2f}%, top-5 {result['top5']:.2f}%, "
        f"loss {result['loss']:.4f}" + (f"; {bad} unreadable images left out" if bad else "")
    )
    return result


if __name__ == "__main__":
    command_line.run(main)
