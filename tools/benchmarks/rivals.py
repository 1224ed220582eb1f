"""The operator by other means: a gather in plain PyTorch, dense attention with a mask, flex_attention.

B batch, H heads, N tokens of the flattened map, W keys of a window, d head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.entry import LeftOut, call_of
from benchmarks.windows import axis_pairs, axis_windows, bias_index, flatten, padded_bias
from natten.geometry import Axis

MAX_GIB = 1.5  # largest tensor that an implementation may make for itself; a backward pass has several of them


class Problem(NamedTuple):
    """Tensors of one case."""

    axes: tuple[Axis, ...]
    qkv_BX3Hd: Tensor
    rpb: Tensor | None
    grad_BXHd: Tensor

    def heads_first(self) -> list[Tensor]:
        """Query, key and value [B, H, N, d], leaves with gradients: what the others are fastest with."""
        return [heads_first(x).contiguous().requires_grad_() for x in self.qkv_BX3Hd.unbind(-3)]


class Implementation(NamedTuple):
    """A provider's way to compute a problem.

    Attributes:
        forward: gives the output, in the provider's layout.
        inputs: tensors that `forward` depends on and that get gradients.
        grad_out: gradient of the output, in that layout.
        unpack: turns output and gradients into heads-first output, gradients of query, key, value and rpb.
    """

    forward: Callable[[], Tensor]
    inputs: list[Tensor]
    grad_out: Tensor
    unpack: Callable[..., list[Tensor]] = lambda *tensors: list(tensors)

    def call(self, pass_name: str) -> Callable[[], tuple[Tensor, ...]]:
        """What is timed; it returns the output, and after it the gradients if it goes backward."""
        return call_of(pass_name, self.forward, self.inputs, self.grad_out)


def heads_first(x_BXHd: Tensor) -> Tensor:
    return x_BXHd.flatten(1, -3).transpose(1, 2)


def _refuse_large(what: str, itemsize: int, *shape: int) -> None:
    size_gib = itemsize * prod(shape) / 2**30
    if size_gib > MAX_GIB:
        raise LeftOut(f"{what} would take {size_gib:.1f} GiB, more than {MAX_GIB}")


def make_gather(problem: Problem, pass_name: str) -> Implementation:
    """Copies the keys and values of each window together, then two batched products."""
    q_BHNd, k_BHNd, v_BHNd = problem.heads_first()
    device, scale = q_BHNd.device, q_BHNd.shape[-1] ** -0.5
    keys, entries = zip(*(axis_windows(axis) for axis in problem.axes), strict=True)
    key_NW = flatten(keys, [axis.length for axis in problem.axes]).to(device)
    bias_NW = bias_index(problem.axes, entries).to(device)
    _refuse_large("the gathered keys", q_BHNd.element_size(), *q_BHNd.shape, key_NW.shape[1])
    rpb = None if problem.rpb is None else problem.rpb.clone().requires_grad_()

    def forward() -> Tensor:
        bias_HNW = padded_bias(rpb, problem.axes, -inf).to(q_BHNd).flatten(1)[:, bias_NW]
        k_BHNWd, v_BHNWd = k_BHNd[:, :, key_NW], v_BHNd[:, :, key_NW]
        logits_BHN1W = (q_BHNd * scale).unsqueeze(-2) @ k_BHNWd.mT + bias_HNW.unsqueeze(-2)
        return (logits_BHN1W.softmax(-1) @ v_BHNWd).squeeze(-2)

    inputs = [x for x in (q_BHNd, k_BHNd, v_BHNd, rpb) if x is not None]
    return Implementation(forward, inputs, heads_first(problem.grad_BXHd).contiguous())


def make_sdpa(problem: Problem, pass_name: str) -> Implementation:
    """torch's scaled_dot_product_attention with a dense float mask, made beforehand; so rpb gets no gradient."""
    q_BHNd, k_BHNd, v_BHNd = inputs = problem.heads_first()
    mask_1HNN = _dense_mask(problem)[None]

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd, attn_mask=mask_1HNN)

    return Implementation(forward, inputs, heads_first(problem.grad_BXHd).contiguous())


def make_flex(problem: Problem, pass_name: str) -> Implementation:
    """torch's flex_attention, compiled for this shape, with mask and bias made beforehand; rpb gets no gradient.

    It looks both up in dense tables, which on a CPU is several times faster than to work them out from positions.
    """
    q_BHNd, k_BHNd, v_BHNd = inputs = problem.heads_first()
    if q_BHNd.device.type == "cpu":
        if pass_name != "forward":
            raise LeftOut("flex_attention has no backward pass on CPUs")
        for x in inputs:
            x.requires_grad_(False)  # or it refuses, even where no graph is made
    mask_HNN = _dense_mask(problem)
    is_seen_NN = ~mask_HNN[0].isinf()

    def is_seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return is_seen_NN[query, key]

    def add_bias(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + mask_HNN[h, query, key]

    score_mod = None if problem.rpb is None else add_bias
    block_mask = create_block_mask(is_seen, None, None, *is_seen_NN.shape, device=q_BHNd.device.type)
    torch._dynamo.config.recompile_limit = 64  # each shape is one
    flex = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def forward() -> Tensor:
        return flex(q_BHNd, k_BHNd, v_BHNd, score_mod=score_mod, block_mask=block_mask)

    return Implementation(forward, inputs, heads_first(problem.grad_BXHd).contiguous())


def _dense_mask(problem: Problem) -> Tensor:
    """The bias of each pair of tokens, -inf where the key is not in the window, [H, N, N]; one head without rpb."""
    table = padded_bias(problem.rpb, problem.axes, -inf).to(problem.qkv_BX3Hd)
    tokens = prod([axis.length for axis in problem.axes])
    _refuse_large("the mask", table.element_size(), table.shape[0], tokens, tokens)
    index_NN = bias_index(problem.axes, [axis_pairs(axis) for axis in problem.axes]).to(table.device)
    return table.flatten(1)[:, index_NN]


RIVALS: dict[str, Callable[[Problem, str], Implementation]] = {
    "flex_attention": make_flex,
    "sdpa": make_sdpa,
    "gather": make_gather,
}
