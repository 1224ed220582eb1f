"""What is found out about a problem once is kept: checking takes longer than computing a small problem."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

MOST = 4096  # results a function keeps


def remember(function: Callable) -> Callable:
    """Makes a function of tensors and plain values remember its results by the layouts of the tensors and the values.

    It may look at dtype, device, shape and strides of its tensors, not at what they hold; it never returns None.
    Errors are not remembered, nor what has no hash (symbolic sizes), nor anything while torch.compile traces.
    """
    known = {}

    @wraps(function)
    def remembering(*arguments):
        if torch.compiler.is_compiling():
            return function(*arguments)
        try:
            key = tuple(map(_key, arguments))
            found = known.get(key)
        except TypeError:
            return function(*arguments)
        if found is None:
            found = function(*arguments)
            if len(known) >= MOST:
                known.clear()
            known[key] = found
        return found

    return remembering


def _key(value):
    """Types are part of it: True is equal to 1."""
    kind = type(value)
    if kind in _PLAIN:
        return value, kind
    if isinstance(value, (tuple, list)):
        return tuple(value), tuple(map(type, value))
    if isinstance(value, Tensor):
        return value.dtype, value.device, value.shape, value.stride()
    return value, kind


_PLAIN = {int, float, bool, str, type(None)}  # asking whether they are tensors takes torch long
