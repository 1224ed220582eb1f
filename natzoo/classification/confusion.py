"""Results per class: a table with accuracy and precision, and the confusion matrix as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from natzoo import command_line
from natzoo.checkpoints import write_atomically, write_table

_MAX_LABELLED = 40  # classes whose names and counts are readable
COLUMNS = ("class", "images", "correct", "accuracy", "precision", "confused_with")


def write_per_class(path: Path, names: Sequence[str], confusion: np.ndarray) -> None:
    """Write a CSV file with one row per class that has images.

    Args:
        path: the file.
        names: class names.
        confusion: [classes, classes], the number of images by true class (rows) and predicted class (columns).
    """
    rows = []
    for number, counts in enumerate(confusion):
        images, predicted, correct = counts.sum(), confusion[:, number].sum(), counts[number]
        if images == 0:
            continue
        others = np.where(np.arange(len(counts)) == number, 0, counts)
        rows.append(
            {
                "class": names[number],
                "images": int(images),
                "correct": int(correct),
                "accuracy": round(100 * correct / images, 3),
                "precision": round(100 * correct / predicted, 3) if predicted else "",
                "confused_with": names[int(others.argmax())] if others.any() else "",
            }
        )
    command_line.create_folder(path.parent, "--per-class")
    write_table(path, COLUMNS, rows)


def draw_confusion(path: Path, names: Sequence[str], confusion: np.ndarray) -> None:
    """Draw the confusion matrix as PNG with scikit-learn; rows add up to 1.

    Args:
        path: the file.
        names: class names, shown for up to 40 classes.
        confusion: as for `write_per_class`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.metrics import ConfusionMatrixDisplay

    classes = np.flatnonzero(confusion.sum(0) + confusion.sum(1))
    part = confusion[np.ix_(classes, classes)]
    shares = part / np.maximum(1, part.sum(1, keepdims=True))
    is_labelled = len(classes) <= _MAX_LABELLED
    labels = [command_line.printable(names[number][:24]) for number in classes.tolist()] if is_labelled else None
    side = min(14.0, 3 + 0.42 * len(classes))
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    display = ConfusionMatrixDisplay(shares, display_labels=labels)
    display.plot(ax=axes, include_values=is_labelled, values_format=".2f", cmap="Blues", colorbar=False)
    if is_labelled:
        axes.set_xticklabels(labels or (), rotation=90, parse_math=False)
        axes.set_yticklabels(labels or (), parse_math=False)
        for text in axes.texts:
            text.set_fontsize(7)
    else:
        axes.set(xticks=(), yticks=())
    axes.set(xlabel="predicted class", ylabel="true class")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    plt.close(figure)
    command_line.create_folder(path.parent, "--confusion")
    write_atomically(path, lambda file: file.write(content.getvalue()))
