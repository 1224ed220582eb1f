"""What is measured: an `Entry` describes one row of the table, a `Subject` is the code that it runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from natten.profiler import Work

DTYPES = ("float32", "bfloat16", "float16", "tf32")  # tf32: float32 whose products are rounded, on GPUs


class LeftOut(Exception):
    """A provider does not support a case; the message is the reason."""


class Setting(NamedTuple):
    """How an entry runs.

    Attributes:
        dtype: one of DTYPES.
        threads: number of PyTorch's CPU threads.
        device: device, as torch.device parses it.
    """

    dtype: str
    threads: int
    device: str

    @property
    def backend(self) -> str:
        """The compiled backend of natten for this device."""
        return "cpu" if self.device == "cpu" else "cuda"


class Entry(NamedTuple):
    """One measurement, in plain values, so that it can be passed to another process.

    Attributes:
        kind: "ops", "layers" or "models".
        group: entries of one group are timed together and can be compared.
        case: shapes, in the notation of the kind.
        provider: name of the implementation.
        pass_name: "forward", "forward+backward", "inference" or "step".
        setting: how it runs.
    """

    kind: str
    group: str
    case: str
    provider: str
    pass_name: str
    setting: Setting

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.setting.dtype == "tf32" else getattr(torch, self.setting.dtype)

    @property
    def device(self) -> torch.device:
        return torch.device(self.setting.device)

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Set the precision of float32 matrix products."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.setting.dtype == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def __str__(self) -> str:
        return f"{self.provider}, {self.case}, {self.pass_name}, {self.setting.dtype}"


class Subject(NamedTuple):
    """The code of an entry, and the minimal work of a call.

    Attributes:
        call: what is timed; its result is read by `check` only.
        work: the minimal work of the operation, which an implementation may exceed.
        needs_grad: whether it runs with autograd enabled.
        check: raises LeftOut if a result of `call` is wrong.
        batch: images per call; 0 if there are none.
        others: equal calls with other inputs, so that inputs do not stay in a GPU's cache.
        use_graph: whether a CUDA graph may replace the calls.
    """

    call: Callable[[], Any]
    work: Work
    needs_grad: bool = False
    check: Callable[[Any], None] = lambda result: None
    batch: int = 0
    others: tuple[Callable[[], Any], ...] = ()
    use_graph: bool = True

    @contextmanager
    def context(self, entry: Entry) -> Iterator[None]:
        """Set the precision and autograd mode in which calls run."""
        with entry.precision(), torch.set_grad_enabled(self.needs_grad):
            yield

    def run(self, entry: Entry) -> Any:
        """Call once."""
        with self.context(entry):
            return self.call()


def call_of(
    pass_name: str, forward: Callable[[], Tensor], inputs: list[Tensor], grad_out: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call that computes the output of `forward` and, for "forward+backward", the gradients of `inputs`."""
    if pass_name == "forward":
        return lambda: (forward(),)

    def forward_backward() -> tuple[Tensor, ...]:
        out = forward()
        return (out, *torch.autograd.grad(out, inputs, grad_out))

    return forward_backward


def check_providers(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError if a provider is unknown."""
    for provider in given:
        if provider not in known:
            raise ValueError(f"provider {provider!r} is unknown; use one of {', '.join(known)}.")


def positive(text: str) -> int:
    """Parse a positive number, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value
