"""Other implementations of the operator: gathered windows, masked dense attention, and flex_attention.

B: batch, H: heads, X: spatial axes, N: tokens of the flattened map, d: head_dim. Of one axis, L: length,
K: kernel_size; W: keys of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.entry import LeftOut, call_of
from natten.geometry import Axis, axis_tiles

MAX_GIB = 1.5  # largest temporary tensor of an implementation; a backward pass has several of them


class Problem(NamedTuple):
    """The tensors of a case.

    Attributes:
        axes: the axes of the map.
        query, key, value: [B, X, H, d].
        rpb: relative position bias, or None.
        grad: gradient of the output [B, X, H, d], for "qk" [B, X, H, W].
        attn: attention weights [B, X, H, W] for "av", else None.
        part: "" for attention, or the unfused part "qk" or "av".
    """

    axes: tuple[Axis, ...]
    query: Tensor
    key: Tensor
    value: Tensor
    rpb: Tensor | None
    grad: Tensor
    attn: Tensor | None
    part: str

    @property
    def is_uniform(self) -> bool:
        """Whether query, key and value have the same shape."""
        return self.query.shape == self.key.shape == self.value.shape

    def heads_first(self) -> list[Tensor]:
        """Return query, key and value [B, H, N, d], contiguous and requiring gradients, as the rivals prefer.

        Raises:
            LeftOut: if the problem is not attention to keys and values of the query's shape.
        """
        if self.part or not self.is_uniform:
            raise LeftOut("supports fused attention with query, key and value of one shape only")
        return [heads_first(x).contiguous().requires_grad_() for x in (self.query, self.key, self.value)]


class Implementation(NamedTuple):
    """How a provider computes a problem.

    Attributes:
        forward: returns the output, in the provider's layout.
        inputs: the inputs of `forward` that get gradients.
        grad_out: gradient of the output, in the provider's layout.
        unpack: turns output and gradients into the heads-first output and the gradients of query, key, value and rpb.
    """

    forward: Callable[[], Tensor]
    inputs: list[Tensor]
    grad_out: Tensor
    unpack: Callable[..., list[Tensor]] = lambda *tensors: list(tensors)

    def call(self, pass_name: str) -> Callable[[], tuple[Tensor, ...]]:
        """Return the call to time: its results are the output and, in a backward pass, the gradients of `inputs`."""
        return call_of(pass_name, self.forward, self.inputs, self.grad_out)


def heads_first(x_BXHd: Tensor) -> Tensor:
    return x_BXHd.flatten(1, -3).transpose(1, 2)


def _refuse_large(what: str, itemsize: int, *shape: int) -> None:
    size_gib = itemsize * prod(shape) / 2**30
    if size_gib > MAX_GIB:
        raise LeftOut(f"{what} would take {size_gib:.1f} GiB; the limit is {MAX_GIB}")


# ---------------------------------------------------------------------------------------------------------------------
# Windows as index tables
# ---------------------------------------------------------------------------------------------------------------------


def _axis_windows(axis: Axis) -> tuple[Tensor, Tensor]:
    """Return the keys of each position on an axis and their bias indices, both [L, K].

    The index is 2K - 1, past the end of the table, where a causal window leaves the map.
    """
    tiles = axis_tiles(axis, 1)
    return tiles.key_TK[tiles.place_L], tiles.bias_TQK[tiles.place_L, 0]


def _axis_pairs(axis: Axis) -> Tensor:
    """Return the bias index of each pair of positions [L, L], 2K - 1 where the key is outside the window."""
    key_LK, bias_LK = _axis_windows(axis)
    outside = torch.full((axis.length, axis.length), 2 * axis.kernel_size - 1)
    return outside.scatter_reduce(1, key_LK, bias_LK, "amin")  # a slot outside the map may repeat a real key


def _flatten(tables: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Turn indices along each axis [L, K] into indices of the flattened axes of these sizes [N, W]."""
    flat = tables[0]
    for table, size in zip(tables[1:], sizes[1:], strict=True):
        flat = (flat[:, None, :, None] * size + table[None, :, None, :]).flatten(2).flatten(0, 1)
    return flat


def _bias_index(axes: Sequence[Axis], tables: Sequence[Tensor]) -> Tensor:
    """Turn bias indices along each axis into indices of a flattened `_padded_bias` [N, W]."""
    return _flatten(tables, [2 * axis.kernel_size for axis in axes])


