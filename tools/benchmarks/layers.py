"""Attention as a layer, with its projections: ours against Swin's windows of equal size and width.

A case is a shape as in ops.py with two axes; the layer has heads * head_dim channels. All are credited with the same
work, that of the operator and the projections.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn

from benchmarks import ops
from benchmarks.entry import Entry, LeftOut, Setting, Subject, call_of, check_providers
from natten import NeighborhoodAttention2D

GROUPS = ("b8_7x7_h16_d32_k7", "b8_14x14_h8_d32_k7", "b8_28x28_h4_d32_k7", "b8_56x56_h2_d32_k7")

Layer = tuple[nn.Module, Callable[[Tensor], Tensor]]  # the module, and what to call, which is a part of it


def make_natten(case: ops.Case, backend: str) -> Layer:
    """Our layer."""
    dim, window = case.heads * case.head_dim, (case.kernel_size, case.dilation)
    options = {"is_causal": case.is_causal, "rel_pos_bias": case.has_rpb, "backend": backend}
    layer = NeighborhoodAttention2D(dim, case.heads, *window, **options)
    return layer, layer


def make_swin(case: ops.Case, is_shifted: bool) -> Layer:
    """timm's WindowAttention with what makes windows of a map and a map of windows, as its block does it."""
    if not isinstance(case.kernel_size, int) or case.dilation != 1 or case.is_causal or not case.has_rpb:
        raise LeftOut("it has square windows, not dilated nor causal, with a relative position bias")
    if is_shifted and min(case.space) <= case.kernel_size:
        raise LeftOut("a map of one window is not shifted")
    dim, shift = case.heads * case.head_dim, case.kernel_size // 2 if is_shifted else 0
    block = SwinTransformerBlock(dim, case.space, case.heads, window_size=case.kernel_size, shift_size=shift)
    block.norm1 = block.norm2 = block.mlp = nn.Identity()  # the rest of the block
    return block, block._attn


PROVIDERS: dict[str, Callable[[ops.Case], Layer]] = {
    "natten-cpu": partial(make_natten, backend="cpu"),
    "natten-reference": partial(make_natten, backend="reference"),
    "timm-window": partial(make_swin, is_shifted=False),
    "timm-shifted-window": partial(make_swin, is_shifted=True),
}


def plan(group: str, providers: list[str] | None, setting: Setting) -> list[Entry]:
    """The entries of a case; all providers unless given.

    Raises:
        ValueError: on an unknown case or provider.
    """
    check_providers(providers or (), PROVIDERS)
    if len(ops.parse(group).space) != 2:
        raise ValueError(f"case {group!r} must have two axes: the layers that are compared take maps.")
    return [
        Entry("layers", group, group, provider, pass_name, setting)
        for pass_name in ("forward", "forward+backward")
        for provider in providers or PROVIDERS
    ]


def make(entry: Entry) -> Subject:
    """The code behind an entry.

    Raises:
        LeftOut, ValueError, RuntimeError: if the provider cannot take it.
    """
    case = ops.parse(entry.case)
    dim, tokens = case.heads * case.head_dim, case.batch * prod(case.space)
    torch.manual_seed(0)
    module, layer = PROVIDERS[entry.provider](case)
    parameters = list(module.to(entry.device, entry.dtype).parameters())
    x_BHWC = torch.randn(case.batch, *case.space, dim).to(entry.device, entry.dtype).requires_grad_()
    grad_BHWC = torch.randn(x_BHWC.shape).to(x_BHWC)
    is_forward = entry.pass_name == "forward"
    call = call_of(entry.pass_name, lambda: layer(x_BHWC), [x_BHWC, *parameters], grad_BHWC)
    attention_gflop, _ = case.work(entry.pass_name, entry.dtype.itemsize)
    projections_gflop = 2e-9 * tokens * 4 * dim**2 * (1 if is_forward else 3)
    gbytes = 1e-9 * tokens * dim * entry.dtype.itemsize * (2 if is_forward else 5)
    return Subject(call, attention_gflop + projections_gflop, gbytes, needs_grad=not is_forward)
