"""What mmdet calls of panopticapi, which no package index has: reading and writing panoptic maps, and their score.

A panoptic map is a picture whose colours number segments: red + 256 green + 256^2 blue; 0 is no segment.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

VOID = 0
OFFSET = 256**3  # more than any segment's number


def rgb2id(colours: np.ndarray) -> np.ndarray:
    """Numbers of segments [H, W], int32, of a picture [H, W, 3], uint8."""
    red, green, blue = np.moveaxis(np.asarray(colours, np.int32), -1, 0)
    return red + 256 * green + 256**2 * blue


def id2rgb(numbers: np.ndarray) -> np.ndarray:
    """The picture [H, W, 3], uint8, of numbers of segments [H, W], integers below 256^3."""
    numbers = np.asarray(numbers)
    return np.stack([numbers >> shift & 255 for shift in (0, 8, 16)], -1).astype(np.uint8)


@dataclass
class Matches:
    """A class's segments: those found, falsely found, and missed; and the sum of the IoU of those found."""

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __iadd__(self, other: Matches) -> Self:
        self.iou, self.tp = self.iou + other.iou, self.tp + other.tp
        self.fp, self.fn = self.fp + other.fp, self.fn + other.fn
        return self

    def quality(self) -> dict[str, float]:
        """Panoptic quality with its factors, segmentation and recognition quality (arXiv:1801.00868, section 4.1)."""
        segments = self.tp + (self.fp + self.fn) / 2
        found = self.iou / self.tp if self.tp else 0.0
        recognised = self.tp / segments if segments else 0.0
        return {"pq": found * recognised, "sq": found, "rq": recognised}


class PQStat:
    """The matches of each class, by its id."""

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
        """The mean over the classes that pictures or predictions have, with their number as "n"; and those of each.

        Args:
            categories: each class's description by its id; its "isthing" tells things from stuff.
            isthing: whether things, or stuff, are asked for; all if None.
        """
        asked = [key for key, category in categories.items() if isthing in (None, category["isthing"] == 1)]
        qualities = {key: self.matches.get(key, Matches()).quality() for key in asked}
        seen = [qualities[key] for key in asked if key in self.matches]
        mean = {name: sum(one[name] for one in seen) / max(len(seen), 1) for name in ("pq", "sq", "rq")}
        return {**mean, "n": len(seen)}, qualities