def _padded_bias(rpb: Tensor | None, axes: Sequence[Axis]) -> Tensor:
    """Return the bias table with an entry of -inf for "outside" on each axis, [heads, 2K..]; one head without rpb."""
    table = torch.zeros(1, *(2 * axis.kernel_size - 1 for axis in axes)) if rpb is None else rpb
    return F.pad(table, (0, 1) * len(axes), value=-inf)


def _dense_mask(problem: Problem) -> Tensor:
    """Return the bias of each pair of tokens, -inf outside the window, [H, N, N]; one head without rpb."""
    table = _padded_bias(problem.rpb, problem.axes).to(problem.query)
    tokens = prod([axis.length for axis in problem.axes])
    _refuse_large("the mask", table.element_size(), table.shape[0], tokens, tokens)
    index_NN = _bias_index(problem.axes, [_axis_pairs(axis) for axis in problem.axes]).to(table.device)
    return table.flatten(1)[:, index_NN]


# ---------------------------------------------------------------------------------------------------------------------
# Implementations
# ---------------------------------------------------------------------------------------------------------------------


def _make_gather(problem: Problem, pass_name: str) -> Implementation:
    """Gather the keys and values of each window, then two batched products."""
    q_BHNd, k_BHNd, v_BHNd = problem.heads_first()
    device, scale = q_BHNd.device, q_BHNd.shape[-1] ** -0.5
    keys, entries = zip(*(_axis_windows(axis) for axis in problem.axes), strict=True)
    key_NW = _flatten(keys, [axis.length for axis in problem.axes]).to(device)
    bias_NW = _bias_index(problem.axes, entries).to(device)
    _refuse_large("the gathered keys", q_BHNd.element_size(), *q_BHNd.shape, key_NW.shape[1])
    rpb = None if problem.rpb is None else problem.rpb.clone().requires_grad_()

    def forward() -> Tensor:
        bias_HNW = _padded_bias(rpb, problem.axes).to(q_BHNd).flatten(1)[:, bias_NW]
        k_BHNWd, v_BHNWd = k_BHNd[:, :, key_NW], v_BHNd[:, :, key_NW]
        logits_BHN1W = (q_BHNd * scale).unsqueeze(-2) @ k_BHNWd.mT + bias_HNW.unsqueeze(-2)
        return (logits_BHN1W.softmax(-1) @ v_BHNWd).squeeze(-2)

    inputs = [x for x in (q_BHNd, k_BHNd, v_BHNd, rpb) if x is not None]
    return Implementation(forward, inputs, heads_first(problem.grad).contiguous())


def _make_sdpa(problem: Problem, pass_name: str) -> Implementation:
    """torch's scaled_dot_product_attention with a dense float mask made in advance; rpb gets no gradient."""
    q_BHNd, k_BHNd, v_BHNd = inputs = problem.heads_first()
    mask_1HNN = _dense_mask(problem)[None]

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd, attn_mask=mask_1HNN)

    return Implementation(forward, inputs, heads_first(problem.grad).contiguous())


def _make_flex(problem: Problem, pass_name: str) -> Implementation:
    """torch's flex_attention, compiled for this shape, with mask and bias made in advance; rpb gets no gradient.

    Mask and bias are read from dense tables, which on a CPU is several times faster than computing them from positions.
    """
    q_BHNd, k_BHNd, v_BHNd = inputs = problem.heads_first()
    if q_BHNd.device.type == "cpu":
        if pass_name != "forward":
            raise LeftOut("flex_attention has no backward pass on CPUs")
        for x in inputs:
            x.requires_grad_(False)  # it refuses inputs that require gradients, even under no_grad
    mask_HNN = _dense_mask(problem)
    is_seen_NN = ~mask_HNN[0].isinf()

    def is_seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return is_seen_NN[query, key]

    def add_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + mask_HNN[h, query, key]

    score_mod = None if problem.rpb is None else add_bias
    block_mask = create_block_mask(is_seen, None, None, *is_seen_NN.shape, device=q_BHNd.device.type)
    torch._dynamo.config.recompile_limit = 64  # every shape is compiled
    flex = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def forward() -> Tensor:
        return flex(q_BHNd, k_BHNd, v_BHNd, score_mod=score_mod, block_mask=block_mask)

    return Implementation(forward, inputs, heads_first(problem.grad).contiguous())


RIVALS: dict[str, Callable[[Problem, str], Implementation]] = {
    "flex_attention": _make_flex,
    "sdpa": _make_sdpa,
    "gather": _make_gather,
}
