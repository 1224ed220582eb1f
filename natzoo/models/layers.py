"""What the model families share: the block, and the way from dilations to blocks. Feature maps are [B, H, W, C]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, trunc_normal_
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from natten import NeighborhoodAttention2D


class PatchEmbed(nn.Module):
    """Square patches, then LayerNorm: [B, in_chans, H, W] -> [B, H/P, W/P, embed_dim]; zeros fill the last patches."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, device=None, dtype=None):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size, **dd)
        self.norm = nn.LayerNorm(embed_dim, **dd)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[-2:]
        x_BCHW = F.pad(x_BCHW, (0, -width % self.patch_size, 0, -height % self.patch_size))
        return self.norm(to_nhwc(self.proj(x_BCHW)))


class NeighborhoodBlock(nn.Module):
    """Pre-norm transformer block with neighborhood attention (NAT, arXiv:2204.07143, figure 5).

    Args:
        dim: channels.
        num_heads: attention heads.
        kernel_size: window, in tokens.
        dilation: dilation of the window.
        mlp_ratio: hidden channels of the MLP, as a multiple of dim.
        qkv_bias: whether the qkv projection has a bias.
        proj_drop: dropout rate after the attention's and the MLP's projections.
        attn_drop: dropout rate on attention weights.
        drop_path: rate of stochastic depth, for each of the two branches.
        layer_scale: initial value of the learned factor on each branch; None for no such factor.
        attn: an attention layer to use instead, [B, H, W, C] -> [B, H, W, C].
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        attn: nn.Module | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        self.norm1 = nn.LayerNorm(dim, **dd)
        self.attn = attn or NeighborhoodAttention2D(
            dim, num_heads, kernel_size, dilation, qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **dd
        )
        self.norm2 = nn.LayerNorm(dim, **dd)
        self.mlp = LeanMlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        for name in ("gamma1", "gamma2"):
            gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale, **dd))
            self.register_parameter(name, gamma)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC = x_BHWC + self.drop_path(_scaled(self.attn(self.norm1(x_BHWC)), self.gamma1))
        return x_BHWC + self.drop_path(_scaled(self.mlp(self.norm2(x_BHWC)), self.gamma2))


class LeanMlp(Mlp):
    """timm's MLP, which in training keeps its hidden features once, not also behind the GELU: that is computed again.

    A fifth of the memory of a training step for 2% of its time. torch.compile, which decides such things itself, and
    tracers see the plain MLP.
    """

    def forward(self, x: Tensor) -> Tensor:
        is_lean = torch.is_grad_enabled() and self.training and not self.drop1.p and type(self.act) is nn.GELU
        if not is_lean or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().forward(x)
        return self.drop2(_GeluLinear.apply(self.fc1(x), self.fc2.weight, self.fc2.bias))


class _GeluLinear(torch.autograd.Function):
    """linear(gelu(x), weight, bias), for which only x and weight are kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias):
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = bias.dtype

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_rows = grad.flatten(0, -2)
        hidden_rows = F.gelu(x).to(grad.dtype).flatten(0, -2)
        grad_hidden = (grad @ weight.to(grad.dtype)).to(x.dtype)  # under autocast, dtypes differ
        return (
            torch.ops.aten.gelu_backward(grad_hidden, x),
            (grad_rows.mT @ hidden_rows).to(weight.dtype),
            grad_rows.sum(0).to(ctx.bias_dtype),
        )


def run_blocks(blocks: Iterable[nn.Module], x_BHWC: Tensor, recompute: bool) -> Tensor:
    """A map after some blocks; in training with `recompute` nothing inside of them is kept for the backward pass."""
    for block in blocks:
        again = recompute and block.training and not torch.jit.is_scripting()
        x_BHWC = checkpoint(block, x_BHWC) if again else block(x_BHWC)
    return x_BHWC


def _scaled(x: Tensor, gamma: Tensor | None) -> Tensor:
    return x if gamma is None else x * gamma


def check_dilations(dilations: Sequence[Sequence[int]] | None, depths: Sequence[int]) -> list[list[int]]:
    """One dilation a block; None means 1 everywhere.

    Raises:
        ValueError: naming the stage whose number of dilations is not its depth.
    """
    if dilations is None:
        return [[1] * depth for depth in depths]
    if len(dilations) != len(depths):
        raise ValueError(f"dilations has {len(dilations)} stages, but depths has {len(depths)}.")
    for stage, (values, depth) in enumerate(zip(dilations, depths, strict=True)):
        if len(values) != depth:
            raise ValueError(
                f"dilations[{stage}] has {len(values)} values, but depths[{stage}] is {depth}: give one dilation "
                "for each block."
            )
    return [list(values) for values in dilations]


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Rates of stochastic depth rising linearly from 0 at the first block to `rate` at the last."""
    last = max(sum(depths) - 1, 1)
    rates = iter(rate * block / last for block in range(sum(depths)))
    return [[next(rates) for _ in range(depth)] for depth in depths]


def check_pooling(global_pool: str) -> None:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool is {global_pool!r}, but must be 'avg' or ''.")


def init_linear(module: nn.Module) -> None:
    """Linear layers from a normal distribution of std 0.02 cut at 2, biases 0; all else as it is."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def to_nchw(x_BHWC: Tensor) -> Tensor:
    return x_BHWC.permute(0, 3, 1, 2)


def to_nhwc(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.permute(0, 2, 3, 1)
