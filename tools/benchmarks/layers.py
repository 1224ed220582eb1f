"""The attention layer with its projections: natten, and Swin's windows of the same size and width.

A case is a shape with two axes, as for `ops`; the layer has heads * head_dim channels. The minimal work is the same for
all providers: that of neighborhood attention and of the projections.
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
from natten.profiler import Work, input_sets

GROUPS = ("b8_7x7_h16_d32_k7", "b8_14x14_h8_d32_k7", "b8_28x28_h4_d32_k7", "b8_56x56_h2_d32_k7")

Layer = tuple[nn.Module, Callable[[Tensor], Tensor]]  # the module, and the part of it that is called


def _make_natten(case: ops.Case, backend: str) -> Layer:
    dim, window = case.heads * case.head_dim, (case.kernel_size, case.dilation)
    options = {"is_causal": case.is_causal, "rel_pos_bias": case.has_rpb, "backend": backend}
    layer = NeighborhoodAttention2D(dim, case.heads, *window, **options)
    return layer, layer


def _make_swin(case: ops.Case, is_shifted: bool) -> Layer:
    """timm's WindowAttention, with the partition of the map into windows as timm's block does it."""
    if not isinstance(case.kernel_size, int) or case.dilation != 1 or case.is_causal or not case.has_rpb:
        raise LeftOut("supports square windows with a bias only, without dilation or causal masks")
    if is_shifted and min(case.space) <= case.kernel_size:
        raise LeftOut("a map of a single window is not shifted")
    dim, shift = case.heads * case.head_dim, case.kernel_size // 2 if is_shifted else 0
    block = SwinTransformerBlock(dim, case.space, case.heads, window_size=case.kernel_size, shift_size=shift)
    block.norm1 = block.norm2 = block.mlp = nn.Identity()  # not part of the layer
    return block, block._attn


PROVIDERS: dict[str, Callable[[ops.Case], Layer]] = {
    "natten-cpu": partial(_make_natten, backend="cpu"),
    "natten-cuda": partial(_make_natten, backend="cuda"),
    "natten-reference": partial(_make_natten, backend="reference"),
    "timm-window": partial(_make_swin, is_shifted=False),
    "timm-shifted-window": partial(_make_swin, is_shifted=True),
}


def plan(group: str, providers: list[str] | None, setting: Setting) -> list[Entry]:
    """Return the entries of a case, for all providers of the device by default.

    Raises:
        ValueError: if the case or a provider is unknown.
    """
    check_providers(providers or (), PROVIDERS)
    if len(ops.parse_plain(group).space) != 2:
        raise ValueError(f"case {group!r} must have two axes, as the compared layers do.")
    default = [f"natten-{setting.backend}", "natten-reference", "timm-window", "timm-shifted-window"]
    return [
        Entry("layers", group, group, provider, pass_name, setting)
        for pass_name in ("forward", "forward+backward")
        for provider in providers or default
    ]


def make(entry: Entry) -> Subject:
    """Return the code of an entry.

    Raises:
        LeftOut, ValueError, RuntimeError: if the provider does not support the case.
    """
    case, dtype = ops.parse_plain(entry.case), entry.dtype
    dim, tokens = case.heads * case.head_dim, case.batch * prod(case.space)
    torch.manual_seed(0)
    module, layer = PROVIDERS[entry.provider](case)
    parameters = list(module.to(entry.device, dtype).parameters())
    is_forward = entry.pass_name == "forward"
    projections_gflop = 2e-9 * tokens * 4 * dim**2 * (1 if is_forward else 3)
    gbytes = 1e-9 * tokens * dim * dtype.itemsize * (2 if is_forward else 5)
    work = Work(case.work(entry.pass_name, dtype).gflop + projections_gflop, gbytes)

    def make_call() -> Callable[[], object]:
        x_BHWC = torch.randn(case.batch, *case.space, dim).to(entry.device, dtype).requires_grad_()
        grad_BHWC = torch.randn(x_BHWC.shape).to(x_BHWC)
        return call_of(entry.pass_name, lambda: layer(x_BHWC), [x_BHWC, *parameters], grad_BHWC)

    call, *others = (make_call() for _ in range(input_sets(gbytes, entry.device)))
    return Subject(call, work, needs_grad=not is_forward, others=tuple(others))
