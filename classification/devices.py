"""Where and in which precision a script computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def pick_device(name: str) -> torch.device:
    """The device of --device; "auto" is the GPU if there is one.

    Raises:
        ValueError: if it cannot be used here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Raises ValueError, saying what to do, where the block finds the GPU's memory full."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the memory of the GPU is not enough: {remedy} ({str(error).split('. ')[0]}).") from error


def autocast_of(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """The context of a forward pass for --amp none, bf16 or fp16."""
    if amp == "none":
        return nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return lambda: torch.autocast(device.type, dtype)
