"""Device, precision, and readable errors when memory runs out."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import synchronize

import torch

# PyTorch's messages for a data-loading worker that died or ran out of shared memory.
_WORKER_ERROR = re.compile("DataLoader worker.*(signal: (Killed|Bus)|exited unexpectedly)|unable to .*/torch_")


def pick_device(name: str) -> torch.device:
    """Return the device that --device names; "auto" is the GPU if there is one, else the CPU.

    Raises:
        ValueError: if the device is unknown or not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not available: {str(error).splitlines()[0]}") from error
    return device


def describe_device(device: torch.device, amp: str) -> str:
    """Return the device, its name or number of threads, and the precision of --amp, for messages."""
    detail = ""
    if device.type == "cuda":
        detail = f" ({torch.cuda.get_device_name(device)})"
    elif device.type == "cpu":
        threads = torch.get_num_threads()
        detail = f" ({threads} thread{'s' if threads > 1 else ''})"
    precision = {"none": "float32", "bf16": "bfloat16 mixed precision", "fp16": "float16 mixed precision"}[amp]
    return f"{device}{detail}, {precision}"


def enable_tf32(device: torch.device) -> None:
    """On a GPU, use TF32 for float32 matrix products, as the published training did, and cuDNN's autotuner."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def has_bfloat16_units() -> bool:
    """Return whether this CPU has instructions for bfloat16; True if PyTorch is built without oneDNN, which tells."""
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def slow_precision(amp: str, device: torch.device) -> str | None:
    """Return a warning if --amp is much slower than float32 on this device, else None."""
    if device.type != "cpu" or amp == "none":
        return None
    if amp == "fp16":
        return "Warning: --amp fp16 is slow on a CPU; use bf16 or none."
    if not has_bfloat16_units():
        return "Warning: --amp bf16 is several times slower than none on this CPU, which has no bfloat16 instructions."
    return None


def autocast_context(amp: str, device: torch.device) -> Callable[[], AbstractContextManager]:
    """Return a function that creates the context of a forward pass for --amp none, bf16 or fp16."""
    if amp == "none":
        return nullcontext
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return lambda: torch.autocast(device.type, dtype)


@contextmanager
def explain_memory_errors(remedy: str) -> Iterator[None]:
    """Turn out-of-memory errors of the GPU, and of data-loading workers, into a ValueError that suggests `remedy`.

    The same for workers that cannot be started: their semaphores are in /dev/shm.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(f"GPU memory is exhausted; {remedy} ({str(error).split('. ')[0]}).") from error
    except RuntimeError as error:
        line = next((line for line in str(error).splitlines() if _WORKER_ERROR.search(line)), None)
        if line is None:
            raise
        raise ValueError(
            "--workers: a data-loading worker died, probably because the memory or /dev/shm is full; use fewer "
            f"--workers, or give the container more shared memory with --shm-size ({line.strip()})."
        ) from error
    except OSError as error:
        if not any(caller.filename == synchronize.__file__ for caller in traceback.extract_tb(error.__traceback__)):
            raise
        raise ValueError(
            f"--workers: data-loading workers cannot be started ({error.strerror}); make /dev/shm writable, or use "
            "--workers 0."
        ) from error
