"""Classify pictures with a trained model.

python classification/predict.py cat.jpg holiday/ --checkpoint output/nat/best.pth
python classification/predict.py cat.jpg --model nat_mini --pretrained
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from models import create_model, evaluation_transform, preprocessing, restore
from PIL import Image, UnidentifiedImageError
from timm.data import ImageNetInfo
from timm.data.readers.img_extensions import get_img_extensions
from torch import nn
from tqdm import tqdm
from validate import pick_device

from natzoo import command_line


def find_images(paths: Sequence[str]) -> list[Path]:
    """The files named, and the images of the folders named.

    Raises:
        FileNotFoundError: on a path that is not there.
        ValueError: on a folder without images.
    """
    suffixes = get_img_extensions(as_set=True)
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            images = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
            if not images:
                raise ValueError(f"the folder {path} holds no images.")
            found += images
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"there is no picture {path}: check the path.")
    return found


def read_image(path: Path) -> Image.Image:
    """A picture in RGB.

    Raises:
        ValueError: naming the file, if it is not one.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}.") from error


@torch.inference_mode()
def predict(model: nn.Module, images: Sequence[Image.Image], transform, topk: int = 5) -> list[list[tuple[int, float]]]:
    """For each picture the likeliest classes, best first, as (number, probability)."""
    device = next(model.parameters()).device
    x_BCHW = torch.stack([transform(image) for image in images]).to(device)
    probabilities = model.eval()(x_BCHW).float().softmax(-1)
    values, classes = probabilities.topk(min(topk, probabilities.shape[-1]))
    return [list(zip(c, v, strict=True)) for c, v in zip(classes.tolist(), values.tolist(), strict=True)]


def class_names(record: dict, num_classes: int) -> list[str]:
    """Names from the checkpoint, else ImageNet's, else numbers."""
    if record.get("classes"):
        return record["classes"]
    if num_classes == 1000:
        info = ImageNetInfo()
        return [info.index_to_description(number) for number in range(num_classes)]
    return [str(number) for number in range(num_classes)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Classify pictures.", allow_abbrev=False)
    parser.add_argument("images", nargs="+", help="files, or folders of them")
    parser.add_argument("--checkpoint", metavar="FILE", help="checkpoint of train.py, or weights of --model")
    parser.add_argument("--model", help="a name that timm.create_model knows; a checkpoint of train.py has its own")
    parser.add_argument("--pretrained", action="store_true", help="use the published weights of --model")
    parser.add_argument("--img-size", type=int, help="side of the image in pixels; the model's own unless given")
    parser.add_argument("--topk", type=int, default=5, help="classes shown")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures at a time")
    parser.add_argument("--device", default="cuda-if-there", help="cpu, cuda, cuda:1, ...")
    args = parser.parse_args(argv)

    device = pick_device(args.device)
    paths = find_images(args.images)
    if args.checkpoint:
        model, record = restore(args.checkpoint, args.model, device)
    elif args.pretrained and args.model:
        model, record = create_model(args.model, pretrained=True).to(device), {}
    else:
        raise ValueError("no model to ask: give --checkpoint FILE, or --model NAME --pretrained.")
    transform = evaluation_transform(preprocessing(args, model, record))
    names = class_names(record, model.num_classes)
    for start in tqdm(range(0, len(paths), args.batch_size), desc="predict", leave=False, disable=None):
        batch = paths[start : start + args.batch_size]
        answers = predict(model, [read_image(path) for path in batch], transform, args.topk)
        for path, answer in zip(batch, answers, strict=True):
            tqdm.write(f"{path}: " + ", ".join(f"{names[number]} {value:.1%}" for number, value in answer))


if __name__ == "__main__":
    command_line.run(main)
