"""What the commands `python -m natten.NAME` share."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Ends with status 2 and one line on a mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def numbers(text: str) -> tuple[int, ...]:
    """One number, or one an axis, as "7" and "56x56" say."""
    return tuple(int(word) for word in text.replace("x", ",").split(","))


numbers.__name__ = "number, or numbers such as 12x12"  # which argparse shows
