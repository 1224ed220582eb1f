"""Compare exported programs with the original model: largest difference, accuracy, size and latency."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporting.formats import Program, Shapes
from natzoo.classification.data.datasets import ImageDataset, read_image
from natzoo.classification.data.loader import create_evaluation_loader
from natzoo.classification.data.readers import IMAGE_SUFFIXES, open_reader
from natzoo.classification.data.transforms import evaluation_transform

_MOST_IMAGES = 16  # to compare
_BATCH = 16  # of the accuracy


def read_images(folder: Path, config: dict[str, Any], most: int = _MOST_IMAGES) -> np.ndarray:
    """Return images of a folder and its subfolders, spread evenly and preprocessed for evaluation: [N, C, H, W].

    Raises:
        ValueError: if there are none, or one cannot be read.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))}).")
    chosen = np.linspace(0, len(paths) - 1, min(most, len(paths))).round().astype(int)
    transform = evaluation_transform(config)
    return np.stack([transform(read_image(str(paths[index]))).numpy() for index in chosen])


def compare(model: nn.Module, program: Program, shapes: Shapes, images: np.ndarray | None) -> Iterator[str]:
    """Yield the largest difference between the logits of the program and of the model, for several inputs.

    Raises:
        ValueError: if a difference exceeds 1e-3 of the logits' size, or the program does not run.
    """
    inputs = [("random, batch 1", shapes.example(1)), ("random, batch 3", shapes.example(3))]
    for side in {shapes.least, shapes.most} - {None}:
        inputs.append((f"random, {side} x {side}", shapes._replace(height=side, width=side).example(1)))
    if images is not None:
        inputs += [(f"{len(images)} images", torch.from_numpy(images))]
    for title, x_BCHW in inputs:
        expected_BK = _logits(model, x_BCHW)
        try:
            found_BK = np.concatenate([program(part.numpy()) for part in x_BCHW.split(4)])
        except Exception as error:  # runtimes have errors of their own
            raise ValueError(f"the program does not run on {title}: {str(error).splitlines()[0]}") from error
        difference, largest = np.abs(found_BK - expected_BK).max(), np.abs(expected_BK).max()
        if not difference <= 1e-3 * max(1.0, largest):
            raise ValueError(f"the program differs from the model by {difference:.2g} on {title}; please report this.")
        yield f"largest difference of logits up to {largest:.3g}: {difference:.1e} ({title})"


@torch.inference_mode()
def _logits(model: nn.Module, x_BCHW: Tensor) -> np.ndarray:
    return torch.cat([model(part) for part in x_BCHW.split(4)]).numpy()


def table(
    model: nn.Module,
    programs: Mapping[str, Program],
    shapes: Shapes,
    batch: int,
    rounds: int,
    data: Path | None,
    config: dict[str, Any],
    record: dict[str, Any],
) -> str:
    """Return a table with the latency of model and programs and, with a folder of images, their accuracy."""
    images = shapes.example(batch).numpy()

    def eager(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(images)).numpy()

    everyone = {"eager": eager, **programs}
    times = _time(everyone, images, rounds)
    accuracies = _accuracies(everyone, data, config, record) if data else {}
    lines = [f"{'program':<14} {'ms':>8} {'images/s':>9}" + (f" {'top-1':>7}" if data else "")]
    for name, seconds in times.items():
        cells = f"{name:<14} {1e3 * seconds:>8.1f} {batch / seconds:>9.1f}"
        lines.append(cells + (f" {accuracies[name]:>6.2f}%" if data else ""))
    return "\n".join(lines)


def _time(programs: Mapping[str, Program], images: np.ndarray, rounds: int) -> dict[str, float]:
    """Return the median time of each program in seconds, in turns, after one call of each that does not count."""
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for number in range(rounds + 1):
        for name, program in programs.items():
            start = time.perf_counter()
            program(images)
            if number:
                samples[name].append(time.perf_counter() - start)
    return {name: float(np.median(found)) for name, found in samples.items()}


def _accuracies(
    programs: Mapping[str, Program], data: Path, config: dict[str, Any], record: dict[str, Any]
) -> dict[str, float]:
    """Return the top-1 accuracy of each program in percent on a folder with one subfolder per class.

    Raises:
        ValueError: if an image cannot be read, or the classes do not fit.
    """
    dataset = ImageDataset(open_reader("", str(data), "val", record["classes"]), evaluation_transform(config))
    loader = create_evaluation_loader(dataset, _BATCH, min(2, os.cpu_count() or 1), False)
    correct = dict.fromkeys(programs, 0)
    for x_BCHW, target_B in loader:
        for name, program in programs.items():
            correct[name] += int((program(x_BCHW.numpy()).argmax(1) == target_B.numpy()).sum())
    return {name: 100 * count / len(dataset) for name, count in correct.items()}
