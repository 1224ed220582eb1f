"""Replacement for panopticapi, which is not on PyPI: the parts with which mmdet reads, writes and scores panoptic maps.

A panoptic map is an image whose colors encode segment ids: red + 256 * green + 256^2 * blue. Id 0 is unlabeled.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

VOID = 0
OFFSET = 256**3  # larger than any segment id


def rgb2id(colors: np.ndarray) -> np.ndarray:
    """Convert an image [H, W, 3], uint8, to segment ids [H, W], int32."""
    red, green, blue = np.moveaxis(np.asarray(colors, np.int32), -1, 0)
    return red + 256 * green + 256**2 * blue


def id2rgb(ids: np.ndarray) -> np.ndarray:
    """Convert segment ids [H, W], integers below 256^3, to an image [H, W, 3], uint8."""
    ids = np.asarray(ids)
    return np.stack([ids >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)


@dataclass
class Matches:
    """Matched, false and missed segments of one class.

    Attributes:
        iou: sum of the IoU of the matched segments.
        tp: number of matched segments.
        fp: number of predicted segments without a match.
        fn: number of true segments without a match.
    """

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __iadd__(self, other: Matches) -> Self:
        self.iou, self.tp = self.iou + other.iou, self.tp + other.tp
        self.fp, self.fn = self.fp + other.fp, self.fn + other.fn
        return self

    def quality(self) -> dict[str, float]:
        """Return panoptic quality and its factors, segmentation and recognition quality (arXiv:1801.00868, 4.1)."""
        segments = self.tp + (self.fp + self.fn) / 2
        segmentation = self.iou / self.tp if self.tp else 0.0
        recognition = self.tp / segments if segments else 0.0
        return {"pq": segmentation * recognition, "sq": segmentation, "rq": recognition}


class PQStat:
    """Matches per class id."""

    def __init__(self):
        self.matches: defaultdict[int, Matches] = defaultdict(Matches)

    def __getitem__(self, category: int) -> Matches:
        return self.matches[category]

    def __iadd__(self, other: PQStat) -> Self:
        for category, matches in other.matches.items():
            self.matches[category] += matches
        return self

    def pq_average(
        self, categories: Mapping[int, Mapping[str, Any]], isthing: bool | None
    ) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
        """Average the qualities over the classes that occur in the annotations or predictions.

        Args:
            categories: class id -> description, whose "isthing" is 1 for things and 0 for stuff.
            isthing: True to select things, False to select stuff, None to select both.

        Returns:
            The averages, with the number of classes as "n", and the qualities of each selected class.
        """
        selected = [key for key, category in categories.items() if isthing in (None, category["isthing"] == 1)]
        qualities = {key: self.matches.get(key, Matches()).quality() for key in selected}
        present = [qualities[key] for key in selected if key in self.matches]
        mean = {name: sum(one[name] for one in present) / max(len(present), 1) for name in ("pq", "sq", "rq")}
        return {**mean, "n": len(present)}, qualities
