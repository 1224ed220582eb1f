"""What no backend computes by itself, composed of what all of them compute; every part can be differentiated.

- Fewer heads of key and value (grouped-query and multi-query attention): query head h reads key/value head
  h div (heads / key/value heads), so these are repeated.
- Another head_dim of value: the smaller of the two is filled up with zeros, which add nothing to logits or output.
- Windows that do not move at borders: zeros are put around the map, and the queries between them are cut out.
- Additional keys and values, which every query attends to beside its window: attention to them alone, merged with that
  to the window by the logsumexp of both.

Shape suffixes: B batch, X the spatial axes, H heads, d head dim; N additional tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from natten import backends
from natten.backends import reference
from natten.backends.reference import accumulation_dtype, no_autocast
from natten.geometry import (
    Axis,
    Margin,
    check_additional,
    check_attention,
    check_rpb,
    check_window,
    check_window_padding,
    make_axes,
    make_margins,
)
from natten.memo import remember
from natten.operators import fused_attention
from natten.precision import apply_autocast

__all__ = ["merge_attentions"]


def attend(
    qkv: Sequence[Tensor], axes: Sequence[Axis], rpb: Tensor | None, scale: float | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of a problem that the backends take as it is: checked tensors, heads last.

    Args:
        qkv: (query, key, value), or one packed tensor.
    """
    scale = qkv[0].shape[-1] ** -0.5 if scale is None else float(scale)
    backend = backends.requested(backend)
    if backends.is_plain(backend):
        query, key, value = qkv if len(qkv) == 3 else qkv[0].unbind(-3)
        return reference.attention(query, key, value, rpb, axes, scale)
    return fused_attention(qkv, rpb, axes, scale, backend)


def attend_composed(
    rank: int,
    qkv: Sequence[Tensor],
    window: tuple,
    rpb: Tensor | None,
    scale: float | None,
    backend: str | None,
    additional: tuple[Tensor | None, Tensor | None],
    window_padding: str,
) -> tuple[Tensor, Tensor]:
    """Output [B, X, H, value's head_dim] and logsumexp [B, X, H] of any problem.

    Args:
        qkv: (query, key, value), heads last, not checked.
        window: kernel_size, stride, dilation and is_causal, not checked.
        additional: keys and values [B, N, H, d], or None and None.

    Raises:
        ValueError: naming the argument, and the axis, that does not fit.
    """
    query, key, value, *additional = apply_autocast(*qkv, *additional)
    axes, margins = _check(rank, query, key, value, rpb, *window, *additional, window_padding)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    value_dim = value.shape[-1]

    key, value, *additional = (x if x is None else _repeat_heads(x, query.shape[-2]) for x in (key, value, *additional))
    query, key, value = (_surround(x, margins) for x in (query, key, value))
    out, lse = attend(_with_equal_dims(query, key, value), axes, rpb, scale, backend)
    out = out[..., :value_dim]
    query, out, lse = (_cut_out(x, margins) for x in (query, out, lse))
    if additional[0] is not None and additional[0].shape[1] > 0:
        out, lse = merge_attentions(*zip((out, lse), _attend_to_all(query, *additional, scale), strict=True))
    return out.contiguous(), lse.contiguous()


@remember
def _check(
    rank, query, key, value, rpb, kernel_size, stride, dilation, is_causal, *additional_and_padding
) -> tuple[tuple[Axis, ...], tuple[Margin, ...]]:
    """The axes of the map as the backends get it, and its margins, none where windows move."""
    *additional, window_padding = additional_and_padding
    check_window_padding(window_padding)
    check_attention(rank, query, key, value)
    check_additional(*additional, key, value)
    space, margins = query.shape[1:-2], ()
    if window_padding != "shift":
        margins = make_margins(space, check_window(rank, kernel_size, stride, dilation, is_causal), window_padding)
        space = [margin.before + length + margin.behind for margin, length in zip(margins, space, strict=True)]
    axes = make_axes(space, kernel_size, stride, dilation, is_causal)
    check_rpb(rpb, axes, query.shape[-2], query.dtype, query.device)
    return axes, margins


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """[..., fewer heads, d] -> [..., heads, d], each head as often as it is read."""
    times = 1 if x.shape[-2] == heads else heads // x.shape[-2]
    return x if times == 1 else x.unsqueeze(-2).expand(*x.shape[:-1], times, x.shape[-1]).flatten(-3, -2)


