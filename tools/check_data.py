"""Check data before training: images and labels per class, problems, and sample images with their labels drawn.

    python tools/check_data.py data/digits
    python tools/check_data.py configs/quickstart/mask_rcnn.py
    python tools/check_data.py configs/quickstart/upernet.py --data data/mine --out output/mine_checked

The argument is a folder for classification, or a config for detection or segmentation. With a config, the samples are
what the model sees in training: they have passed its transforms.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from natzoo import command_line
from natzoo.checkpoints import write_atomically

_SPLITS = {"train": "training", "val": "validation"}
_SAVED = "Saved samples to {}; look at them before training."
_MAX_MAPS = 1000  # label maps that are decoded, evenly spaced
_CLASSES_SHOWN = 20  # of a sheet of samples


def main(argv: Sequence[str] | None = None) -> None:
    """Run check_data.py with a command line.

    Raises:
        ValueError, FileNotFoundError: if a problem would stop training; several problems are listed first.
    """
    parser = command_line.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FOLDER|CONFIG", help="folder of classes, or config of a model")
    parser.add_argument("--data", type=Path, metavar="DIR", help="dataset folder (default: data_root of the config)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("output/checked"),
        metavar="DIR",
        help="folder of the pictures (default: output/checked)",
    )
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="number of samples per split or class")
    args = parser.parse_args(argv)
    if not args.source.exists():
        raise FileNotFoundError(f"{args.source} does not exist; pass a folder with train/ and val/, or a config.")
    if any(args.source.glob("instances_*.json")) or (args.source / "annotations").is_dir():
        raise ValueError(
            f"{args.source} has labels for detection or segmentation; pass a config, with --data {args.source}."
        )
    problems = (check_config if args.source.suffix == ".py" else check_folder)(args)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        print("\n".join(command_line.printable(f"- {problem}") for problem in problems))
        raise ValueError(f"{args.source} has {len(problems)} problems, listed above; training would stop at the first.")


def print_table(title: str, names: Sequence[str], columns: dict[str, Iterable[Any]]) -> None:
    """Print one row per class."""
    values = {name: list(map(str, column)) for name, column in columns.items()}
    width = max([5, *map(len, names)])
    print(f"\n{title}")
    print("  ".join(["class".ljust(width), *(name.rjust(max(8, len(name))) for name in values)]))
    for row, name in enumerate(names):
        cells = (column[row].rjust(max(8, len(head))) for head, column in values.items())
        print(command_line.printable("  ".join([name.ljust(width), *cells])))


# ---------------------------------------------------------------------------------------------------------------------
# Classification
# ---------------------------------------------------------------------------------------------------------------------


def check_folder(args: argparse.Namespace) -> list[Exception]:
    """Check a folder with train/ and val/: count the images per class, read them all, and draw a sheet of samples.

    Returns:
        the problems that would stop training.
    """
    from natzoo.classification.data.datasets import read_image
    from natzoo.classification.data.readers import open_reader

    counts, bad, sheets = {}, [], {}
    classes: list[str] | None = None
    problems: list[Exception] = []
    for split in _SPLITS:
        try:
            reader = open_reader("", str(args.source), split, classes, ("image", "label"))
        except (ValueError, FileNotFoundError) as error:
            problems.append(error)
            continue
        classes = reader.classes
        labels = []
        sheets[split] = [[] for _ in reader.classes]
        for index in tqdm(range(len(reader)), desc=f"Read {split}", unit="image", disable=None):
            file, label = reader[index]
            labels.append(label)
            try:
                image = read_image(file, reader.filename(index))
            except ValueError as error:
                bad.append(str(error))
                continue
            if len(sheets[split][label]) < args.samples:
                image.thumbnail((160, 160))
                sheets[split][label].append(image)
        counts[split] = np.bincount(labels, minlength=len(reader.classes))
    if classes is None:
        return problems
    print_table(f"{args.source}: images per class", classes, counts)
    totals = " and ".join(f"{count.sum()} {_SPLITS[split]} images" for split, count in counts.items())
    print(f"\n{totals}, {command_line.counted(len(classes), 'class', 'classes')}")
    if "train" in counts and counts["train"].max() > 5 * counts["train"].min():
        least, most = counts["train"].min(), counts["train"].max()
        print(f"Warning: classes have from {least} to {most} training images; consider --class-weights balanced.")
    for number in np.flatnonzero(counts["val"] == 0) if "val" in counts else ():
        print(command_line.printable(f"Warning: the class {classes[number]} has no validation image."))
    command_line.create_folder(args.out, "--out")
    for split, images in sheets.items():
        _write_sheet(args.out / f"{split}.png", classes, images)
    shown = min(len(classes), _CLASSES_SHOWN)
    print(f"{_SAVED.format(args.out)}" + (f" They show {shown} of the classes." if shown < len(classes) else ""))
    if bad:
        print("\n".join(command_line.printable(text) for text in bad))
        count = command_line.counted(len(bad), "image")
        problems.append(ValueError(f"{count} cannot be read; repair or remove them, or train with --skip-bad-images."))
    return problems


def _write_sheet(path: Path, classes: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> None:
    """Write a PNG with one row of images per class; of many classes, evenly spaced ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = np.unique(np.linspace(0, len(classes) - 1, min(_CLASSES_SHOWN, len(classes))).round().astype(int))
    columns = max(1, *(len(images[row]) for row in rows))
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.1 * columns + 1, 1.2 * len(rows)), squeeze=False, layout="constrained"
    )
    for row, panels in zip(rows, axes, strict=True):
        for panel, image in zip(panels, images[row], strict=False):
            panel.imshow(image)
        for panel in panels:
            panel.axis("off")
        panels[0].set_title(command_line.printable(classes[row][:30]), fontsize=7, loc="left", parse_math=False)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    plt.close(figure)
    write_atomically(path, lambda file: file.write(content.getvalue()))


