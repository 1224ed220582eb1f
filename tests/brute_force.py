"""A brute-force implementation of the definition of neighborhood attention, for comparison with all others.

It imports nothing from natten. Plain loops over positions find the windows; torch only computes with the keys found, so
that autograd provides the gradients.

The fused function takes heads-last tensors [B, *space, H, d], the unfused functions heads-first tensors
[B, H, *space, d].
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """The window arguments of a problem, one value per axis."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]


class Slot(NamedTuple):
    """One of the K slots of a window along an axis: a key of the map, and its entry of the bias table."""

    key: int
    bias: int


def axis_window(i: int, length: int, kernel: int, stride: int, dilation: int, causal: bool) -> list[Slot | None]:
    """Return the K slots of the query at position i of an axis, None where a causal window has no key."""
    residue = i % dilation
    s = i // dilation
    n = len(range(residue, length, dilation))  # number of tokens in the residue class
    group = s // stride * stride
    if causal:
        leader = min(group + stride - 1, n - 1)
        tokens = [token if 0 <= token <= s else None for token in range(leader - kernel + 1, leader + 1)]
    else:
        leader = min(group + stride // 2, n - 1)
        first = leader - kernel // 2
        first = min(max(first, 0), n - kernel)
        tokens = list(range(first, first + kernel))
    return [None if t is None else Slot(residue + t * dilation, t - s + kernel - 1) for t in tokens]


def windows(space: Sequence[int], window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """Return the windows of all queries of a map, row-major in queries and slots.

    Returns:
        For each query and slot [N, W]: the flat position of the key, the flat entry of the bias table, and whether the
        slot has a key. Without a key, position and entry are 0.
    """
    per_axis = [
        [axis_window(i, length, *arguments) for i in range(length)]
        for length, *arguments in zip(space, *window, strict=True)
    ]
    keys, biases, held = [], [], []
    for slots_of_axes in product(*per_axis):
        for slots in product(*slots_of_axes):
            is_held = None not in slots
            keys.append(_flat([slot.key for slot in slots], space) if is_held else 0)
            biases.append(_flat([slot.bias for slot in slots], _table(window)) if is_held else 0)
            held.append(is_held)
    queries = len(list(product(*per_axis)))
    return tuple(torch.tensor(x).view(queries, -1) for x in (keys, biases, held))


def _table(window: Window) -> list[int]:
    return [2 * kernel - 1 for kernel in window.kernel_size]


def _flat(index: Sequence[int], shape: Sequence[int]) -> int:
    """Return the row-major position of an index."""
    position = 0
    for i, length in zip(index, shape, strict=True):
        position = position * length + i
    return position


def qk(query: Tensor, key: Tensor, window: Window, rpb: Tensor | None = None) -> Tensor:
    """Compute the unscaled logits [B, H, *space, W] of heads-first query and key; -inf for slots without a key."""
    space = query.shape[2:-1]
    keys, biases, held = windows(space, window)
    logits = torch.einsum("bhnd,bhnwd->bhnw", query.flatten(2, -2), key.flatten(2, -2)[:, :, keys])
    if rpb is not None:
        logits = logits + rpb.flatten(1)[:, biases]
    return logits.masked_fill(~held, float("-inf")).unflatten(2, space)


def av(weights: Tensor, value: Tensor, window: Window) -> Tensor:
    """Compute the weighted sums [B, H, *space, d] of heads-first values; slots without a key are ignored."""
    space = value.shape[2:-1]
    keys, _, held = windows(space, window)
    weights = weights.flatten(2, -2).masked_fill(~held, 0.0)
    return torch.einsum("bhnw,bhnwd->bhnd", weights, value.flatten(2, -2)[:, :, keys]).unflatten(2, space)


def attention(
    query: Tensor, key: Tensor, value: Tensor, window: Window, rpb: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute output [B, *space, H, d] and logsumexp [B, *space, H] of heads-last query, key and value."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (x.movedim(-2, 1) for x in (query, key, value))
    logits = qk(query * scale, key, window, rpb)
    out = av(logits.softmax(-1), value, window)
    return out.movedim(1, -2), logits.logsumexp(-1).movedim(1, -1)


# ---------------------------------------------------------------------------------------------------------------------
# All arguments, query by query
# ---------------------------------------------------------------------------------------------------------------------


def padded_axis_window(
    i: int, length: int, kernel: int, stride: int, dilation: int, causal: bool, window_padding: str
) -> list[Slot] | None:
    """Return the slots of the query at position i; keys outside the map are -1.

    With "shift", slots without a key are omitted. With "valid", return None if the window does not fit into the map.
    """
    if window_padding == "shift":
        return [slot for slot in axis_window(i, length, kernel, stride, dilation, causal) if slot is not None]
    steps = range(-kernel + 1, 1) if causal else range(-(kernel // 2), kernel - kernel // 2)
    slots = []
    for step in steps:
        key = i + step * dilation
        slots.append(Slot(key if 0 <= key < length else -1, step + kernel - 1))
    if window_padding == "valid" and any(slot.key == -1 for slot in slots):
        return None
    return slots


def attention_by_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    rpb: Tensor | None = None,
    additional: tuple[Tensor, Tensor] | None = None,
    window_padding: str = "shift",
) -> tuple[Tensor, Tensor]:
    """Compute heads-last output and logsumexp of all queries with a window, in a loop over queries and heads.

    Key and value may have fewer heads than the query, and value another head_dim. `additional` are keys and values
    [B, N, heads, d].
    """
    space, heads, scale = query.shape[1:-2], query.shape[-2], query.shape[-1] ** -0.5
    group = heads // key.shape[-2]
    outs, lses, kept = [], [], [set() for _ in space]
    for position in product(*map(range, space)):
        axes = [
            padded_axis_window(i, length, *arguments, window_padding)
            for i, length, *arguments in zip(position, space, *window, strict=True)
        ]
        if None in axes:
            continue
        for axis, i in enumerate(position):
            kept[axis].add(i)
        for head in range(heads):
            logits, values = [], []
            q = query[(slice(None), *position, head)]
            for slots in product(*axes):
                place = (slice(None), *(slot.key for slot in slots), head // group)
                is_outside = any(slot.key == -1 for slot in slots)
                k, v = (torch.zeros_like(x[place]) if is_outside else x[place] for x in (key, value))
                bias = 0.0 if rpb is None else rpb[(head, *(slot.bias for slot in slots))]
                logits.append((q * k).sum(-1) * scale + bias)
                values.append(v)
            for token in range(0 if additional is None else additional[0].shape[1]):
                k, v = (x[:, token, head // group] for x in additional)
                logits.append((q * k).sum(-1) * scale)
                values.append(v)
            logits = torch.stack(logits, -1)
            outs.append((logits.softmax(-1).unsqueeze(-1) * torch.stack(values, -2)).sum(-2))
            lses.append(logits.logsumexp(-1))
    shape = (*map(len, kept), heads)
    out, lse = torch.stack(outs, 1), torch.stack(lses, 1)
    return out.unflatten(1, shape), lse.unflatten(1, shape)
