"""Neighborhood attention as layers: qkv projection, attention with relative position bias, output projection.

Shape suffixes: B batch, X the spatial axes, C channels, H heads, d head_dim, W keys per window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from natten import functional
from natten.checks import (
    BoolOrTuple,
    IntOrTuple,
    check_heads,
    check_layer_input,
    check_layer_options,
    check_window,
    is_default_scale,
    merge_first_axis,
)
from natten.geometry import padding
from natten.tracing import is_unknown, record_call, refuse_script, resize

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class NeighborhoodAttentionNd(nn.Module):
    """Base class of the layers. Subclasses set the rank and the functions that compute attention."""

    rank: int
    _attention: Callable[..., Any]
    _query_key: Callable[..., Tensor]
    _weight_value: Callable[..., Tensor]

    rpb: nn.Parameter | None

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: IntOrTuple | None = None,
        dilation: IntOrTuple | None = None,
        *,
        stride: IntOrTuple | None = 1,
        is_causal: BoolOrTuple | None = False,
        rel_pos_bias: bool | None = None,
        bias: bool | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_padding: str = "shift",
        embed_dim: int | None = None,
        kernel_size_d: int | None = None,
        dilation_d: int | None = None,
        use_experimental_ops: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        has_rpb = _has_rpb(rel_pos_bias, bias, default=embed_dim is None)
        if dim is not None and embed_dim is not None:
            raise ValueError("embed_dim is another name of dim; give only one of them.")
        dim = embed_dim if dim is None else dim
        if dim is None or num_heads is None or kernel_size is None:
            raise ValueError("dim (or embed_dim), num_heads and kernel_size are required.")
        check_heads(
            dim, num_heads, "(dim, num_heads, kernel_size); in NATTEN up to 0.14.4: (dim, kernel_size, num_heads)"
        )
        kernel_size = self._merge_first_axis("kernel_size", kernel_size, kernel_size_d)
        dilation = self._merge_first_axis("dilation", dilation, dilation_d)
        window = check_window(self.rank, kernel_size, stride, dilation, is_causal)
        self.kernel_size, self.stride, self.dilation, self.is_causal = window
        check_layer_options(self.stride, attn_drop, window_padding)
        self.window_padding = window_padding
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale: Any = self.head_dim**-0.5 if is_default_scale(qk_scale) else qk_scale
        self.backend = backend

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        if has_rpb:
            table = torch.empty(num_heads, *(2 * k - 1 for k in self.kernel_size), device=device, dtype=dtype)
            self.rpb = nn.Parameter(table)
        else:
            self.register_parameter("rpb", None)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def _merge_first_axis(self, name: str, value: Any, first: int | None) -> Any:
        if first is not None and self.rank != 3:
            raise ValueError(f"{name}_d = {first!r} is for layers over three axes; use {name}.")
        return merge_first_axis(name, 1 if value is None else value, first)

    def reset_parameters(self) -> None:
        """Initialize the bias table; the projections keep the default initialization of nn.Linear."""
        if self.rpb is not None:
            nn.init.normal_(self.rpb, std=0.02)

    def forward(self, x_BXC: Tensor, return_weights: bool = False) -> Any:
        """Apply the layer.

        Args:
            x_BXC: channels-last input [B, *space, dim].
            return_weights: also return the attention weights from which the output is computed, as
                `attention_weights` does. They take memory for tokens x window weights.

        Returns:
            [B, *space, dim]; with window_padding="valid", each spatial axis is shorter. With return_weights, a pair of
            this and the weights.

        Raises:
            ValueError: if the input has another number of dimensions or channels, or as in `attention_weights`.
        """
        if isinstance(x_BXC, fx.Proxy):
            return record_call(self, x_BXC)
        qkv_BX3Hd = self._project(x_BXC)
        weights_BHXW = None
        if return_weights or (self.training and self.attn_drop.p > 0):
            weights_BHXW = self._weights(qkv_BX3Hd)
            out_BXHd = self._apply_weights(self.attn_drop(weights_BHXW), qkv_BX3Hd)
        else:
            out_BXHd = self._attend(qkv_BX3Hd)
        if self.window_padding == "shift":
            out_BXHd = self._crop(out_BXHd, x_BXC.shape[1:-1])
        x_BXC = self.proj_drop(self.proj(out_BXHd.flatten(-2)))
        return (x_BXC, weights_BHXW) if return_weights else x_BXC

    def attention_weights(self, x_BXC: Tensor) -> Tensor:
        """Compute the attention weights that `forward` uses, before dropout.

        Args:
            x_BXC: channels-last input [B, *space, dim].

        Returns:
            [B, num_heads, X, W]. X is the padded map. W is the product of kernel_size, with keys in row-major order.

        Raises:
            ValueError: if the layer has a stride above 1 or a window_padding other than "shift", or the input does not
                fit.
        """
        return self._weights(self._project(x_BXC))

    def _attend(self, qkv_BX3Hd: Tensor) -> Tensor:
        window = self.kernel_size, self.stride, self.dilation, self.is_causal
        return self._attention(
            qkv_BX3Hd,
            *window,
            scale=self.scale,
            rpb=self.rpb,
            backend=self.backend,
            window_padding=self.window_padding,
        )

    def _apply_weights(self, weights_BHXW: Tensor, qkv_BX3Hd: Tensor) -> Tensor:
        v_BHXd = qkv_BX3Hd.select(-3, 2).movedim(-2, 1)
        window = {"kernel_size": self.kernel_size, "dilation": self.dilation, "is_causal": self.is_causal}
        out_BHXd = self._weight_value(weights_BHXW, v_BHXd, **window, backend=self.backend)
        return out_BHXd.movedim(1, -2)

    def _weights(self, qkv_BX3Hd: Tensor) -> Tensor:
        if any(stride > 1 for stride in self.stride):
            raise ValueError(f"stride = {self.stride} is not supported; attention weights require stride 1.")
        if self.window_padding != "shift":
            raise ValueError(
                f"window_padding = {self.window_padding!r} is not supported; attention weights require 'shift'."
            )
        q_BHXd, k_BHXd = (qkv_BX3Hd.select(-3, part).movedim(-2, 1) for part in (0, 1))
        window = {"kernel_size": self.kernel_size, "dilation": self.dilation, "is_causal": self.is_causal}
        logits_BHXW = self._query_key(q_BHXd * self.scale, k_BHXd, **window, rpb=self.rpb, backend=self.backend)
        return logits_BHXW.softmax(-1)

    def _project(self, x_BXC: Tensor) -> Tensor:
        """Return the packed query, key and value [B, X, 3, H, d] of the padded map."""
        check_layer_input(x_BXC, self.rank, self.num_heads * self.head_dim)  # qkv may be wrapped
        return self.qkv(self._pad(x_BXC)).unflatten(-1, (3, self.num_heads, self.head_dim))

    def _pad(self, x_BXC: Tensor) -> Tensor:
        space = x_BXC.shape[1:-1]
        missing = padding(space, self.kernel_size, self.dilation)
        if self.window_padding != "shift" or not (is_unknown(missing) or any(missing)):
            return x_BXC
        if torch.compiler.is_exporting():
            return resize(x_BXC, [length + amount for length, amount in zip(space, missing, strict=True)])
        # F.pad takes the last axis first, and both ends of each.
        return F.pad(x_BXC, (0, 0, *(end for amount in reversed(missing) for end in (0, amount))))

    def _crop(self, x_BXHd: Tensor, space: Sequence[int]) -> Tensor:
        if torch.compiler.is_exporting() and is_unknown(padding(space, self.kernel_size, self.dilation)):
            return resize(x_BXHd, space)
        for axis, length in enumerate(space, start=1):
            x_BXHd = x_BXHd.narrow(axis, 0, length)
        return x_BXHd

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def extra_repr(self) -> str:
        shown = {
            "kernel_size": self.kernel_size,
            "stride": self.stride,
            "dilation": self.dilation,
            "is_causal": self.is_causal,
        }
        text = ", ".join(f"{name}={value[0] if len(set(value)) == 1 else value}" for name, value in shown.items())
        if self.window_padding != "shift":
            text += f", window_padding={self.window_padding}"
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, {text}, rel_pos_bias={self.rpb is not None}"


class NeighborhoodAttention1D(NeighborhoodAttentionNd):
    """Multi-head neighborhood attention over one axis: [B, L, dim] -> [B, L, dim].

    Parameters: qkv.weight [3 dim, dim], qkv.bias, rpb [num_heads, 2K-1], proj.weight [dim, dim], proj.bias.
    Arguments and padding are those of `NeighborhoodAttention2D`.
    """

    rank = 1
    _attention = staticmethod(functional.na1d_qkvpacked)
    _query_key = staticmethod(functional.na1d_qk)
    _weight_value = staticmethod(functional.na1d_av)


class NeighborhoodAttention2D(NeighborhoodAttentionNd):
    """Multi-head neighborhood attention over two axes: [B, H, W, dim] -> [B, H, W, dim].

    See section 3 of arXiv:2204.07143; with dilation, section 3 of arXiv:2209.15001.

    Maps may have any size. Where an axis is shorter than kernel_size * dilation, the layer appends zeros before the qkv
    projection, attends to them like to other tokens, and crops them before the output projection. With window_padding
    "valid", each axis of the output is (kernel_size - 1) * dilation shorter instead.

    Parameters: qkv.weight [3 dim, dim], qkv.bias, rpb [num_heads, 2K-1, 2K-1], proj.weight [dim, dim], proj.bias.

    Args:
        dim: number of channels, a multiple of num_heads.
        num_heads: number of attention heads.
        kernel_size: window size in tokens, at least 2. This, dilation, stride and is_causal take a single value or one
            per axis.
        dilation: distance between neighboring tokens of a window; None means 1.
        stride: number of consecutive queries that share a window, at most kernel_size.
        is_causal: whether the window ends at its query instead of being centered on it.
        rel_pos_bias: whether to learn a relative position bias, `rpb`. Default: True, or False with `embed_dim`.
        bias: another name of rel_pos_bias.
        qkv_bias: whether the qkv projection has a bias.
        qk_scale: factor on the logits; None or 0: head_dim ** -0.5.
        attn_drop: dropout rate on the attention weights; above 0, training stores all attention weights.
        proj_drop: dropout rate on the output.
        window_padding: how windows that would cross the border are handled: "shift", "zeros" or "valid" as in `na2d`.
            "zeros" and "valid" support neither stride nor attn_drop.
        embed_dim: the name of dim since NATTEN 0.20. With it, rel_pos_bias defaults to False, as in those releases.
        kernel_size_d, dilation_d: kernel_size and dilation along the first of three axes, as NATTEN 0.15 took them.
        use_experimental_ops: ignored; accepted for compatibility with NATTEN 0.17.
        backend: "reference", "cpu" or "cuda"; None selects the fastest that supports the call.
        device, dtype: of the parameters.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    rank = 2
    _attention = staticmethod(functional.na2d_qkvpacked)
    _query_key = staticmethod(functional.na2d_qk)
    _weight_value = staticmethod(functional.na2d_av)


class NeighborhoodAttention3D(NeighborhoodAttentionNd):
    """Multi-head neighborhood attention over three axes: [B, D, H, W, dim] -> [B, D, H, W, dim].

    Parameters: qkv.weight [3 dim, dim], qkv.bias, rpb [num_heads, 2K-1, 2K-1, 2K-1], proj.weight [dim, dim], proj.bias.
    Arguments and padding are those of `NeighborhoodAttention2D`.
    """

    rank = 3
    _attention = staticmethod(functional.na3d_qkvpacked)
    _query_key = staticmethod(functional.na3d_qk)
    _weight_value = staticmethod(functional.na3d_av)


def _has_rpb(rel_pos_bias: bool | None, bias: bool | None, default: bool) -> bool:
    """Return the value of rel_pos_bias, which may also be given as bias.

    Raises:
        ValueError: if both are given and differ.
    """
    if rel_pos_bias is not None and bias is not None and rel_pos_bias != bias:
        raise ValueError("bias is another name of rel_pos_bias, but their values differ; give only one of them.")
    given = rel_pos_bias if rel_pos_bias is not None else bias
    return default if given is None else given