# ---------------------------------------------------------------------------------------------------------------------
# Detection and segmentation
# ---------------------------------------------------------------------------------------------------------------------


def check_config(args: argparse.Namespace) -> list[Exception]:
    """Check the datasets of a config as train.py does, count objects or pixels per class, and draw samples.

    Returns:
        the first problem of each split that would stop training.

    Raises:
        ValueError, FileNotFoundError: if the config is unusable.
    """
    import torch
    from mmengine.registry import MODELS, VISUALIZERS, init_default_scope

    from natzoo.openmmlab import coco
    from natzoo.openmmlab.data import set_data_root
    from natzoo.openmmlab.runner import read_config

    cfg = read_config(args.source)
    if args.data is not None:
        set_data_root(cfg, args.data)
    init_default_scope(cfg.default_scope)
    if cfg.default_scope == "mmdet":
        coco.install()
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    visualizer = VISUALIZERS.build({**cfg.visualizer, "vis_backends": None})
    problems: list[Exception] = []
    for split in _SPLITS:
        try:
            dataset = _open_dataset(cfg, split, model)
            visualizer.dataset_meta = dataset.metainfo
            _count(split, dataset)
            _draw_samples(args.out / split, dataset, visualizer, args.samples)
        except (ValueError, FileNotFoundError) as error:
            problems.append(error)
    if len(problems) < len(_SPLITS):
        print(_SAVED.format(args.out))
    return problems


def _open_dataset(cfg: Any, split: str, model: Any) -> Any:
    """Build the dataset of a split, and check it as train.py does.

    Raises:
        ValueError, FileNotFoundError: for the first problem.
    """
    from mmengine.registry import DATASETS

    from natzoo.openmmlab.annotations import check_dataset, name_dataset, name_errors
    from natzoo.openmmlab.data import check_data

    check_data(cfg, (f"{split}_dataloader",))
    settings = cfg[f"{split}_dataloader"]
    with name_dataset(settings):
        dataset = DATASETS.build(settings.dataset)
    name_errors(dataset)
    check_dataset(dataset, model, is_training=split == "train")
    return dataset


def _count(split: str, dataset: Any) -> None:
    """Print the number of images and objects per class, or the share of pixels for label maps."""
    classes = list(map(str, dataset.metainfo["classes"]))
    infos = [dataset.get_data_info(index) for index in range(len(dataset))]
    if "reduce_zero_label" not in dataset.metainfo:  # mmdet
        objects, images, small = (np.zeros(len(classes), int) for _ in range(3))
        for info in infos:
            found = info.get("instances") or info.get("segments_info") or ()
            labels = np.array([one.get("bbox_label", one.get("category")) for one in found], int)
            objects += np.bincount(labels, minlength=len(classes))
            images += np.bincount(np.unique(labels), minlength=len(classes))
            boxes = np.array([one.get("bbox", [0, 0, 99, 99]) for one in found], float).reshape(-1, 4)
            is_small = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) < 32**2
            small += np.bincount(labels[is_small], minlength=len(classes))
        columns = {"images": images, "objects": objects, "below 32x32": small}
        empty = sum(not (info.get("instances") or info.get("segments_info")) for info in infos)
        title = f"{split}: {len(infos)} images, {empty} without objects"
    else:
        pixels, images = _count_pixels(dataset, infos, len(classes))
        share = pixels / max(1, pixels.sum())
        columns = {"images": images, "pixels": [f"{value:.2%}" for value in share]}
        title = f"{split}: {len(infos)} images"
    print_table(title, classes, columns)
    for number in np.flatnonzero(images == 0):
        print(command_line.printable(f"Warning: no image of {split} has the class {classes[number]}."))


def _count_pixels(dataset: Any, infos: list[dict[str, Any]], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels and the images of each class."""
    load = next(step for step in dataset.pipeline.transforms if "Annotations" in type(step).__name__)
    pixels, images = np.zeros(classes, int), np.zeros(classes, int)
    chosen = infos[:: max(1, len(infos) // _MAX_MAPS)]
    for info in tqdm(chosen, desc="Read label maps", unit="image", disable=None):
        info.setdefault("seg_fields", [])
        labels = load(info)["gt_seg_map"]
        found = np.bincount(labels[labels < classes].ravel(), minlength=classes)
        pixels += found
        images += found > 0
    return pixels, images


def _draw_samples(folder: Path, dataset: Any, visualizer: Any, count: int) -> None:
    """Write evenly spaced images with their labels."""
    for index in range(0, len(dataset), max(1, len(dataset) // max(1, count))):
        if index // max(1, len(dataset) // max(1, count)) == count:
            break
        sample = dataset[index]
        if sample is None:  # the pipeline dropped it
            continue
        instances = sample["data_samples"].get("gt_instances")
        if hasattr(instances, "bboxes") and hasattr(instances.bboxes, "tensor"):
            instances.bboxes = instances.bboxes.tensor  # what the visualizer draws
        pixels = sample["inputs"].permute(1, 2, 0).numpy()[..., ::-1].clip(0, 255).astype(np.uint8)
        name = f"{Path(sample['data_samples'].img_path).stem}.jpg"
        visualizer.add_datasample(
            name, np.ascontiguousarray(pixels), sample["data_samples"], draw_pred=False, out_file=str(folder / name)
        )


if __name__ == "__main__":
    command_line.run(main)
