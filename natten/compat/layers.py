"""Layers of older NATTEN releases."""

from __future__ import annotations

from typing import Any

from natten.checks import BoolOrTuple, IntOrTuple, check_heads
from natten.modules import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
    NeighborhoodAttentionNd,
)

NeighborhoodAttention = NeighborhoodAttention2D  # the name up to 0.12


class LegacyNeighborhoodAttention1D(NeighborhoodAttention1D):
    """Neighborhood attention over one axis on the reference backend: [B, L, dim] -> [B, L, dim].

    Args:
        dim: number of channels, a multiple of num_heads.
        kernel_size: window size in tokens, at least 2. Note that it comes before num_heads.
        num_heads: number of attention heads.
        mode: 0 or 1; ignored.
        qkv_bias, qk_scale, attn_drop, proj_drop, **options: see `NeighborhoodAttention2D`.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: IntOrTuple,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        mode: int = 1,
        **options: Any,
    ):
        _check_legacy(dim, num_heads, mode)
        drop = {"attn_drop": attn_drop, "proj_drop": proj_drop}
        options |= {"qkv_bias": qkv_bias, "qk_scale": qk_scale, "backend": "reference", **drop}
        super().__init__(dim, num_heads, kernel_size, **options)


class LegacyNeighborhoodAttention2D(NeighborhoodAttention2D):
    """Neighborhood attention over two axes on the reference backend: [B, H, W, dim] -> [B, H, W, dim].

    Args:
        dim: number of channels, a multiple of num_heads.
        kernel_size: window size in tokens, at least 2. Note that it comes before num_heads.
        num_heads: number of attention heads.
        mode: 0 or 1; ignored.
        qkv_bias, qk_scale, attn_drop, proj_drop, **options: see `NeighborhoodAttention2D`.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: IntOrTuple,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        mode: int = 1,
        **options: Any,
    ):
        _check_legacy(dim, num_heads, mode)
        drop = {"attn_drop": attn_drop, "proj_drop": proj_drop}
        options |= {"qkv_bias": qkv_bias, "qk_scale": qk_scale, "backend": "reference", **drop}
        super().__init__(dim, num_heads, kernel_size, **options)


class NeighborhoodAttentionGeneric(NeighborhoodAttentionNd):
    """Neighborhood attention over 1 to 3 axes, with the arguments of NATTEN 0.20 and later and no position bias.

    Args:
        na_dim: number of axes.
        embed_dim, num_heads, kernel_size, stride, dilation, is_causal, qkv_bias, qk_scale, proj_drop, **options: see
            `NeighborhoodAttention2D`.

    Raises:
        ValueError: naming the argument that does not fit.
    """

    def __init__(
        self,
        na_dim: int,
        embed_dim: int,
        num_heads: int,
        kernel_size: IntOrTuple,
        stride: IntOrTuple | None = 1,
        dilation: IntOrTuple | None = 1,
        is_causal: BoolOrTuple | None = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        **options: Any,
    ):
        if na_dim not in _LAYERS:
            raise ValueError(f"na_dim = {na_dim!r} must be 1, 2 or 3.")
        layer = _LAYERS[na_dim]
        self.na_dim = self.rank = na_dim
        self._attention, self._query_key, self._weight_value = layer._attention, layer._query_key, layer._weight_value
        window: dict[str, Any] = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        options |= {"is_causal": is_causal, "qkv_bias": qkv_bias, "qk_scale": qk_scale, "proj_drop": proj_drop}
        super().__init__(embed_dim=embed_dim, num_heads=num_heads, **window, **options)
        self.embed_dim = embed_dim


_LAYERS: dict[int, type[NeighborhoodAttentionNd]] = {
    1: NeighborhoodAttention1D,
    2: NeighborhoodAttention2D,
    3: NeighborhoodAttention3D,
}


def _check_legacy(dim: int, num_heads: int, mode: int) -> None:
    check_heads(dim, num_heads, "(dim, kernel_size, num_heads)")
    if mode not in (0, 1):
        raise ValueError(f"mode = {mode!r} must be 0 or 1.")
