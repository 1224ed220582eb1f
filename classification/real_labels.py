"""ImageNet's validation images with all labels that fit: "Are we done with ImageNet?", arXiv:2006.07159."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from torch.utils.data import Dataset

from classification.images import Images

_NAME = "ILSVRC2012_val_{:08d}"


class RealLabels(Dataset):
    """The images of a data set, with the numbers of all classes that fit them, filled up with -1; [as many as any has].

    Images without any such class are left out of the accuracy.

    Args:
        images: ImageNet's validation images, named as they came.
        path: JSON, for each image in their order a list of numbers; timm's copy of the published file unless given.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: naming an image that the file has no labels of.
    """

    def __init__(self, images: Images, path: str | None = None):
        self.images = images
        self.where = f"{images.where} with real labels"
        if path and not Path(path).is_file():
            raise FileNotFoundError(f"there is no file of labels {path}: check the path given to --real-labels.")
        text = Path(path).read_bytes() if path else pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json")
        labels = json.loads(text)
        numbers = {_NAME.format(number): number - 1 for number in range(1, len(labels) + 1)}
        self.targets = torch.full((len(images), max(map(len, labels))), -1)
        for index in range(len(images)):
            name = PurePosixPath(images.reader.filename(index)).stem
            if name not in numbers:
                raise ValueError(f"{name} has no real labels: they are of ImageNet's validation images alone.")
            found = labels[numbers[name]]
            self.targets[index, : len(found)] = torch.tensor(found, dtype=torch.long)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, target = self.images[index]
        return image, self.targets[index] if target >= 0 else torch.full_like(self.targets[index], -1)

    def bad_images(self) -> list[str]:
        return self.images.bad_images()
