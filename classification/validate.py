"""Evaluate a classifier: top-1 and top-5 accuracy on a folder of images.

python classification/validate.py DATA --checkpoint output/nat/best.pth
python classification/validate.py IMAGENET --model nat_mini --pretrained
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from images import FolderImages, evaluation_loader, split_folder
from models import create_model, evaluation_transform, preprocessing, restore
from timm.utils import AverageMeter, accuracy
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from natzoo import command_line


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    skip_bad_images: bool = False,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and the mean cross entropy over all images of a loader."""
    model.eval()
    top1, top5, loss = AverageMeter(), AverageMeter(), AverageMeter()
    for x_BCHW, target_B in tqdm(loader, desc="evaluate", leave=False, disable=None):
        check_images(loader.dataset, skip_bad_images)
        is_readable = target_B >= 0
        x_BCHW, target_B = x_BCHW[is_readable].to(device), target_B[is_readable].to(device)
        with autocast():
            logits = model(x_BCHW)
        hits = accuracy(logits, target_B, topk=(1, min(5, logits.shape[1])))
        for meter, value in zip((top1, top5, loss), (*hits, F.cross_entropy(logits.float(), target_B)), strict=True):
            meter.update(value.item(), len(target_B))
    return {"top1": top1.avg, "top5": top5.avg, "loss": loss.avg}


def check_images(images: FolderImages, skip: bool) -> None:
    """Raises ValueError naming the first image that could not be read, unless they are to be skipped."""
    bad = [] if skip else images.bad_images()
    if bad:
        raise ValueError(f"{bad[0]} cannot be read as an image: mend or remove it, or go on with --skip-bad-images.")


def check_classes(images: FolderImages, model: nn.Module) -> None:
    """Raises ValueError if a folder has more classes than the model tells apart."""
    if len(images.classes) > model.num_classes:
        raise ValueError(
            f"{images.root} has {len(images.classes)} classes, but the model tells only {model.num_classes} apart: "
            "check the data folder and --num-classes."
        )


def autocast_of(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """The context of a forward pass for --amp none, bf16 or fp16."""
    if amp == "none":
        return nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return lambda: torch.autocast(device.type, dtype)


def pick_device(name: str) -> torch.device:
    """The device of --device; the GPU if there is one unless named."""
    if name == "cuda-if-there":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Evaluate an image classifier.", allow_abbrev=False)
    parser.add_argument("data", help="folder that holds val/, or one folder a class")
    parser.add_argument("--checkpoint", metavar="FILE", help="checkpoint of train.py, or weights of --model")
    parser.add_argument("--model", help="a name that timm.create_model knows; a checkpoint of train.py has its own")
    parser.add_argument("--pretrained", action="store_true", help="evaluate the published weights of --model")
    parser.add_argument("--val-split", default="val", help="folder of the images under DATA")
    parser.add_argument("--img-size", type=int, help="side of the image in pixels; the model's own unless given")
    parser.add_argument("--crop-pct", type=float, help="share of the image that is kept; the model's own unless given")
    parser.add_argument("--batch-size", type=int, default=256, help="images at a time")
    parser.add_argument("--workers", type=int, default=4, help="processes that load images")
    parser.add_argument("--amp", choices=["none", "bf16", "fp16"], default="none", help="mixed precision")
    parser.add_argument("--device", default="cuda-if-there", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--skip-bad-images", action="store_true", help="go on where an image cannot be read")
    return parser


def main(argv: list[str] | None = None) -> dict[str, float]:
    args = make_parser().parse_args(argv)
    device = pick_device(args.device)
    folder = split_folder(args.data, args.val_split)
    if args.checkpoint:
        model, record = restore(args.checkpoint, args.model, device)
    elif args.pretrained and args.model:
        model, record = create_model(args.model, pretrained=True).to(device), {"classes": None, "preprocessing": {}}
    else:
        raise ValueError("nothing to evaluate: give --checkpoint FILE, or --model NAME --pretrained.")
    transform = evaluation_transform(preprocessing(args, model, record))
    images = FolderImages(folder, record["classes"], transform, replace=False)
    check_classes(images, model)
    loader = evaluation_loader(images, args.batch_size, args.workers, device.type == "cuda")
    result = evaluate(model, loader, device, autocast_of(args.amp, device), args.skip_bad_images)
    print(f"{folder}: {len(images)} images, top-1 {result['top1']:.2f}%, top-5 {result['top5']:.2f}%", end="")
    print(f", loss {result['loss']:.4f}", f"({len(images.bad_images())} unreadable)" if images.bad_images() else "")
    return result


if __name__ == "__main__":
    command_line.run(main)
