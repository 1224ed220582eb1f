"""The processes of a run: one per GPU, started by torchrun, or a single one.

Small values, such as sums of losses, are exchanged between CPUs over Gloo, which does not wait for the GPUs. Gradients
on GPUs are reduced over NCCL.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
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
from natzoo.command_line import USER_ERRORS, printable

T = TypeVar("T")
# How long another process waits for the main process to print the same error.
_ERROR_DELAY_S = 30.0


class World(NamedTuple):
    """The rank of this process and the number of processes; `local` means on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return -(-self.size // self.local_size)

    def print(self, text: str) -> None:
        """Print a line in the main process, above the progress bar if there is one."""
        if self.is_main_process:
            tqdm.write(printable(text))

    def sum(self, *values: float) -> list[float]:
        """Return the sum of each value over all processes, in float64. All processes must call it."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes in the order of their ranks. All processes must call it."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def local_main_first(self, function: Callable[[], T]) -> T:
        """Call a function in one process per machine first; the others then find what it downloaded.

        All processes must call it.
        """
        if self.local_rank > 0:
            self.sum(0)
            return function()
        try:
            return function()
        finally:
            self.sum(0)  # also on an error: the other processes wait here

    def data_parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """Wrap a model so that backward passes average the gradients over all processes."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    def check_same(self, remedy: str, /, **values: Any) -> None:
        """Check that all processes have the same values. All processes must call it.

        Args:
            remedy: what to do if they differ, for the message.
            values: plain values by name.

        Raises:
            ValueError: naming the first process with another value.
        """
        gathered = self.gather((socket.gethostname(), values))
        main_host, expected = gathered[0]
        for rank, (host, found) in enumerate(gathered):
            for name, value in found.items():
                if value != expected[name]:
                    raise ValueError(
                        f"{name} differs: {value} on rank {rank} ({host}), {expected[name]} on rank 0 ({main_host}); "
                        f"{remedy}."
                    )

    def raise_if_signalled(self, signals: SignalHandler) -> None:
        """Raise Interrupted in all processes if any of them received a signal. All processes must call it."""
        if self.sum(signals.received is not None) != [0]:
            raise Interrupted


def kernel_fingerprint(device: torch.device) -> dict[str, str]:
    """Return the attention backend, the version and hash of natten's sources, and the version of torch."""
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
def init_world(device: str, signals: SignalHandler) -> Iterator[tuple[World, str]]:
    """Join the processes that torchrun started; leave them at the end of the block.

    An error that all processes raise is printed only by the main process: the others wait until torchrun stops them. If
    that does not happen within 30 seconds, the error is their own, and they raise it too.

    Args:
        device: the option --device; "auto" and "cuda" become the GPU of this process.
        signals: records SIGTERM, with which torchrun stops this process.

    Yields:
        the world, and the name of the device.

    Raises:
        ValueError: if there are fewer GPUs than processes on this machine, or if --device names a single GPU for all.
    """
    if "RANK" not in os.environ:
        yield World(), device
        return
    world = World(*(int(os.environ[key]) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")))
    try:
        is_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if device.startswith("cuda:") and world.local_size > 1:
            raise ValueError(f"--device {device} puts all processes on one GPU; use cuda for one GPU per process.")
        if is_cuda:
            if torch.cuda.device_count() < world.local_size:
                raise ValueError(
                    f"--device {device}: {torch.cuda.device_count()} GPUs for {world.local_size} processes on this "
                    "machine; start one process per GPU."
                )
            device = f"cuda:{world.local_rank}"
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if is_cuda else "gloo")
        yield world, device
        dist.destroy_process_group()
    except SystemExit:
        dist.destroy_process_group()
        raise
    except USER_ERRORS:
        if not world.is_main_process:
            signals.handle_ctrl_c()  # KeyboardInterrupt would hide the error
            deadline = time.monotonic() + _ERROR_DELAY_S
            while not signals.received and time.monotonic() < deadline:
                time.sleep(0.1)
            if signals.received == signal.SIGTERM:  # the main process failed, so torchrun stops this one
                sys.exit(2)
            print(f"rank {world.rank}:", file=sys.stderr)
        raise
    except RuntimeError as error:
        if "gloo" not in str(error).lower() and not isinstance(error, dist.DistError):
            raise
        sys.exit(f"rank {world.rank} lost the connection to another process; see the error of that process, if any.")