def _with_equal_dims(*tensors: Tensor) -> list[Tensor]:
    dim = max(x.shape[-1] for x in tensors)
    return [x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1])) for x in tensors]


def _surround(x_BXHd: Tensor, margins: Sequence[Margin]) -> Tensor:
    """The map with its margins of zeros."""
    if not any(margin.before or margin.behind for margin in margins):
        return x_BXHd
    # F.pad wants the last axis first, and both ends of each.
    ends = (end for margin in reversed(margins) for end in (margin.before, margin.behind))
    return F.pad(x_BXHd, (0, 0, 0, 0, *ends))


def _cut_out(x: Tensor, margins: Sequence[Margin]) -> Tensor:
    """The wanted queries of a map that has its margins, [B, X, H] or [B, X, H, d]."""
    for dim, margin in enumerate(margins, start=1):
        x = x.narrow(dim, margin.first, margin.count)
    return x


# ---------------------------------------------------------------------------------------------------------------------
# Several attentions of the same queries
# ---------------------------------------------------------------------------------------------------------------------


def merge_attentions(
    outputs: Sequence[Tensor],
    lse_tensors: Sequence[Tensor],
    torch_compile: bool = True,
    use_autograd_fix: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of the same queries to several sets of keys, as if these had been one set.

    Each output counts by the softmax of its logsumexp. Gradients are those of attention to the one set, since outputs
    and logsumexps of natten, which this function takes with their gradients, can both be differentiated.

    Args:
        outputs: two or more outputs [..., heads, head_dim] of one shape and dtype, heads last.
        lse_tensors: the logsumexp of each, [..., heads]; -inf where there is no key, but not in all of them.
        torch_compile, use_autograd_fix: taken as NATTEN 0.20 and later have them, and without effect.

    Returns:
        The merged output, in the outputs' dtype, and the merged logsumexp in float32 (float64 for float64).

    Raises:
        ValueError: naming the tensor that does not fit.
    """
    _check_merged(outputs, lse_tensors)
    dtype = accumulation_dtype(outputs[0].dtype)
    with no_autocast(outputs[0]):
        lses = torch.stack([lse.to(dtype) for lse in lse_tensors])
        weights = lses.softmax(0).unsqueeze(-1)
        out = sum(weight * output for weight, output in zip(weights, outputs, strict=True))
        return out.to(outputs[0].dtype), lses.logsumexp(0)


def _check_merged(outputs: Sequence[Tensor], lse_tensors: Sequence[Tensor]) -> None:
    if len(outputs) < 2 or len(outputs) != len(lse_tensors):
        raise ValueError(
            f"merge_attentions has {len(outputs)} outputs and {len(lse_tensors)} lse_tensors, but needs two or more "
            "of each, as many of one as of the other."
        )
    first = outputs[0]
    for index, (output, lse) in enumerate(zip(outputs, lse_tensors, strict=True)):
        if (output.shape, output.dtype, output.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"outputs[{index}] is {output.dtype} of shape {tuple(output.shape)} on {output.device}, but outputs[0] "
                f"is {first.dtype} of shape {tuple(first.shape)} on {first.device}: they must agree."
            )
        if lse.shape != output.shape[:-1] or lse.device != output.device:
            raise ValueError(
                f"lse_tensors[{index}] has shape {tuple(lse.shape)} on {lse.device}, but its output needs "
                f"{tuple(output.shape[:-1])} on {output.device}."
            )


def _attend_to_all(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Output and logsumexp of queries [B, X, H, d] that each attend to all keys [B, N, H, d], as `attend` has them."""
    with no_autocast(query):
        dtype = accumulation_dtype(query.dtype)
        q_BHXd = query.flatten(1, -3).movedim(-2, 1).to(dtype) * scale
        k_BHNd, v_BHNd = (x.movedim(-2, 1).to(dtype) for x in (key, value))
        logits_BHXN = q_BHXd @ k_BHNd.mT
        out_BXHd = (logits_BHXN.softmax(-1) @ v_BHNd).movedim(1, -2)
        lse_BXH = logits_BHXN.logsumexp(-1).movedim(1, -1)
        space = query.shape[:-1]
        return out_BXHd.reshape(*space, value.shape[-1]).to(query.dtype), lse_BXH.reshape(space)
