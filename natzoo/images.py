"""Limits on the dimensions of images: a file of a few hundred bytes can describe an image that fills the memory."""

from __future__ import annotations

MAX_PIXELS = 178_956_970  # Pillow refuses larger images too
MAX_RATIO = 256  # resizing the short side to N pixels makes at most N * 256 * N


def check_image_size(width: int, height: int) -> None:
    """Check the dimensions of an image before it is decoded or resized.

    Raises:
        ValueError: if the image is empty, too large or too elongated; the caller adds the name of the file.
    """
    if width < 1 or height < 1:
        raise ValueError(f"has {width} x {height} pixels; remove it.")
    if width * height > MAX_PIXELS:
        raise ValueError(f"has {width} x {height} pixels, but the limit is {MAX_PIXELS}; split it or make it smaller.")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(
            f"has {width} x {height} pixels, but a side may be at most {MAX_RATIO} times the other; crop it."
        )
