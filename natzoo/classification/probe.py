"""Judge frozen features: k-nearest neighbors and a linear classifier, trained on the features of the training images.

Both take minutes on a small data set, so they show whether a backbone suits it before anything is fine-tuned.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

from natzoo import command_line
from natzoo.checkpoints import write_table
from natzoo.classification.data.datasets import ImageDataset, check_bad_images
from natzoo.classification.data.loader import create_evaluation_loader, uses_shards
from natzoo.classification.data.readers import open_reader, read_class_map
from natzoo.classification.data.transforms import evaluation_transform, preprocessing
from natzoo.classification.factory import TimmModel
from natzoo.classification.inference import add_model_options, requested_model
from natzoo.classification.options import WORKERS, HelpFormatter, add_dataset_options, batch_size, positive, workers
from natzoo.device import autocast_context, enable_tf32, explain_memory_errors, pick_device

COLUMNS = ("model", "data", "features", "train_images", "test_images", "knn_top1", "linear_top1")
_TEMPERATURE = 0.07  # of the votes of neighbors, as in DINO (arXiv:2104.14294), appendix F.1
_STRENGTHS = 10.0 ** np.arange(-4, 2)  # inverse L2 regularization that cross-validation chooses from


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of probe.py."""
    parser = command_line.Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("data", metavar="DATA", help="folder with train/ and val/")
    add_model_options(parser)
    add_dataset_options(parser)
    parser.add_argument("--train-split", default="train", metavar="NAME", help="name of the training split")
    parser.add_argument("--val-split", default="val", metavar="NAME", help="name of the validation split")
    parser.add_argument("--class-map", metavar="FILE", help="text file with one class name per line, in class order")
    parser.add_argument("--neighbors", type=positive, default=20, metavar="K", help="neighbors that vote")
    parser.add_argument("--batch-size", type=batch_size, default=64, metavar="N", help="images per forward pass")
    parser.add_argument("--workers", type=workers, default=WORKERS, metavar="N", help="data-loading workers")
    parser.add_argument("--amp", choices=["none", "bf16", "fp16"], default="none", help="mixed-precision data type")
    parser.add_argument("--skip-bad-images", action="store_true", help="ignore images that cannot be read")
    parser.add_argument("--results-file", type=Path, metavar="CSV", help="write the figures to a table with one row")
    return parser


@torch.inference_mode()
def extract_features(
    model: TimmModel, loader: Any, device: torch.device, autocast: Any, skip_bad_images: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Compute what the classifier of a model would receive.

    Args:
        model: a timm model in eval mode, on `device`.
        loader: batches of images and class numbers; negative numbers are ignored.
        device: device of the computation.
        autocast: creates the context of each forward pass.
        skip_bad_images: ignore images that cannot be read instead of raising.

    Returns:
        Features [images, features] in float32, and class numbers [images].

    Raises:
        ValueError: if an image cannot be read and `skip_bad_images` is off.
    """
    features, targets = [], []
    for x_BCHW, target_B in tqdm(loader, desc=f"Features of {loader.dataset.source}", leave=False, disable=None):
        check_bad_images(loader.dataset, skip_bad_images)
        is_labeled_B = target_B >= 0
        with autocast():
            found = model.forward_head(model.forward_features(x_BCHW[is_labeled_B].to(device)), pre_logits=True)
        features.append(found.float().flatten(1).cpu().numpy())
        targets.append(target_B[is_labeled_B].numpy())
    return np.concatenate(features), np.concatenate(targets)


def knn_accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], neighbors: int) -> float:
    """Return the accuracy in percent of neighbors by cosine similarity s that vote with weight exp(s / 0.07)."""
    classifier = KNeighborsClassifier(
        min(neighbors, len(train[0])), metric="cosine", weights=lambda distance: np.exp((1 - distance) / _TEMPERATURE)
    )
    return 100 * classifier.fit(*train).score(*test)


def linear_accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the accuracy in percent of logistic regression on standardized features.

    Cross-validation within the training images chooses the L2 regularization.

    Raises:
        ValueError: if a class has fewer than three training images.
    """
    folds = 3
    fewest = np.unique(train[1], return_counts=True)[1].min()
    if fewest < folds:
        raise ValueError(f"DATA has a class with {fewest} training images; the linear classifier requires {folds}.")
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
    search = GridSearchCV(classifier, {"logisticregression__C": _STRENGTHS}, cv=folds)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of the weakest regularization
        return 100 * search.fit(*train).score(*test)


def probe(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluate the features of the requested model and return a row of the table, with accuracies in percent."""
    if uses_shards(args):
        raise ValueError("--dataset wds has no class names; use folders, tar files or hfds/NAME.")
    device = pick_device(args.device)
    enable_tf32(device)
    model, record = requested_model(args, device)
    config = preprocessing(args, model, record)
    autocast = autocast_context(args.amp, device)

    def features_of(split: str, classes: list[str] | None) -> tuple[tuple[np.ndarray, np.ndarray], list[str]]:
        reader = open_reader(args.dataset, args.data, split, classes, (args.input_key, args.target_key))
        dataset: Any = ImageDataset(reader, evaluation_transform(config), replace=False)
        loader = create_evaluation_loader(dataset, args.batch_size, args.workers, device.type == "cuda")
        return extract_features(model, loader, device, autocast, args.skip_bad_images), dataset.classes

    train, classes = features_of(args.train_split, read_class_map(args.class_map))
    test, _ = features_of(args.val_split, classes)
    row = {
        "model": args.checkpoint or args.model,
        "data": args.data,
        "features": train[0].shape[1],
        "train_images": len(train[1]),
        "test_images": len(test[1]),
        "knn_top1": round(knn_accuracy(train, test, args.neighbors), 2),
        "linear_top1": round(linear_accuracy(train, test), 2),
    }
    text = "{model}: {train_images} training and {test_images} test images, {features} features"
    print(command_line.printable(text.format(**row)))
    print(f"k-nearest neighbors (k = {args.neighbors}): top-1 {row['knn_top1']:.2f}%")
    print(f"linear classifier: top-1 {row['linear_top1']:.2f}%")
    return row


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run probe.py with a command line and return the row of the table."""
    args = make_parser().parse_args(argv)
    with explain_memory_errors("lower --batch-size, or use --amp bf16"):
        row = probe(args)
    if args.results_file:
        command_line.create_folder(args.results_file.parent, "--results-file")
        write_table(args.results_file, COLUMNS, [row])
    return row


if __name__ == "__main__":
    command_line.run(main)
