"""Count parameters, MACs and activations of a model and of each of its layers.

MACs are multiply-adds in matrix products, convolutions and attention, as counted by torch.utils.flop_counter.
Activations are the output elements of the same operators, as in arXiv:2003.13678, where they predict the run time of a
network better than MACs do. Norms, activation functions and additions are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import nn, no_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import natten.flops  # noqa: F401  registers the formulas of neighborhood attention


class Layer(NamedTuple):
    """Counts of a module including its submodules.

    Attributes:
        name: path of the module, as in `named_modules`; empty for the model itself.
        kind: class name.
        parameters: number of parameters.
        macs: multiply-adds of all its calls in one run.
        activations: output elements of all its calls in one run.
    """

    name: str
    kind: str
    parameters: int
    macs: int
    activations: int

    @property
    def depth(self) -> int:
        """Nesting level, 0 for the model itself."""
        return self.name.count(".") + 1 if self.name else 0


class _Activations(TorchDispatchMode):
    """Count the output elements of operators that have a FLOP formula."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            first = out[0] if isinstance(out, (tuple, list)) else out  # attention also returns logsumexp
            self.total += first.numel()
        return out


def count(model: nn.Module, run: Callable[[], Any]) -> list[Layer]:
    """Count the model and each of its modules, in order.

    A module that is never called, such as a list of blocks, gets the sum of its children's counts.

    Args:
        model: the model; on the meta device only shapes are computed.
        run: function that runs the model, or parts of it, on one image.

    Returns:
        The counts of the model, then of its modules in the order of `named_modules`.
    """
    modules = dict(model.named_modules())
    called: dict[str, list[tuple[int, int]]] = {}
    # Entered first, so that it sees the operators that FlopCounterMode decomposes.
    activations, macs = _Activations(), FlopCounterMode(display=False)
    with ExitStack() as stack:
        for name, module in modules.items():
            for hook in _hooks(module, called.setdefault(name, []), lambda: _totals(macs, activations)):
                stack.callback(hook.remove)
        with no_grad(), activations, macs:
            run()
        total = _totals(macs, activations)
    layers = []
    for name, module in modules.items():
        macs_and_activations = _counts(name, modules, called) if name else total
        parameters = sum(parameter.numel() for parameter in module.parameters())
        layers.append(Layer(name, type(module).__name__, parameters, *macs_and_activations))
    return layers


def _totals(macs: FlopCounterMode, activations: _Activations) -> tuple[int, int]:
    """Return the MACs and activations counted so far."""
    return macs.get_total_flops() // 2, activations.total


def _hooks(module: nn.Module, calls: list[tuple[int, int]], totals: Callable[[], tuple[int, int]]) -> list:
    """Register hooks that append the counts of each call of a module to `calls`, and return the hooks."""
    started: list[tuple[int, int]] = []

    def after(*_):
        before = started.pop()
        now = totals()
        calls.append((now[0] - before[0], now[1] - before[1]))

    return [module.register_forward_pre_hook(lambda *_: started.append(totals())), module.register_forward_hook(after)]


def _counts(name: str, modules: dict[str, nn.Module], called: dict[str, list]) -> tuple[int, int]:
    """Return the MACs and activations of a module: the sum over its calls, or over its children if never called."""
    if not called[name]:
        children = [f"{name}.{child}" for child, _ in modules[name].named_children()]
        calls = [_counts(child, modules, called) for child in children if child in modules]
    else:
        calls = called[name]
    return sum(macs for macs, _ in calls), sum(activations for _, activations in calls)
