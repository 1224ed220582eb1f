"""Classify pictures with a trained model.

python classification/predict.py cat.jpg holiday/ --checkpoint output/nat/best.pth
python classification/predict.py cat.jpg --model nat_mini --pretrained
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from classification.devices import pick_device
from classification.images import read_image
from classification.models import add_model_options, class_names, evaluation_transform, preprocessing, requested_model
from classification.options import positive
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


@torch.inference_mode()
def predict(
    model: nn.Module, images: Sequence[Image.Image], transform: Callable[[Image.Image], Tensor], topk: int = 5
) -> list[list[tuple[int, float]]]:
    """For each picture the likeliest classes, best first, as (number, probability)."""
    device = next(model.parameters()).device
    x_BCHW = torch.stack([transform(image) for image in images]).to(device)
    probabilities = model.eval()(x_BCHW).float().softmax(-1)
    values, classes = probabilities.topk(min(topk, probabilities.shape[-1]))
    return [list(zip(c, v, strict=True)) for c, v in zip(classes.tolist(), values.tolist(), strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Classify pictures.", allow_abbrev=False)
    parser.add_argument("images", nargs="+", help="files, or folders of them")
    add_model_options(parser)
    parser.add_argument("--topk", type=positive, default=5, help="classes shown")
    parser.add_argument("--batch-size", type=positive, default=32, help="pictures at a time")
    args = parser.parse_args(argv)

    paths = find_images(args.images)
    model, record = requested_model(args, pick_device(args.device))
    transform = evaluation_transform(preprocessing(args, model, record))
    names = class_names(record, model.num_classes)
    for start in tqdm(range(0, len(paths), args.batch_size), desc="predict", leave=False, disable=None):
        batch = paths[start : start + args.batch_size]
        answers = predict(model, [read_image(path) for path in batch], transform, args.topk)
        for path, answer in zip(batch, answers, strict=True):
            tqdm.write(f"{path}: " + ", ".join(f"{names[number]} {value:.1%}" for number, value in answer))


if __name__ == "__main__":
    command_line.run(main)
