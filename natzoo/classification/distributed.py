"""The processes of a run, as torchrun starts them, one a GPU; a script started alone is a group of one.

Numbers that the processes agree on travel over gloo between CPUs, which leaves the GPUs' queues alone; those of
GPUs, the gradients, over NCCL.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import natten
from natten import backends
from natzoo.classification.signals import Interrupted, SignalHandler
from natzoo.command_line import MISTAKES

T = TypeVar("T")


class World(NamedTuple):
    """Which process this is, and how many there are; `local` means on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        return -(-self.size // self.local_size)

    def say(self, text: str) -> None:
        """Prints a line, above a progress bar if there is one; the first process does."""
        if self.is_main_process:
            tqdm.write(text.encode(errors="backslashreplace").decode())  # a file's name may be no UTF-8

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over all processes, in float64; all must call it."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, in the order of their world; all must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def local_main_first(self, function: Callable[[], T]) -> T:
        """The function's value, called by one process a machine before the others: what it downloads, they find."""
        if self.local_rank > 0:
            self.sum(0)
            return function()
        try:
            return function()
        finally:
            self.sum(0)  # also where it fails: so it will for the others

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with gradients averaged over all processes after each backward pass."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def check_same(self, remedy: str, /, **what: Any) -> None:
        """Checks that all processes have the same of everything; all must call it.

        Args:
            remedy: what to do where they have not.
            what: plain values, by what they are called in the error's text.

        Raises:
            ValueError: naming the first process that has another value, and how it differs.
        """
        found = self.gather((socket.gethostname(), what))
        first_host, first = found[0]
        for rank, (host, theirs) in enumerate(found):
            for name, value in theirs.items():
                if value != first[name]:
                    raise ValueError(
                        f"rank {rank} on {host} has the {name} {value}, but rank 0 on {first_host} has {first[name]}: "
                        f"{remedy}."
                    )

    def raise_if_signalled(self, signal_handler: SignalHandler) -> None:
        """Raises Interrupted in all processes if any of them was told to end; all must call it."""
        if self.sum(signal_handler.received is not None) != [0]:
            raise Interrupted


def kernel_fingerprint(device: torch.device) -> dict[str, str]:
    """What computes attention in this process: backend, version and hash of natten's sources, version of torch."""
    probe = torch.empty(1, 7, 7, 1, 32, device=device)
    folder = Path(natten.__file__).parent
    sources = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".h", ".cpp", ".cuh", ".cu")):
        sources.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return {
        "attention backend": backends.choose(probe, backends.requested(None)).NAME,
        "natten version": natten.__version__,
        "hash of natten's sources": sources.hexdigest()[:12],
        "torch version": torch.__version__,
    }


@contextlib.contextmanager
def init_world(device: str, signal_handler: SignalHandler) -> Iterator[tuple[World, str]]:
    """Makes this process one of those that torchrun started, until the block ends.

    A mistake that all processes find is told by the first one alone; of one that another finds, its rank is told.

    Args:
        device: --device; "auto" and "cuda" become the GPU of this process.
        signal_handler: knows whether torchrun is ending this process.

    Yields:
        the world, and the device's name.

    Raises:
        ValueError: if there are fewer GPUs than processes on this machine, or all are sent to one.
    """
    if "RANK" not in os.environ:
        yield World(), device
        return
    world = World(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    try:
        is_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if device.startswith("cuda:") and world.local_size > 1:
            raise ValueError(f"--device {device} puts all processes on one GPU: use cuda, which gives each its own.")
        if is_cuda:
            if torch.cuda.device_count() < world.local_size:
                raise ValueError(
                    f"{world.local_size} processes share {torch.cuda.device_count()} GPUs here: start one a GPU."
                )
            device = f"cuda:{world.local_rank}"
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo")
        yield world, device
        dist.destroy_process_group()
    except SystemExit:
        dist.destroy_process_group()
        raise
    except MISTAKES as error:
        if not world.is_main_process:
            for _ in range(100):  # for the first one to find the same, whereupon torchrun ends this one
                time.sleep(0.1)
                if signal_handler.received:
                    sys.exit(2)
            print(f"on rank {world.rank}:", file=sys.stderr)
        raise error
    except RuntimeError as error:
        if "gloo" not in str(error).lower() and not isinstance(error, dist.DistError):
            raise
        sys.exit(f"rank {world.rank} lost another process, which has ended: its message, if any, says why.")
