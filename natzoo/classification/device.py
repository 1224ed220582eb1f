"""Where and in which precision a script computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

# How torch says that a loading process has died, or could not hand its images over.
_LOST = re.compile("DataLoader worker.*(signal: (Killed|Bus)|exited unexpectedly)|unable to .*/torch_")


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


def enable_tf32(device: torch.device) -> None:
    """On a GPU: float32 matrix products in TF32, as in the published training, and the fastest convolutions."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


@contextmanager
def explain_memory_errors(remedy: str) -> Iterator[None]:
    """Raises ValueError, saying what to do, where the block finds the memory full: the GPU's, or loading processes'."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"the memory of the GPU is not enough: {remedy} ({str(error).split('. ')[0]}).") from error
    except RuntimeError as error:
        lost = next((line for line in str(error).splitlines() if _LOST.search(line)), None)
        if lost is None:
            raise
        raise ValueError(
            "a process that loads images has died, as it does where memory is full, or /dev/shm, through which it "
            f"hands images over: use fewer --workers, or a container with a larger --shm-size ({lost.strip()})."
        ) from error


def autocast_context(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """The context of a forward pass for --amp none, bf16 or fp16."""
    if amp == "none":
        return nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return lambda: torch.autocast(device.type, dtype)
