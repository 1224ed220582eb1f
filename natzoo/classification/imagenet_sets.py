"""ImageNet's other test sets: V2, A, R, Sketch, ReaL labels and C, evaluated as timm and their papers do.

The files of timm's package give the classes of ImageNet-A and -R: the logits of all other classes are dropped, and
accuracy is computed over the remaining 200. Results have the columns and file names of timm's `results/`.
"""

from __future__ import annotations

import argparse
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from natzoo.classification.data.datasets import ImageDataset, RealLabelsDataset
from natzoo.classification.data.loader import create_evaluation_loader
from natzoo.classification.data.readers import find_split, open_reader
from natzoo.classification.data.transforms import evaluation_transform
from natzoo.classification.distributed import World
from natzoo.classification.evaluation import FlipTTA, evaluate
from natzoo.device import autocast_context

# Mean error of AlexNet over the five severities of a corruption, which the mean corruption error is relative to. From
# the authors of ImageNet-C: arXiv:1903.12261, table 1; all digits: https://github.com/hendrycks/robustness.
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = range(1, 6)


class ImageNetSet(NamedTuple):
    """A test set.

    Attributes:
        title: its name in tables.
        base: set that timm compares it with, or "".
        classes: name of timm's lists of its classes, or "" for all 1000.
        real_labels: whether the reassessed labels are used.
    """

    title: str
    base: str = ""
    classes: str = ""
    real_labels: bool = False


# By the names in timm's results/results-NAME.csv; timm has no file for ImageNet-C.
SETS = {
    "imagenet": ImageNetSet("ImageNet"),
    "imagenet-real": ImageNetSet("ImageNet-ReaL", "imagenet", real_labels=True),
    "imagenetv2-matched-frequency": ImageNetSet("ImageNet-V2", "imagenet"),
    "sketch": ImageNetSet("ImageNet-Sketch", "imagenet"),
    "imagenet-a-clean": ImageNetSet("ImageNet, classes of A", classes="imagenet_a"),
    "imagenet-a": ImageNetSet("ImageNet-A", "imagenet-a-clean", classes="imagenet_a"),
    "imagenet-r-clean": ImageNetSet("ImageNet, classes of R", classes="imagenet_r"),
    "imagenet-r": ImageNetSet("ImageNet-R", "imagenet-r-clean", classes="imagenet_r"),
    "imagenet-c": ImageNetSet("ImageNet-C"),
}
ALIASES = {
    **{"real": "imagenet-real", "v2": "imagenetv2-matched-frequency", "imagenet-v2": "imagenetv2-matched-frequency"},
    **{"a": "imagenet-a", "r": "imagenet-r", "c": "imagenet-c", "imagenet-sketch": "sketch"},
    **{"a-clean": "imagenet-a-clean", "r-clean": "imagenet-r-clean"},
}
SET_COLUMNS = (
    *("model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"),
    *("top1_diff", "top5_diff", "rank_diff"),
)
CORRUPTION_COLUMNS = (*SET_COLUMNS[:9], "mce", *ALEXNET_ERRORS)


def parse_set(text: str) -> tuple[str, Path]:
    """Parse NAME=FOLDER.

    Raises:
        ValueError: if the name is unknown; argparse prints the message.
    """
    name, sign, folder = text.partition("=")
    name = ALIASES.get(name, name)
    if not sign or name not in SETS:
        raise ValueError(f"{text!r:.200} is not NAME=FOLDER with a NAME of {', '.join(SETS)}.")
    return name, Path(folder)


def timm_lines(name: str) -> list[str]:
    """Return the lines of one of timm's data files, such as "imagenet_a_synsets"."""
    return (pkgutil.get_data("timm.data", f"_info/{name}.txt") or b"").decode().split()


