"""Functions of older NATTEN releases under their names and with their argument orders.

- natten*d*, na*d_qk_with_bias: unfused attention. Up to 0.14.4 the kernel size followed from the shape of the bias
  table or of the attention weights. The 3-D functions took separate arguments for the first axis. The number of
  arguments identifies the order.
- *Function: the autograd functions, of which code calls `apply`.
- neighborhood_attention_generic, attention: the functions of 0.20 and later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from natten import functional, ops
from natten.checks import (
    BoolOrTuple,
    IntOrTuple,
    check_full_attention,
    check_scale,
    ignore_tuning,
    is_default_scale,
    require_tensor,
)


def natten1dqk(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na1d_qk` with (query, key, kernel_size, dilation)."""
    return _qk("natten1dqk", 1, None, args, kwargs)


def natten2dqk(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na2d_qk` with (query, key, kernel_size, dilation)."""
    return _qk("natten2dqk", 2, None, args, kwargs)


def natten3dqk(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na3d_qk` with (query, key, kernel_size, dilation).

    Also accepts (query, key, kernel_size_d, kernel_size, dilation_d, dilation).
    """
    return _qk("natten3dqk", 3, None, args, kwargs)


def natten1dqkrpb(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na1d_qk` with (query, key, rpb, kernel_size, dilation) or (query, key, rpb, dilation)."""
    return _qk("natten1dqkrpb", 1, "rpb", args, kwargs)


def natten2dqkrpb(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na2d_qk` with (query, key, rpb, kernel_size, dilation) or (query, key, rpb, dilation)."""
    return _qk("natten2dqkrpb", 2, "rpb", args, kwargs)


def natten3dqkrpb(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na3d_qk` with (query, key, rpb, kernel_size, dilation) or (query, key, rpb, dilation).

    Also accepts (query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation).
    """
    return _qk("natten3dqkrpb", 3, "rpb", args, kwargs)


def na1d_qk_with_bias(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na1d_qk` with (query, key, bias, kernel_size, dilation, additional_keys); the last is optional."""
    return _qk("na1d_qk_with_bias", 1, "bias", args, kwargs)


def na2d_qk_with_bias(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na2d_qk` with (query, key, bias, kernel_size, dilation, additional_keys); the last is optional."""
    return _qk("na2d_qk_with_bias", 2, "bias", args, kwargs)


def na3d_qk_with_bias(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na3d_qk` with (query, key, bias, kernel_size, dilation, additional_keys); the last is optional.

    Also accepts (query, key, bias, kernel_size_d, kernel_size, dilation_d, dilation, additional_keys).
    """
    return _qk("na3d_qk_with_bias", 3, "bias", args, kwargs)


def natten1dav(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na1d_av` with (attn, value, kernel_size, dilation) or (attn, value, dilation)."""
    return _av("natten1dav", 1, args, kwargs)


def natten2dav(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na2d_av` with (attn, value, kernel_size, dilation) or (attn, value, dilation)."""
    return _av("natten2dav", 2, args, kwargs)


def natten3dav(*args: Any, **kwargs: Any) -> Tensor:
    """Call `na3d_av` with (attn, value, kernel_size, dilation) or (attn, value, dilation).

    Also accepts (attn, value, kernel_size_d, kernel_size, dilation_d, dilation).
    """
    return _av("natten3dav", 3, args, kwargs)


_NEW_QK = {1: functional.na1d_qk, 2: functional.na2d_qk, 3: functional.na3d_qk}
_NEW_AV = {1: functional.na1d_av, 2: functional.na2d_av, 3: functional.na3d_av}
_FUSED: dict[int, Callable[..., Any]] = {1: functional.na1d, 2: functional.na2d, 3: functional.na3d}


def _qk(name: str, rank: int, bias: str | None, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Compute logits; `bias` is the name of the function's bias argument, None if it has none."""
    tensors = ("query", "key") if bias is None else ("query", "key", bias)
    additional = "additional_keys" if bias == "bias" else None
    given = _sort_arguments(name, _orders(rank, tensors, bias is not None, additional), args, kwargs)
    rpb = None if bias is None else given.pop(bias)
    if "kernel_size" not in given:
        given["kernel_size"] = _kernel_size_of_rpb(rpb, rank)
    if additional is None:  # the names up to 0.14, which follow autocast
        given["query"], given["key"] = ops.apply_autocast(given["query"], given["key"])
    return _NEW_QK[rank](**given, rpb=rpb)


def _av(name: str, rank: int, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    given = _sort_arguments(name, _orders(rank, ("attn", "value"), True), args, kwargs)
    if "kernel_size" not in given:
        given["kernel_size"] = _kernel_size_of_attn(given["attn"], rank)
    given["attn"], given["value"] = ops.apply_autocast(given["attn"], given["value"])
    return _NEW_AV[rank](**given)


def _orders(
    rank: int, tensors: tuple[str, ...], infers_kernel_size: bool, additional: str | None = None
) -> list[tuple[str, ...]]:
    """Return the supported argument orders, each with a different length."""
    orders = [(*tensors, "kernel_size", "dilation")]
    if infers_kernel_size:
        orders.append((*tensors, "dilation"))
    if rank == 3:
        orders.append((*tensors, "kernel_size_d", "kernel_size", "dilation_d", "dilation"))
    if additional is not None:
        orders += [(*order, additional) for order in orders if "kernel_size" in order]
    return orders


def _sort_arguments(name: str, orders: Sequence[Sequence[str]], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments by name, with kernel_size_d and dilation_d merged into kernel_size and dilation.

    Raises:
        TypeError: if the arguments do not follow any of the orders.
    """
    for order in orders:
        if len(order) == len(args) + len(kwargs) and set(order[len(args) :]) == set(kwargs):
            break
    else:
        given = ", ".join(["..."] * len(args) + [f"{key}=..." for key in kwargs])
        expected = " or ".join(f"{name}({', '.join(order)})" for order in orders)
        raise TypeError(f"{name}({given}) is not supported; call {expected}.")
    arguments = dict(zip(order[: len(args)], args, strict=True)) | kwargs
    for argument in ("kernel_size", "dilation"):
        if f"{argument}_d" in arguments:
            arguments[argument] = (arguments.pop(f"{argument}_d"), arguments[argument], arguments[argument])
    return arguments


def _kernel_size_of_rpb(rpb: Any, rank: int) -> IntOrTuple:
    if not isinstance(rpb, Tensor) or rpb.dim() != rank + 1:
        found = f"has shape {tuple(rpb.shape)}" if isinstance(rpb, Tensor) else f"is {rpb!r}"
        raise ValueError(
            f"kernel_size is missing and cannot be inferred: the bias table {found} instead of "
            f"[heads{', 2K-1' * rank}]; give kernel_size before dilation."
        )
    if not all(size % 2 for size in rpb.shape[1:]):
        raise ValueError(
            f"rpb has shape {tuple(rpb.shape)}, but a window of K keys has 2K-1 relative positions, an odd number; "
            "check the bias table."
        )
    return tuple((size + 1) // 2 for size in rpb.shape[1:])


def _kernel_size_of_attn(attn: Any, rank: int) -> int:
    require_tensor("attn", attn)
    weights = attn.shape[-1]
    kernel_size = round(weights ** (1 / rank))
    if kernel_size**rank != weights:
        raise ValueError(
            f"kernel_size is missing and cannot be inferred: attn has {weights} weights per query, which is not a "
            f"window with {rank} equal sides; give kernel_size before dilation."
        )
    return kernel_size


# ---------------------------------------------------------------------------------------------------------------------
# Autograd functions
# ---------------------------------------------------------------------------------------------------------------------


def _autograd_function(name: str, apply: Callable[..., Any]) -> type:
    """Return a class whose `apply` is a function, for code that calls autograd functions of older releases."""
    return type(name, (), {"__doc__": "An autograd function of older NATTEN releases.", "apply": staticmethod(apply)})


def _unfused_function(rank: int, kind: str) -> type:
    """Return NeighborhoodAttention*D{kind}AutogradFunction, whose arguments grew from 0.15.0 to 0.17."""
    name = f"NeighborhoodAttention{rank}D{kind}AutogradFunction"
    tensors = ("query", "key", "bias") if kind == "QK" else ("attn", "value")
    extra = (*tensors, "additional_keys" if kind == "QK" else "additional_values")
    window = "kernel_size", "dilation"
    orders = [(*tensors, *window), (*extra, *window), (*extra, *window, "is_causal")]
    if rank == 3:
        orders.append((*extra, "kernel_size_d", "kernel_size", "dilation_d", "dilation"))

    def apply(*args: Any) -> Tensor:
        given = _sort_arguments(f"{name}.apply", orders, args, {})
        if kind == "AV":
            return _NEW_AV[rank](**given)
        return _NEW_QK[rank](rpb=given.pop("bias"), **given)

    return _autograd_function(name, apply)


def _fused_function(rank: int) -> type:
    """Return FusedNeighborhoodAttention*D of 0.17."""

    def apply(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        kernel_size: IntOrTuple,
        dilation: IntOrTuple | None,
        is_causal: BoolOrTuple | None,
        scale: float | None,
        tiling_config: Any = None,
        tiling_config_backward: Any = None,
    ) -> Tensor:
        window = {"kernel_size": kernel_size, "dilation": dilation, "is_causal": is_causal}
        return _FUSED[rank](query, key, value, **window, rpb=bias, scale=scale)

    return _autograd_function(f"FusedNeighborhoodAttention{rank}D", apply)


NATTEN1DQKRPBFunction = _autograd_function("NATTEN1DQKRPBFunction", natten1dqkrpb)
NATTEN2DQKRPBFunction = _autograd_function("NATTEN2DQKRPBFunction", natten2dqkrpb)
NATTEN3DQKRPBFunction = _autograd_function("NATTEN3DQKRPBFunction", natten3dqkrpb)
NATTEN1DAVFunction = _autograd_function("NATTEN1DAVFunction", natten1dav)
NATTEN2DAVFunction = _autograd_function("NATTEN2DAVFunction", natten2dav)
NATTEN3DAVFunction = _autograd_function("NATTEN3DAVFunction", natten3dav)
NeighborhoodAttention1DQKAutogradFunction = _unfused_function(1, "QK")
NeighborhoodAttention2DQKAutogradFunction = _unfused_function(2, "QK")
NeighborhoodAttention3DQKAutogradFunction = _unfused_function(3, "QK")
NeighborhoodAttention1DAVAutogradFunction = _unfused_function(1, "AV")
NeighborhoodAttention2DAVAutogradFunction = _unfused_function(2, "AV")
NeighborhoodAttention3DAVAutogradFunction = _unfused_function(3, "AV")
FusedNeighborhoodAttention1D = _fused_function(1)
FusedNeighborhoodAttention2D = _fused_function(2)
FusedNeighborhoodAttention3D = _fused_function(3)


# ---------------------------------------------------------------------------------------------------------------------
# 0.20 and later
# ---------------------------------------------------------------------------------------------------------------------


def neighborhood_attention_generic(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    stride: IntOrTuple | None = 1,
    dilation: IntOrTuple | None = 1,
    is_causal: BoolOrTuple | None = False,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    attention_kwargs: dict | None = None,
    backend: str | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `na1d`, `na2d` or `na3d` of a query with 4, 5 or 6 dimensions.

    Args:
        query, key, value: [B, *space, heads, head_dim].
        attention_kwargs: ignored, with a warning.
        kernel_size, stride, dilation, is_causal, scale, additional_keys, additional_values, backend, **options: see
            `na2d`.

    Returns:
        [B, *space, heads, head_dim]; with return_lse also the logsumexp [B, *space, heads]. See `na2d`.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    require_tensor("query", query)
    rank = query.dim() - 3
    if rank not in _FUSED:
        raise ValueError(
            f"query has shape {tuple(query.shape)}, but must have 4, 5 or 6 dimensions: batch, 1 to 3 spatial, heads "
            "and head_dim."
        )
    if attention_kwargs is not None:
        options["attention_kwargs"] = attention_kwargs
    window = kernel_size, stride, dilation, is_causal
    extra = {"additional_keys": additional_keys, "additional_values": additional_values}
    return _FUSED[rank](query, key, value, *window, scale=scale, backend=backend, **extra, **options)


_VARIABLE_LENGTH = (
    "seqlens_Q",
    "seqlens_KV",
    "cumulative_seqlen_Q",
    "cumulative_seqlen_KV",
    "max_seqlen_Q",
    "max_seqlen_KV",
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
    return_lse: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention of all queries to all keys: scaled dot-product attention, with logsumexp on request.

    Args:
        query: [B, L, heads, head_dim].
        key, value: [B, M, heads, head_dim]. They may have fewer heads, if their number divides the number of query
            heads; value may have a different head_dim.
        is_causal: whether a query attends to keys up to its own position. In NATTEN 0.20 the scale was in this place;
            a number is taken as the scale.
        scale: factor on the logits; None or 0: head_dim ** -0.5.
        backend: ignored; the names of NATTEN's kernels.
        return_lse: also return the logsumexp of the logits. Requires memory for L x M logits.
        **options: arguments that tune NATTEN's kernels, ignored with a warning. Sequences of several lengths
            (seqlens_Q, ...) are not supported.

    Returns:
        [B, L, heads, head_dim of the value]; with return_lse also the logsumexp [B, L, heads] in float32 (float64 for
        a float64 query).

    Raises:
        ValueError: naming the argument that does not fit.
    """
    given = [name for name in _VARIABLE_LENGTH if options.get(name) is not None]
    if given:
        raise ValueError(f"{given[0]} is not supported; call attention once per sequence, or pad and mask.")
    ignore_tuning("attention", [name for name in options if name not in _VARIABLE_LENGTH])
    if not isinstance(is_causal, bool) and is_causal is not None:
        scale, is_causal = is_causal, False
    query, key, value = ops.apply_autocast(query, key, value)
    check_full_attention(query, key, value)
    scale = query.shape[-1] ** -0.5 if is_default_scale(scale) else check_scale(scale)
    if return_lse:
        return ops.attend_to_all(query, key, value, scale, bool(is_causal))
    q, k, v = (x.movedim(-2, 1) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=bool(is_causal), scale=scale, enable_gqa=True)
    return out.movedim(1, -2).contiguous()
