"""What is measured: an `Entry` is a row of the table to come, a `Subject` the code behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")


class LeftOut(Exception):
    """A provider cannot take a case; the text says why."""


class Setting(NamedTuple):
    """How something runs: dtype by name, threads of PyTorch, device as torch.device reads it."""

    dtype: str
    threads: int
    device: str


class Entry(NamedTuple):
    """One measurement, all in plain words, so that another process can be told of it.

    Attributes:
        kind: "ops", "layers" or "models".
        group: what it is timed together with; figures of one group may be compared.
        case: shapes, as the kind writes them.
        provider: whose implementation.
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
        return getattr(torch, self.setting.dtype)

    @property
    def device(self) -> torch.device:
        return torch.device(self.setting.device)

    def __str__(self) -> str:
        return f"{self.provider}, {self.case}, {self.pass_name}, {self.setting.dtype}"


class Subject(NamedTuple):
    """What an entry calls, and the least that such a call must do.

    Attributes:
        call: what is timed; what it returns is only looked at by `check`.
        gflop: floating-point operations in 1e9, without any that an implementation may add.
        gbytes: bytes in 1e9 of the tensors that must be read or written.
        needs_grad: whether it runs with autograd on.
        check: raises LeftOut if what `call` returned is wrong.
        batch: images of a call; 0 where there are none.
    """

    call: Callable[[], Any]
    gflop: float
    gbytes: float
    needs_grad: bool = False
    check: Callable[[Any], None] = lambda result: None
    batch: int = 0

    def run(self) -> Any:
        """Calls once."""
        with torch.set_grad_enabled(self.needs_grad):
            return self.call()


def call_of(
    pass_name: str, forward: Callable[[], Tensor], inputs: list[Tensor], grad_out: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """A call that gives the output of `forward`, and for "forward+backward" the gradients of `inputs` after it."""
    if pass_name == "forward":
        return lambda: (forward(),)

    def forward_backward() -> tuple[Tensor, ...]:
        out = forward()
        return (out, *torch.autograd.grad(out, inputs, grad_out))

    return forward_backward


def check_providers(given: Iterable[str], known: Iterable[str]) -> None:
    """Raises ValueError naming the first provider that is not known."""
    for provider in given:
        if provider not in known:
            raise ValueError(f"provider {provider!r} is unknown: use {', '.join(known)}.")