def class_numbers(test_set: ImageNetSet, classes: Sequence[str] | None) -> list[int] | None:
    """Return the outputs of a model for the classes of a test set, in the order of the synsets; None for all outputs.

    Args:
        test_set: the set.
        classes: the model's class names if it does not have ImageNet's order.

    Raises:
        ValueError: if the model lacks a class.
    """
    synsets = timm_lines(f"{test_set.classes}_synsets" if test_set.classes else "imagenet_synsets")
    order = list(classes) if classes else timm_lines("imagenet_synsets")
    numbers = {name: number for number, name in enumerate(order)}
    missing = [name for name in synsets if name not in numbers]
    if missing:
        raise ValueError(
            f"{test_set.title} needs a model for ImageNet-1K, but this one lacks {len(missing)} of its classes: "
            f"{missing[0]}, ..."
        )
    found = [numbers[name] for name in synsets]
    return None if found == list(range(len(order))) else found


class ClassSubset(nn.Module):
    """A classifier whose logits are reduced to some classes."""

    def __init__(self, model: nn.Module, numbers: Sequence[int]):
        super().__init__()
        self.model = model
        self.register_buffer("numbers", torch.tensor(numbers), persistent=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.model(x_BCHW)[..., self.numbers]


class SubsetReader:
    """The images of a reader that belong to some classes, renumbered in the order of these classes.

    Args:
        reader: a reader of readers.py.
        numbers: class numbers of the reader.

    Raises:
        ValueError: if it has no image of these classes.
    """

    def __init__(self, reader: Any, numbers: Sequence[int]):
        self.reader, self.source, self.digest = reader, reader.source, reader.digest
        self.classes = [reader.classes[number] for number in numbers]
        places = {number: place for place, number in enumerate(numbers)}
        found = [(index, places.get(reader[index][1])) for index in range(len(reader))]
        self._images = [(index, place) for index, place in found if place is not None]
        if not self._images:
            raise ValueError(f"{self.source} has no image of the {len(numbers)} classes; check the folder.")

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        index, place = self._images[position]
        return self.reader[index][0], place

    def filename(self, position: int) -> str:
        return self.reader.filename(self._images[position][0])


def open_set(test_set: ImageNetSet, folder: Path) -> Any:
    """Return the reader of a test set; its classes are in the order of `class_numbers`.

    Class folders are named by synset, or by number as in ImageNet-V2. For sets with some of ImageNet's classes the
    folder may have all of them.

    Raises:
        ValueError, FileNotFoundError: as raised by `open_reader` and `SubsetReader`.
    """
    order = timm_lines("imagenet_synsets")
    numbers = [str(number) for number in range(len(order))]
    is_numbered = any(path.name in numbers for path in find_split(str(folder), "val").glob("*/"))
    reader = open_reader("", str(folder), "val", numbers if is_numbered else order)
    if not test_set.classes:
        return reader
    return SubsetReader(reader, [order.index(name) for name in timm_lines(f"{test_set.classes}_synsets")])


def evaluate_set(
    name: str,
    folder: Path,
    model: nn.Module,
    classes: Sequence[str] | None,
    config: dict[str, Any],
    args: argparse.Namespace,
    device: torch.device,
    world: World,
    before_batch: Callable[[], None],
) -> dict[str, Any]:
    """Evaluate a model on a test set. All processes must call it.

    Args:
        name, folder: the set, as `parse_set` returns it.
        model: the model, on `device`.
        classes: its class names if they are not in ImageNet's order.
        config: what `preprocessing` returned.
        args: options amp, batch_size, workers, tta and skip_bad_images.
        device, world, before_batch: as for `evaluate`.

    Returns:
        what `evaluate` returns; for ImageNet-C means over all corruptions and severities, with `mce` and the relative
        error of each corruption in percent.

    Raises:
        ValueError, FileNotFoundError: if the model is not for ImageNet-1K, or the set is incomplete.
    """
    test_set = SETS[name]
    numbers = class_numbers(test_set, classes)
    reduced: nn.Module = model if numbers is None else ClassSubset(model, numbers).to(device)
    reduced = FlipTTA(reduced) if args.tta == "flip" else reduced

    def measure(path: Path) -> dict[str, float]:
        dataset: Any = ImageDataset(open_set(test_set, path), evaluation_transform(config), replace=False)
        if test_set.real_labels:
            dataset = RealLabelsDataset(dataset)
        loader = create_evaluation_loader(dataset, args.batch_size, args.workers, device.type == "cuda", world)
        autocast = autocast_context(args.amp, device)
        return evaluate(reduced, loader, device, autocast, args.skip_bad_images, world, before_batch)

    if name != "imagenet-c":
        return measure(folder)
    found = {key: measure(path) for key, path in corruption_folders(folder).items()}
    result: dict[str, Any] = {
        key: sum(part[key] for part in found.values()) / len(found) for key in ("top1", "top5", "loss")
    }
    mce, relative = mean_corruption_error({key: 100 - part["top1"] for key, part in found.items()})
    return {**result, "count": sum(part["count"] for part in found.values()), "mce": mce, **relative}


def corruption_folders(folder: Path) -> dict[tuple[str, int], Path]:
    """Return the folders of ImageNet-C by corruption and severity: [CATEGORY/]CORRUPTION/SEVERITY in `folder`.

    Raises:
        ValueError: if one of the 75 is missing.
    """
    found = {path.name: path for path in (*folder.glob("*/"), *folder.glob("*/*/")) if path.name in ALEXNET_ERRORS}
    result = {}
    for name in ALEXNET_ERRORS:
        for severity in SEVERITIES:
            path = found.get(name, folder / name) / str(severity)
            if not path.is_dir():
                raise ValueError(
                    f"imagenet-c: {path} does not exist; unpack all of the noise, blur, weather and digital archives."
                )
            result[name, severity] = path
    return result


def mean_corruption_error(errors: Mapping[tuple[str, int], float]) -> tuple[float, dict[str, float]]:
    """Return the mean corruption error of ImageNet-C, and the relative error of each corruption, in percent.

    Args:
        errors: top-1 errors in percent by corruption and severity.
    """
    means = {name: sum(errors[name, severity] for severity in SEVERITIES) / len(SEVERITIES) for name in ALEXNET_ERRORS}
    relative = {name: means[name] / ALEXNET_ERRORS[name] for name in ALEXNET_ERRORS}
    return sum(relative.values()) / len(relative), relative


def add_differences(rows: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Sort rows by accuracy and add timm's columns top1_diff, top5_diff and rank_diff to those of sets with a base.

    Args:
        rows: rows by set.
    """
    ranked = {
        name: sorted(table, key=lambda row: (-row["top1"], -row["top5"], row["model"])) for name, table in rows.items()
    }
    result: dict[str, list[dict[str, Any]]] = {}
    for name, table in ranked.items():
        base = ranked.get(SETS[name].base, [])
        ranks = {row["model"]: rank for rank, row in enumerate(base)}
        result[name] = []
        for rank, row in enumerate(table):
            differences: dict[str, Any] = dict.fromkeys(SET_COLUMNS[9:], "")
            if row["model"] in ranks:
                other = base[ranks[row["model"]]]
                differences = {f"{key}_diff": f"{row[key] - other[key]:+.3f}" for key in ("top1", "top5")}
                gained = ranks[row["model"]] - rank
                differences["rank_diff"] = f"{gained:+d}" if gained else "0"
            result[name].append({**row, **differences})
    return result


def markdown_table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return top-1 accuracies as a table for a model card: a row per model, a column per set; mCE for ImageNet-C."""
    models = list(dict.fromkeys(row["model"] for table in rows.values() for row in table))
    lines = ["| model | " + " | ".join(_heading(name) for name in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for model in models:
        cells = [next((_cell(row) for row in table if row["model"] == model), "-") for table in rows.values()]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _heading(name: str) -> str:
    return f"{SETS[name].title} ({'mCE, lower is better' if name == 'imagenet-c' else 'top-1'})"


def _cell(row: Mapping[str, Any]) -> str:
    return f"{row.get('mce', row['top1']):.1f}"
