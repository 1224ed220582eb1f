"""What a model takes for one picture: parameters, MACs and activations, in all and of each of its layers.

A MAC is a multiplication with its addition, of matrix products, convolutions and attention, as
torch.utils.flop_counter counts them. Activations are the numbers that these put out (as in arXiv:2003.13678, where they
tell the time that a network takes better than MACs do); norms, activation functions and sums put out none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import nn, no_grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import natten.flops  # noqa: F401  teaches the counter neighborhood attention


class Layer(NamedTuple):
    """A module of a model, with all that it holds.

    Attributes:
        name: its path, as `named_modules` has it; empty for the model itself.
        kind: the name of its class.
        parameters: how many numbers it learns.
        macs, activations: of all its calls in one run.
    """

    name: str
    kind: str
    parameters: int
    macs: int
    activations: int

    @property
    def depth(self) -> int:
        return self.name.count(".") + 1 if self.name else 0


class _Activations(TorchDispatchMode):
    """Counts the numbers that come out of operators whose FLOPs are known."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            first = out[0] if isinstance(out, (tuple, list)) else out  # attention returns its logsumexp too
            self.total += first.numel()
        return out


def count(model: nn.Module, run: Callable[[], Any]) -> list[Layer]:
    """The model, and each of its modules in their order.

    A module that is never called itself, such as a list of blocks, has the sum of those that it holds.

    Args:
        model: on the meta device nothing is computed but shapes.
        run: runs the model on one picture; it may call parts of it.
    """
    modules = dict(model.named_modules())
    called: dict[str, list[int]] = {}
    # Opened first, so that it sees what the other one takes operators apart into.
    activations, macs = _Activations(), FlopCounterMode(display=False)
    with ExitStack() as stack:
        for name, module in modules.items():
            for hook in _hooks(module, called.setdefault(name, []), lambda: _totals(macs, activations)):
                stack.callback(hook.remove)
        with no_grad(), activations, macs:
            run()
        everything = _totals(macs, activations)
    layers = []
    for name, module in modules.items():
        figures = everything if not name else _figures(name, modules, called)
        layers.append(Layer(name, type(module).__name__, sum(p.numel() for p in module.parameters()), *figures))
    return layers


def _totals(macs: FlopCounterMode, activations: _Activations) -> tuple[int, int]:
    return macs.get_total_flops() // 2, activations.total


def _hooks(module: nn.Module, calls: list[tuple[int, int]], totals: Callable[[], tuple[int, int]]) -> list:
    """Lets a module note in `calls` by how much the totals grow in each of its calls."""
    started = []

    def after(*_):
        before = started.pop()
        calls.append(tuple(now - then for now, then in zip(totals(), before, strict=True)))

    return [module.register_forward_pre_hook(lambda *_: started.append(totals())), module.register_forward_hook(after)]


def _figures(name: str, modules: dict[str, nn.Module], called: dict[str, list]) -> tuple[int, int]:
    """MACs and activations of a module: of its calls, or else of its children."""
    if not called[name]:
        children = [f"{name}.{child}" for child, _ in modules[name].named_children()]
        calls = [_figures(child, modules, called) for child in children if child in modules]
    else:
        calls = called[name]
    return sum(macs for macs, _ in calls), sum(activations for _, activations in calls)
