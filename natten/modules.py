"""Neighborhood attention as layers: qkv projection, attention with relative position bias, output projection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from natten import functional
from natten.geometry import BoolOrTuple, IntOrTuple, check_window, check_window_padding, padding

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


_DOC = """Multi-head neighborhood attention over {rank} {axes} (arXiv:2204.07143, section 3; dilated: arXiv:2209.15001).

    Takes and returns [B, {space}, dim]. Maps of any size: where an axis is shorter than kernel_size * dilation, zeros
    are appended to it before the qkv projection and cropped before the output projection; they are not masked. With
    window_padding "valid" each axis comes out (kernel_size - 1) * dilation shorter instead.
    Parameters: qkv.weight [3 dim, dim], qkv.bias, rpb {rpb}, proj.weight [dim, dim], proj.bias.

    Args:
        dim: channels, a multiple of num_heads.
        num_heads: attention heads.
        kernel_size: tokens a window has on each axis, at least 2; this and the next three are one value or one an axis.
        dilation: distance between the tokens of a window; None means 1.
        stride: queries that share one window, at most kernel_size.
        is_causal: whether a window ends at its query.
        rel_pos_bias: whether to learn a relative position bias, rpb; on unless `embed_dim` is used. `bias` is the same.
        qkv_bias: whether the qkv projection has a bias.
        qk_scale: factor on query times key, head_dim ** -0.5 unless given.
        attn_drop: dropout rate on the attention weights; above 0 they are held in memory during training.
        proj_drop: dropout rate on the output.
        window_padding: what a window does that would reach over the border, "shift", "zeros" or "valid" as for
            na{rank}d; the latter two without stride and attn_drop.
        embed_dim: another name of dim, with the meaning that NATTEN 0.20 gave it: no rpb unless asked for.
        backend: "reference", "cpu" or "cuda"; None takes the fastest that can.

    Raises:
        ValueError: naming the argument that does not fit.
    """


class _NeighborhoodAttention(nn.Module):
    """What the layers of the three ranks share; `_DOC` describes them."""

    rank: int

    def __init__(
        self,
        dim: int | None = None,
        num_heads: int | None = None,
        kernel_size: IntOrTuple | None = None,
        dilation: IntOrTuple | None = None,
        *,
        stride: IntOrTuple = 1,
        is_causal: BoolOrTuple = False,
        rel_pos_bias: bool | None = None,
        bias: bool | None = None,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        window_padding: str = "shift",
        embed_dim: int | None = None,
        backend: str | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if (dim is None) == (embed_dim is None):
            raise ValueError("give either dim or embed_dim, which are two names of the number of channels.")
        if num_heads is None or kernel_size is None:
            raise ValueError("num_heads and kernel_size must be given.")
        has_rpb = _merge_bias(rel_pos_bias, bias, default=embed_dim is None)
        dim = embed_dim if dim is None else dim
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"num_heads is {num_heads}, which does not divide dim {dim}: the order of arguments is (dim, "
                "num_heads, kernel_size); NATTEN up to 0.14.4 had (dim, kernel_size, num_heads)."
            )
        window = check_window(self.rank, kernel_size, stride, 1 if dilation is None else dilation, is_causal)
        self.kernel_size, self.stride, self.dilation, self.is_causal = window
        if attn_drop > 0 and any(s > 1 for s in self.stride):
            raise ValueError(f"attn_drop is {attn_drop}, but with a stride attention weights are not available: use 0.")
        check_window_padding(window_padding)
        if window_padding != "shift" and (attn_drop > 0 or any(s > 1 for s in self.stride)):
            raise ValueError(f"window_padding is {window_padding!r}, which takes neither a stride nor attn_drop.")
        self.window_padding = window_padding
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
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

    def reset_parameters(self) -> None:
        """Initialises the bias table; the projections keep torch's own initialisation."""
        if self.rpb is not None:
            nn.init.trunc_normal_(self.rpb, std=0.02, a=-2.0, b=2.0)

    def forward(self, x_BXC: Tensor) -> Tensor:
        space = x_BXC.shape[1:-1]
        qkv = self._project(x_BXC)
        out_BXHd = self._attend_with_dropout(qkv) if self.training and self.attn_drop.p > 0 else self._attend(qkv)
        x_BXC = out_BXHd.flatten(-2)
        if self.window_padding == "shift":
            x_BXC = self._crop(x_BXC, space)
        return self.proj_drop(self.proj(x_BXC))

    def attention_weights(self, x_BXC: Tensor) -> Tensor:
        """What `forward` weighs values by: [B, num_heads, X, W], W the product of kernel_size, row-major.

        X is the padded map. Weights are before dropout.

        Raises:
            ValueError: with a stride, which has no weights per query, and where windows are not moved.
        """
        if any(stride > 1 for stride in self.stride):
            raise ValueError(f"attention weights are not available with a stride, here {self.stride}.")
        if self.window_padding != "shift":
            raise ValueError(f"attention weights are not available with window_padding={self.window_padding!r}.")
        return self._weights(self._project(x_BXC))

    def _attend(self, qkv: Tensor) -> Tensor:
        function = getattr(functional, f"na{self.rank}d_qkvpacked")
        window = self.kernel_size, self.stride, self.dilation, self.is_causal
        options = {"scale": self.scale, "rpb": self.rpb, "backend": self.backend}
        return function(qkv, *window, **options, window_padding=self.window_padding)

    def _attend_with_dropout(self, qkv: Tensor) -> Tensor:
        weight_value = getattr(functional, f"na{self.rank}d_av")
        weights_BHXW = self.attn_drop(self._weights(qkv))
        v_BHXd = qkv.select(-3, 2).movedim(-2, 1)
        out_BHXd = weight_value(
            weights_BHXW.to(v_BHXd.dtype), v_BHXd, self.kernel_size, self.dilation, self.is_causal, backend=self.backend
        )
        return out_BHXd.movedim(1, -2)

    def _weights(self, qkv: Tensor) -> Tensor:
        query_key = getattr(functional, f"na{self.rank}d_qk")
        q_BHXd, k_BHXd = (qkv.select(-3, part).movedim(-2, 1) for part in (0, 1))
        window = self.kernel_size, self.dilation, self.is_causal
        logits_BHXW = query_key(q_BHXd * self.scale, k_BHXd, *window, rpb=self.rpb, backend=self.backend)
        return logits_BHXW.softmax(-1)

    def _project(self, x_BXC: Tensor) -> Tensor:
        """Packed query, key and value [B, X, 3, heads, head_dim] of the padded map."""
        if x_BXC.dim() != self.rank + 2:
            raise ValueError(
                f"input has shape {tuple(x_BXC.shape)}, but {type(self).__name__} takes {self.rank + 2} dimensions: "
                f"batch, {self.rank} spatial axes and channels."
            )
        if x_BXC.shape[-1] != self.qkv.in_features:
            raise ValueError(
                f"input has {x_BXC.shape[-1]} channels on its last axis, but this layer has dim "
                f"{self.qkv.in_features}: it takes channels last."
            )
        return self.qkv(self._pad(x_BXC)).unflatten(-1, (3, self.num_heads, self.head_dim))

    def _pad(self, x_BXC: Tensor) -> Tensor:
        missing = padding(x_BXC.shape[1:-1], self.kernel_size, self.dilation)
        if self.window_padding != "shift" or not any(missing):
            return x_BXC
        # F.pad wants the last axis first, and both ends of each.
        return F.pad(x_BXC, (0, 0, *(end for amount in reversed(missing) for end in (0, amount))))

    def _crop(self, x_BXC: Tensor, space: Sequence[int]) -> Tensor:
        for axis, length in enumerate(space, start=1):
            x_BXC = x_BXC.narrow(axis, 0, length)
        return x_BXC

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


def _merge_bias(rel_pos_bias: bool | None, bias: bool | None, default: bool) -> bool:
    """One answer from two names of the same switch."""
    if rel_pos_bias is not None and bias is not None and rel_pos_bias != bias:
        raise ValueError("bias and rel_pos_bias are two names of one switch, but are given different values.")
    given = rel_pos_bias if rel_pos_bias is not None else bias
    return default if given is None else given


def _make(rank: int) -> type[_NeighborhoodAttention]:
    doc = _DOC.format(
        rank=rank,
        axes="axis" if rank == 1 else "axes",
        space={1: "L", 2: "H, W", 3: "D, H, W"}[rank],
        rpb="[num_heads" + ", 2K-1" * rank + "]",
    )
    return type(
        f"NeighborhoodAttention{rank}D",
        (_NeighborhoodAttention,),
        {"rank": rank, "__doc__": doc, "__module__": __name__},
    )


NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D = map(_make, (1, 2, 3))
