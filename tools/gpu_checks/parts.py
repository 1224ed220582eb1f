"""The parts of the run, in order."""

from __future__ import annotations

from typing import NamedTuple


class Part(NamedTuple):
    """A part of the run.

    Attributes:
        name: also the name of the benchmark's part in speed.py.
        module: the module in this package that runs it.
        limit_s: the longest time it may take.
        least_s: it starts only if it has that long.
        is_required: whether the run stops if it fails.
    """

    name: str
    module: str
    limit_s: float
    least_s: float
    is_required: bool = False


PARTS = (
    Part("smoke", "smoke", 30, 10, is_required=True),
    Part("compiling", "compiling", 90, 5),
    Part("self-check", "smoke", 20, 10),
    Part("ops", "speed", 90, 20),
    Part("random", "random_problems", 80, 20),
    Part("memcheck", "sanitizer", 45, 15),
    Part("layers", "speed", 40, 15),
    Part("inference", "speed", 60, 25),
    Part("latency", "speed", 20, 10),
    Part("training", "speed", 45, 20),
    Part("racecheck", "sanitizer", 45, 15),
    Part("counters", "counters", 40, 15),
    Part("flex", "speed", 45, 20),
    Part("compiled", "speed", 75, 35),
)
