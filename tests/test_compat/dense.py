"""Dense attention between all tokens, with a mask: what neighborhood attention must equal."""

from __future__ import annotations

from collections.abc import Sequence

import brute_force
import torch
from torch import Tensor


def per_axis(value, rank: int) -> tuple:
    return tuple(value) if isinstance(value, Sequence) else (value,) * rank


def keys(space: Sequence[int], kernel_size) -> Tensor:
    """Return the keys of each query [N, W], without stride and dilation."""
    rank = len(space)
    window = brute_force.Window(per_axis(kernel_size, rank), (1,) * rank, (1,) * rank, (False,) * rank)
    return brute_force.windows(space, window)[0]


def bias(space: Sequence[int], kernel_size, stride=1, dilation=1, is_causal=False, rpb: Tensor | None = None) -> Tensor:
    """Return the bias of each query and key [H or 1, N, N]: -inf outside of the window, and the position bias in it."""
    window = brute_force.Window(*(per_axis(x, len(space)) for x in (kernel_size, stride, dilation, is_causal)))
    keys, entries, held = brute_force.windows(space, window)
    tokens = keys.shape[0]
    table = torch.zeros(1, 1, dtype=torch.float64) if rpb is None else rpb.flatten(1)
    values = table[:, torch.zeros_like(entries) if rpb is None else entries]
    values = values.masked_fill(~held, float("-inf"))
    dense = torch.full((table.shape[0], tokens, tokens), float("-inf"), dtype=table.dtype)
    # A slot without a key points to token 0, and must not overwrite what another slot wrote there.
    queries = torch.arange(tokens)[:, None].expand_as(keys)[held]
    return dense.index_put((torch.arange(table.shape[0])[:, None], queries, keys[held]), values[:, held])


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Compute attention of heads-last tensors [B, X, H, d], with a mask that broadcasts to [B, H, N, N]."""
    space = query.shape[1:-2]
    q, k, v = (x.flatten(1, -3).movedim(1, 2) for x in (query, key, value))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out = (scale * q @ k.mT + mask).softmax(-1) @ v
    return out.movedim(1, 2).unflatten(1, space)
