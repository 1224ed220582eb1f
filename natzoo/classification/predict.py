"""Classify pictures with a trained model.

python classification/predict.py cat.jpg holiday/ --checkpoint output/nat/best.pth
python classification/predict.py holiday/ --model nat_mini --pretrained --grid holiday.png --json holiday.json
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from natzoo.checkpoints import write_atomically
from natzoo.classification.data.datasets import read_image
from natzoo.classification.data.readers import IMAGE_SUFFIXES
from natzoo.classification.data.transforms import evaluation_transform, preprocessing
from natzoo.classification.device import explain_memory_errors, pick_device
from natzoo.classification.inference import add_model_options, class_names, requested_model
from natzoo.classification.options import positive

GRID = 64  # more would make a picture too large to be drawn and looked at
Answer = list[tuple[str, float]]  # class and probability, best first


def find_images(paths: Sequence[str]) -> list[Path]:
    """The files named, and the images of the folders named.

    Raises:
        FileNotFoundError: on a path that is not there.
        ValueError: on a folder without images.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            images = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
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


def write_json(path: Path, answers: dict[Path, Answer]) -> None:
    """{picture: [{"class": name, "probability": share}, ...]}, best first."""
    content = {
        str(picture): [{"class": name, "probability": round(value, 6)} for name, value in answer]
        for picture, answer in answers.items()
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.encode()))


def write_grid(path: Path, answers: dict[Path, Answer], columns: int = 4) -> None:
    """A PNG of all pictures, the classes under each with bars for their probabilities."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(columns, len(answers))
    rows = math.ceil(len(answers) / columns)
    lines = max(map(len, answers.values()))
    heights = [1.0, 0.12 * lines] * rows
    figure, axes = plt.subplots(
        2 * rows,
        columns,
        figsize=(2.6 * columns, 2.6 * (1 + 0.12 * lines) * rows),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for panel in axes.flat:
        panel.axis("off")
    for number, (picture, answer) in enumerate(answers.items()):
        row, column = divmod(number, columns)
        above, below = axes[2 * row, column], axes[2 * row + 1, column]
        above.imshow(read_image(picture))
        above.set_title(picture.name[-28:], fontsize=7)
        places = range(len(answer))
        below.barh(places, [value for _, value in answer], color="C0", alpha=0.35)
        for place, (name, value) in enumerate(answer):
            below.text(0.01, place, f"{value:.0%} {name[:30]}", va="center", fontsize=7)
        below.set(xlim=(0, 1), ylim=(lines - 0.5, -0.5))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(content.getvalue()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Classify pictures.", allow_abbrev=False)
    parser.add_argument("images", nargs="+", help="files, or folders of them")
    add_model_options(parser)
    parser.add_argument("--topk", type=positive, default=5, help="classes shown")
    parser.add_argument("--batch-size", type=positive, default=32, help="pictures at a time")
    parser.add_argument("--grid", type=Path, metavar="PNG", help=f"picture to draw, of the first {GRID} pictures")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the classes to")
    args = parser.parse_args(argv)

    paths = find_images(args.images)
    model, record = requested_model(args, pick_device(args.device))
    transform = evaluation_transform(preprocessing(args, model, record))
    names = class_names(record, model.num_classes)
    answers: dict[Path, Answer] = {}
    broken: list[str] = []
    for start in tqdm(range(0, len(paths), args.batch_size), desc="predict", leave=False, disable=None):
        batch = {}
        for path in paths[start : start + args.batch_size]:
            try:
                batch[path] = read_image(path)
            except ValueError as error:
                broken.append(str(error))
                if len(paths) > 1:
                    tqdm.write(broken[-1])
        if not batch:
            continue
        with explain_memory_errors("lower --batch-size"):
            found = predict(model, list(batch.values()), transform, args.topk)
        for path, classes in zip(batch, found, strict=True):
            answers[path] = [(names[number], value) for number, value in classes]
            tqdm.write(f"{path}: " + ", ".join(f"{name} {value:.1%}" for name, value in answers[path]))
    if args.json:
        write_json(args.json, answers)
    if args.grid and answers:
        write_grid(args.grid, dict(itertools.islice(answers.items(), GRID)))
    if broken:
        several = f"{len(broken)} of {len(paths)} pictures are left out; what is wrong with each is said above."
        raise ValueError(several if len(paths) > 1 else broken[0])
