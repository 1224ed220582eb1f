"""Classify images with a trained model."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from natzoo import command_line
from natzoo.checkpoints import write_atomically
from natzoo.classification.data.pictures import Picture, Pictures
from natzoo.classification.data.transforms import evaluation_transform, preprocessing
from natzoo.classification.inference import add_model_options, class_names, requested_model
from natzoo.classification.options import HelpFormatter, batch_size, positive
from natzoo.command_line import printable
from natzoo.device import explain_memory_errors, pick_device

MAX_GRID_IMAGES = 64
Prediction = list[tuple[str, float]]  # class name and probability, most likely first


@torch.inference_mode()
def predict(
    model: nn.Module, images: Sequence[Image.Image], transform: Callable[[Image.Image], Tensor], topk: int = 5
) -> list[list[tuple[int, float]]]:
    """Return the `topk` most likely classes of each image as (class number, probability), most likely first.

    Args:
        model: the model.
        images: RGB images, one batch.
        transform: makes [channels, height, width] of an image.
        topk: number of classes.
    """
    device = next(model.parameters()).device
    x_BCHW = torch.stack([transform(image) for image in images]).to(device)
    probabilities_BK = model.eval()(x_BCHW).float().softmax(-1)
    values, classes = probabilities_BK.topk(min(topk, probabilities_BK.shape[-1]))
    return [list(zip(c, v, strict=True)) for c, v in zip(classes.tolist(), values.tolist(), strict=True)]


def write_json(path: Path, predictions: dict[str, Prediction]) -> None:
    """Write {image: [{"class": name, "probability": value}, ...]}, most likely first."""
    content = {
        image: [{"class": name, "probability": round(value, 6)} for name, value in prediction]
        for image, prediction in predictions.items()
    }
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    command_line.create_folder(path.parent, "--json")
    # Bytes of file names that are not UTF-8 become escapes of JSON, which os.fsencode turns back into the bytes.
    write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")))


def write_grid(path: Path, shown: Sequence[tuple[Picture, Prediction]], columns: int = 4) -> None:
    """Write a PNG that shows each image above its classes and their probabilities as bars."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    lines = max(len(prediction) for _, prediction in shown)
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
    for number, (picture, prediction) in enumerate(shown):
        row, column = divmod(number, columns)
        top, bottom = axes[2 * row, column], axes[2 * row + 1, column]
        top.imshow(picture.image)
        top.set_title(printable(picture.name.rpartition("/")[2][-28:]), fontsize=7, parse_math=False)
        positions = range(len(prediction))
        bottom.barh(positions, [value for _, value in prediction], color="C0", alpha=0.35)
        for position, (name, value) in enumerate(prediction):
            text = printable(f"{value:.0%} {name[:30]}")
            bottom.text(0.01, position, text, va="center", fontsize=7, parse_math=False)
        bottom.set(xlim=(0, 1), ylim=(lines - 0.5, -0.5))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    plt.close(figure)
    command_line.create_folder(path.parent, "--grid")
    write_atomically(path, lambda file: file.write(content.getvalue()))


def main(argv: Sequence[str] | None = None) -> None:
    """Run predict.py with a command line.

    Raises:
        ValueError: after all images are processed, if some of them could not be read.
    """
    parser = command_line.Parser(description="Classify images with a trained model.", formatter_class=HelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders, videos or URLs")
    add_model_options(parser)
    parser.add_argument("--topk", type=positive, default=5, metavar="N", help="number of classes to print")
    parser.add_argument("--batch-size", type=batch_size, default=32, metavar="N", help="batch size")
    parser.add_argument("--every", type=positive, default=1, metavar="N", help="use every N-th frame of a video")
    parser.add_argument(
        "--grid", type=Path, metavar="PNG", help=f"draw the first {MAX_GRID_IMAGES} images with their predictions"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the predictions as JSON")
    args = parser.parse_args(argv)

    pictures = Pictures(args.images, args.every)
    model, record = requested_model(args, pick_device(args.device))
    transform = evaluation_transform(preprocessing(args, model, record))
    names = class_names(record, model.num_classes)
    predictions: dict[str, Prediction] = {}
    shown: list[tuple[Picture, Prediction]] = []
    for batch in pictures.batches(args.batch_size):
        with explain_memory_errors("lower --batch-size"):
            found = predict(model, [picture.image for picture in batch], transform, args.topk)
        for picture, classes in zip(batch, found, strict=True):
            prediction = [(names[number], value) for number, value in classes]
            predictions[picture.name] = prediction
            if args.grid and len(shown) < MAX_GRID_IMAGES:
                shown.append((picture, prediction))
            line = f"{picture.name}: " + "; ".join(f"{name} {value:.1%}" for name, value in prediction)
            tqdm.write(printable(line).replace("\n", "\\n"))
    if args.json:
        write_json(args.json, predictions)
    if shown:
        write_grid(args.grid, shown)
    pictures.raise_errors()


if __name__ == "__main__":
    command_line.run(main)
