"""Attention as public projects call natten, each in its manner: import lines, argument order, shapes, masks.

A project is an encoder block, `x + proj(attend(qkv(x)))`. `attend` calls natten; `expected` computes the same with
dense attention. Both take and return heads-last tensors [B, *space, heads, head_dim].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from test_compat import dense

PROJECTS: dict[str, type[Block]] = {}


def project(name: str) -> Callable[[type], type]:
    """Register a block under the name of its project."""

    def register(block: type) -> type:
        PROJECTS[name] = block
        return block

    return register


class Block(nn.Module):
    """Base class: projections, and dense attention for a window that all heads share."""

    space: tuple[int, ...] = (9, 10)
    heads = 2
    head_dim = 12
    value_dim: int | None = None
    kernel_size: int | tuple[int, ...] = 3
    stride = 1
    dilation: int | tuple[int, ...] = 1
    is_causal: bool | tuple[bool, ...] = False
    has_rpb = False
    scale: float | None = None

    def __init__(self):
        super().__init__()
        self.dims = (self.head_dim, self.head_dim, self.value_dim or self.head_dim)
        self.dim = self.heads * self.head_dim
        self.qkv = nn.Linear(self.dim, self.heads * sum(self.dims))
        self.proj = nn.Linear(self.heads * self.dims[2], self.dim)
        sizes = dense.per_axis(self.kernel_size, len(self.space))
        self.rpb = nn.Parameter(torch.empty(self.heads, *(2 * k - 1 for k in sizes))) if self.has_rpb else None

    def forward(self, x: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        parts = self.qkv(x).split([self.heads * dim for dim in self.dims], -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        return x + self.proj(attend(query, key, value).flatten(-2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError

    def mask(self) -> Tensor:
        window = self.kernel_size, self.stride, self.dilation, self.is_causal
        return dense.bias(self.space, *window, self.rpb)

    def expected(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        return dense.attend(query, key, value, scale, self.mask().to(query.dtype))


def heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.movedim(-2, 1) for x in tensors)


@project("all-in-one, 1-D")
class AllInOne1d(Block):
    space, head_dim, kernel_size, dilation, has_rpb = (24,), 12, 5, 4, True

    def attend(self, query, key, value):
        from natten.functional import natten1dav, natten1dqkrpb

        query, key, value = heads_first(query, key, value)
        scores = natten1dqkrpb(query / self.head_dim**0.5, key, self.rpb, self.kernel_size, self.dilation)
        return natten1dav(scores.softmax(-1), value, self.kernel_size, self.dilation).movedim(1, -2)


@project("all-in-one, 2-D")
class AllInOne2d(Block):
    space, head_dim, kernel_size, has_rpb = (5, 16), 12, 5, True

    def attend(self, query, key, value):
        from natten.functional import natten2dav, natten2dqkrpb

        query, key, value = heads_first(query, key, value)
        scores = natten2dqkrpb(query / self.head_dim**0.5, key, self.rpb, self.kernel_size, 1)
        return natten2dav(scores.softmax(-1), value, self.kernel_size, 1).movedim(1, -2)


@project("NAT and DiNAT of 2022, transformers 4.25")
class Transformers425(Block):
    space, head_dim, kernel_size, dilation, has_rpb = (8, 9), 32, 3, 2, True

    def attend(self, query, key, value):
        from natten.functional import natten2dav, natten2dqkrpb

        query, key, value = heads_first(query, key, value)
        weights = natten2dqkrpb(query * self.head_dim**-0.5, key, self.rpb, self.dilation).softmax(-1)
        return natten2dav(weights, value, self.dilation).movedim(1, -2)


@project("DCPNet, MISTNet")
class DcpNet(Block):
    space, head_dim, kernel_size, dilation, has_rpb = (12, 9), 16, 3, 3, True

    def attend(self, query, key, value):
        from natten.functional import NATTEN2DAVFunction, NATTEN2DQKRPBFunction

        query, key, value = heads_first(query, key, value)
        query = query * self.head_dim**-0.5
        weights = NATTEN2DQKRPBFunction.apply(query, key, self.rpb, self.kernel_size, self.dilation).softmax(-1)
        return NATTEN2DAVFunction.apply(weights, value, self.kernel_size, self.dilation).movedim(1, -2)


@project("StyleNAT")
class StyleNat(Block):
    space, heads, head_dim, windows = (12, 12), 4, 8, ((3, 1), (5, 2))

    def __init__(self):
        super().__init__()
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(2, 2 * k - 1, 2 * k - 1)) for k, _ in self.windows)

    def attend(self, query, key, value):
        from natten import use_autotuner, use_fused_na
        from natten.functional import natten2dav, natten2dqkrpb

        use_fused_na(True)
        use_autotuner(True)
        outs = []
        parts = (x.chunk(2, 1) for x in heads_first(query * self.head_dim**-0.5, key, value))
        for q, k, v, rpb, (kernel_size, dilation) in zip(*parts, self.tables, self.windows, strict=True):
            weights = natten2dqkrpb(q, k, rpb, kernel_size, dilation).softmax(-1)
            outs.append(natten2dav(weights, v, kernel_size, dilation))
        return torch.cat(outs, 1).movedim(1, -2)

    def mask(self):
        windows = zip(self.windows, self.tables, strict=True)
        return torch.cat([dense.bias(self.space, k, 1, d, False, rpb) for (k, d), rpb in windows])


@project("SegMAN")
class SegMan(Block):
    head_dim, kernel_size, has_rpb = 36, 7, True

    def attend(self, query, key, value):
        from natten import use_gemm_na
        from natten.functional import na2d_av, na2d_qk

        use_gemm_na(True)
        query, key, value = heads_first(query, key, value)
        window = {"kernel_size": self.kernel_size, "dilation": 1, "is_causal": False}
        weights = na2d_qk(query * self.head_dim**-0.5, key, **window, rpb=self.rpb).softmax(-1)
        return na2d_av(weights, value, **window).movedim(1, -2)


@project("A2Mamba")
class A2Mamba(Block):
    """Two sets of heads with different dilations; the weights are used a second time, on other values."""

    head_dim, kernel_size, dilation = 20, 3, 3

    def attend(self, query, key, value):
        from natten.functional import na2d_av, na2d_qk

        query, key, value = heads_first(query, key, value)
        weights = na2d_qk(query * self.head_dim**-0.5, key, self.kernel_size, self.dilation).softmax(-1)
        out = na2d_av(weights, value, self.kernel_size, self.dilation)
        return (out + na2d_av(weights, out, self.kernel_size, self.dilation)).movedim(1, -2)

    def expected(self, query, key, value):
        out = super().expected(query, key, value)
        return out + super().expected(query, key, out)


@project("OverLoCK")
class OverLock(Block):
    """Convolution with kernels that depend on the input: na2d_av with weights from a matrix product."""

    heads, head_dim, kernel_size = 2, 10, 5

    def __init__(self):
        super().__init__()
        self.context = nn.Parameter(torch.empty(self.heads, self.head_dim, self.kernel_size**2))

    def weights(self, query):
        return torch.einsum("bhwnd,ndk->bnhwk", query, self.context).softmax(-1)

    def attend(self, query, key, value):
        from natten.functional import na2d_av

        (value,) = heads_first(value)
        return na2d_av(self.weights(query), value, kernel_size=self.kernel_size).movedim(1, -2)

    def expected(self, query, key, value):
        keys = dense.brute_force.windows(self.space, dense.brute_force.Window((5, 5), (1, 1), (1, 1), (False, False)))[
            0
        ]
        (value,) = heads_first(value)
        neighbors = value.flatten(2, 3)[:, :, keys]
        out = (self.weights(query).flatten(2, 3).unsqueeze(-2) @ neighbors).squeeze(-2)
        return out.unflatten(2, self.space).movedim(1, -2)


@project("LM-Net")
class LmNet(Block):
    heads, head_dim, kernel_size, dilation = 3, 1, 3, 2

    def attend(self, query, key, value):
        from natten.functional import na2d_av, na2d_qk

        query, key, value = heads_first(query, key, value)
        weights = na2d_qk(query, key, kernel_size=self.kernel_size, dilation=self.dilation).softmax(-1)
        return na2d_av(weights, value, kernel_size=self.kernel_size, dilation=self.dilation).movedim(1, -2)


@project("NAF, AnyUp")
class Naf(Block):
    """Upsampling: the values are features of another width than the query."""

    head_dim, value_dim, kernel_size = 16, 36, 5

    def attend(self, query, key, value):
        from natten import na2d

        return na2d(query, key, value, kernel_size=(self.kernel_size, self.kernel_size), dilation=1, backend=None)


@project("k-diffusion HDiT")
class KDiffusion(Block):
    """Cosine similarity: normalized queries and keys with a learned factor, and scale 1."""

    head_dim, kernel_size, scale = 16, 5, 1.0

    def attend(self, query, key, value):
        import natten

        natten.use_fused_na(True)
        if natten.has_fused_na():
            return natten.functional.na2d(query, key, value, self.kernel_size, scale=1.0)
        raise AssertionError("fused attention is available")


@project("k-diffusion HDiT, unfused")
class KDiffusionUnfused(Block):
    head_dim, kernel_size, scale = 16, 5, 1.0

    def attend(self, query, key, value):
        from natten.functional import natten2dav, natten2dqk

        query, key, value = heads_first(query, key, value)
        weights = natten2dqk(query, key, self.kernel_size, 1).softmax(-1)
        return natten2dav(weights, value, self.kernel_size, 1).movedim(1, -2)


@project("NATTEN fused by autograd function, weather models")
class Weather(Block):
    space, head_dim, kernel_size, dilation = (5, 6, 7), 14, (3, 5, 5), 1

    def attend(self, query, key, value):
        from natten.utils import check_all_args

        from natten.functional import FusedNeighborhoodAttention3D

        kernel_size, dilation, is_causal = check_all_args(3, self.kernel_size, self.dilation, False)
        tiles = ((8, 2, 4), (8, 2, 4)), ((8, 4, 2), (8, 2, 4), (1, 45, 30), False)
        scale = None or query.shape[-1] ** -0.5
        return FusedNeighborhoodAttention3D.apply(
            query, key, value, None, kernel_size, dilation, is_causal, scale, *tiles
        )


@project("Cosmos, imaginaire")
class Cosmos(Block):
    space, head_dim, kernel_size, stride, is_causal = (4, 6, 6), 16, (3, 4, 4), 2, (True, False, False)

    def attend(self, query, key, value):
        import natten
        from natten.functional import neighborhood_attention_generic

        natten.use_kv_parallelism_in_fused_na(True)
        natten.set_memory_usage_preference("unrestricted")
        window = {"kernel_size": self.kernel_size, "stride": self.stride, "dilation": self.dilation}
        return neighborhood_attention_generic(
            query, key, value, **window, is_causal=self.is_causal, backend="cutlass-fna"
        )


@project("models with natten.types and natten.utils.checks")
class Typed(Block):
    space, heads, head_dim, kernel_size, dilation, is_causal = (20,), 3, 28, 5, 2, True

    def attend(self, query, key, value):
        from natten.types import CausalArgTypeOrDed, DimensionTypeOrDed  # noqa: F401
        from natten.utils import log
        from natten.utils.checks import check_all_args

        from natten.functional import neighborhood_attention_generic

        log.get_logger(__name__).debug("attention")
        window = check_all_args(1, self.kernel_size, None, self.dilation, self.is_causal)
        return neighborhood_attention_generic(query, key, value, *window, scale=None)


@project("speech and music with padding masks")
class Speech(Block):
    """The last tokens are padding, which no query may attend to."""

    space, head_dim, kernel_size, valid = (24,), 16, 7, 17

    def attend(self, query, key, value):
        from natten.functional import na1d_av, na1d_qk

        query, key, value = heads_first(query, key, value)
        logits = na1d_qk(query * self.head_dim**-0.5, key, self.kernel_size, 1)
        ones = torch.ones_like(query[..., :1])
        is_padding = torch.zeros_like(ones)
        is_padding[:, :, self.valid :] = 1
        logits = logits + na1d_qk(ones, is_padding, self.kernel_size, 1) * -1e9
        return na1d_av(logits.softmax(-1), value, self.kernel_size, 1).movedim(1, -2)

    def mask(self):
        mask = super().mask().clone()
        mask[..., self.valid :] -= 1e9
        return mask


@project("extra tokens of 0.15")
class ExtraTokens(Block):
    head_dim, kernel_size = 16, 3

    def __init__(self):
        super().__init__()
        self.extra = nn.Parameter(torch.empty(2, 1, self.heads, 3, self.head_dim))

    def attend(self, query, key, value):
        from natten.functional import na2d_av, na2d_qk

        query, key, value = heads_first(query, key, value)
        extra_key, extra_value = self.extra.expand(-1, query.shape[0], -1, -1, -1)
        weights = na2d_qk(query * self.head_dim**-0.5, key, self.kernel_size, 1, extra_key).softmax(-1)
        return na2d_av(weights, value, self.kernel_size, 1, extra_value).movedim(1, -2)

    def expected(self, query, key, value):
        batch = query.shape[0]
        q, k, v = (x.flatten(1, -3).movedim(1, 2) for x in (query, key, value))
        extra_key, extra_value = self.extra.expand(-1, batch, -1, -1, -1)
        mask = self.mask().to(q.dtype)
        logits = q * self.head_dim**-0.5 @ torch.cat((k, extra_key), 2).mT
        logits = logits + torch.cat((mask, mask.new_zeros(*mask.shape[:2], 3)), -1)
        out = logits.softmax(-1) @ torch.cat((v, extra_value), 2)
        return out.movedim(1, 2).unflatten(1, self.space)


@project("natten.natten2d, natten.na2d as modules")
class OldModules(Block):
    head_dim, kernel_size, has_rpb = 14, 7, True

    def attend(self, query, key, value):
        from natten.na2d import na2d
        from natten.natten2d import natten2dav, natten2dqkrpb

        first = na2d(query, key, value, kernel_size=self.kernel_size, rpb=self.rpb)
        query, key, value = heads_first(query, key, value)
        weights = natten2dqkrpb(query * self.head_dim**-0.5, key, self.rpb, self.kernel_size, 1).softmax(-1)
        return (first + natten2dav(weights, value, self.kernel_size, 1).movedim(1, -2)) / 2


@project("natten.experimental")
class Experimental(Block):
    head_dim, kernel_size, dilation, is_causal = 16, 3, 2, (True, False)

    def attend(self, query, key, value):
        from natten.experimental import na2d

        return na2d(query, key, value, self.kernel_size, self.dilation, self.is_causal)
