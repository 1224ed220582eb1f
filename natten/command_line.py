"""What the commands `python -m natten.NAME` share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Ends with status 2 and one line on a mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def numbers(text: str) -> tuple[int, ...]:
    """One number, or one an axis, as "7" and "56x56" say."""
    return tuple(int(word) for word in text.replace("x", ",").split(","))


numbers.__name__ = "number, or numbers such as 12x12"  # which argparse shows


def causal_axes(named: Sequence[int] | None, rank: int) -> tuple[bool, ...]:
    """Which axes are causal by `--causal [AXIS ...]`: none without it, all where it names none.

    Raises:
        ValueError: if it names an axis that --size does not have.
    """
    if named and not set(named) <= set(range(rank)):
        raise ValueError(f"--causal names the axes {named}, but --size has the axes 0 to {rank - 1}.")
    return tuple(named is not None and (not named or axis in named) for axis in range(rank))
