"""Functions and layers of older NATTEN releases, under their names and with their orders of arguments.

They can be imported from where they were: the functions from natten.functional, the layers from natten; from both also
the switches, which natten/context.py defines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from natten import context, functional
from natten.context import *  # noqa: F403
from natten.geometry import IntOrTuple
from natten.modules import NeighborhoodAttention1D, NeighborhoodAttention2D

__all__ = [
    "HAS_LIBNATTEN",
    "LegacyNeighborhoodAttention1D",
    "LegacyNeighborhoodAttention2D",
    "NeighborhoodAttention",
    *(f"natten{rank}d{kind}" for rank in (1, 2, 3) for kind in ("qk", "qkrpb", "av")),
    *(f"na{rank}d_qk_with_bias" for rank in (1, 2, 3)),
    *context.__all__,
]

HAS_LIBNATTEN = False  # whether NATTEN's own compiled library is there


def old_name(module: str, name: str) -> Any:
    """What older code finds as `name` in natten and in natten.functional, whose `__getattr__` this is.

    Raises:
        AttributeError: if it is not an older name either.
    """
    if name not in __all__:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return globals()[name]


# ---------------------------------------------------------------------------------------------------------------------
# The two halves
# ---------------------------------------------------------------------------------------------------------------------


def _make_qk(rank: int, name: str, bias: str | None) -> Callable[..., Tensor]:
    """The logits; `bias` is what the function calls its bias table, None if it takes none."""
    tensors = ("query", "key") if bias is None else ("query", "key", bias)
    orders = _orders(rank, tensors, tells_kernel_size=bias is not None)
    new = getattr(functional, f"na{rank}d_qk")

    def qk(*args, **kwargs) -> Tensor:
        given = _sort(name, orders, args, kwargs)
        rpb = given.get(bias)
        if "kernel_size" not in given:
            given["kernel_size"] = _kernel_size_of_rpb(rpb, rank, name)
        return new(given["query"], given["key"], given["kernel_size"], given["dilation"], rpb=rpb)

    return _publish(qk, name, orders, new)


def _make_av(rank: int, name: str) -> Callable[..., Tensor]:
    """The sums of attention weight times value."""
    orders = _orders(rank, ("attn", "value"), tells_kernel_size=True)
    new = getattr(functional, f"na{rank}d_av")

    def av(*args, **kwargs) -> Tensor:
        given = _sort(name, orders, args, kwargs)
        if "kernel_size" not in given:
            given["kernel_size"] = _kernel_size_of_attn(given["attn"], rank, name)
        return new(**given)

    return _publish(av, name, orders, new)


def _publish(function: Callable, name: str, orders: Sequence[Sequence[str]], new: Callable) -> Callable:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"""What `{new.__name__}` computes, under a name of older releases.

    Called as {_spell(name, orders)}.

    Raises:
        TypeError: if the arguments have none of these orders.
        ValueError: as `{new.__name__}`.
    """
    return function


def _orders(rank: int, tensors: Sequence[str], tells_kernel_size: bool) -> list[tuple[str, ...]]:
    """The orders of arguments that are understood. Their lengths differ, which tells them apart.

    Up to 0.14.4 the kernel size followed from the shape of the bias table or of the weights. The 3-D functions took
    the first axis apart and the other two together.
    """
    orders = [(*tensors, "kernel_size", "dilation")]
    if tells_kernel_size:
        orders.append((*tensors, "dilation"))
    if rank == 3:
        orders.append((*tensors, "kernel_size_d", "kernel_size", "dilation_d", "dilation"))
    return orders


def _sort(name: str, orders: Sequence[Sequence[str]], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name; those of the 3-D functions with one value an axis."""
    for order in orders:
        if len(order) == len(args) + len(kwargs) and set(order[len(args) :]) == set(kwargs):
            break
    else:
        shown = ", ".join(["..."] * len(args) + [f"{key}=..." for key in kwargs])
        raise TypeError(f"{name}({shown}) has no order of arguments of an older release: call {_spell(name, orders)}.")
    given = dict(zip(order[: len(args)], args, strict=True)) | kwargs
    for argument in ("kernel_size", "dilation"):
        if f"{argument}_d" in given:
            given[argument] = (given.pop(f"{argument}_d"), given[argument], given[argument])
    return given


def _spell(name: str, orders: Sequence[Sequence[str]]) -> str:
    return " or ".join(f"{name}({', '.join(order)})" for order in orders)


def _kernel_size_of_rpb(rpb: Tensor | None, rank: int, name: str) -> IntOrTuple:
    if not isinstance(rpb, Tensor) or rpb.dim() != rank + 1:
        found = f"has shape {tuple(rpb.shape)}" if isinstance(rpb, Tensor) else f"is {rpb!r}"
        raise ValueError(
            f"{name} is called without kernel_size, which then follows from the bias table, [heads{', 2K-1' * rank}]; "
            f"but that {found}: give kernel_size before dilation."
        )
    return tuple((size + 1) // 2 for size in rpb.shape[1:])


def _kernel_size_of_attn(attn: Tensor, rank: int, name: str) -> int:
    weights = attn.shape[-1]
    kernel_size = round(weights ** (1 / rank))
    if kernel_size**rank != weights:
        raise ValueError(
            f"{name} is called without kernel_size, which then follows from attn; but that has {weights} weights for "
            f"each query, which is no kernel of {rank} equal sides: give kernel_size before dilation."
        )
    return kernel_size


natten1dqk, natten2dqk, natten3dqk = (_make_qk(rank, f"natten{rank}dqk", None) for rank in (1, 2, 3))
natten1dqkrpb, natten2dqkrpb, natten3dqkrpb = (_make_qk(rank, f"natten{rank}dqkrpb", "rpb") for rank in (1, 2, 3))
natten1dav, natten2dav, natten3dav = (_make_av(rank, f"natten{rank}dav") for rank in (1, 2, 3))
na1d_qk_with_bias, na2d_qk_with_bias, na3d_qk_with_bias = (
    _make_qk(rank, f"na{rank}d_qk_with_bias", "bias") for rank in (1, 2, 3)
)


# ---------------------------------------------------------------------------------------------------------------------
# Layers
# ---------------------------------------------------------------------------------------------------------------------

NeighborhoodAttention = NeighborhoodAttention2D  # its name up to 0.12


_LEGACY_DOC = """Multi-head neighborhood attention in plain PyTorch: always the reference backend.

    Takes and returns [B, {space}, dim], of any size. Parameters and padding as in NeighborhoodAttention{rank}D.

    Args:
        dim: channels, a multiple of num_heads.
        kernel_size: tokens a window has on each axis, at least 2.
        num_heads: attention heads; note that it comes after kernel_size.
        qkv_bias: whether the qkv projection has a bias.
        qk_scale: factor on query times key, head_dim ** -0.5 unless given.
        attn_drop: dropout rate on the attention weights.
        proj_drop: dropout rate on the output.
        mode: 0 or 1, once two ways to unfold; without effect.
        **options: those of NeighborhoodAttention{rank}D, such as dilation.

    Raises:
        ValueError: naming the argument that does not fit.
    """


class _Legacy:
    """What the two layers share, to stand before the layer it turns into a legacy one."""

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
        **options,
    ):
        if num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"num_heads is {num_heads}, which does not divide dim {dim}: the order of arguments of "
                f"{type(self).__name__} is (dim, kernel_size, num_heads)."
            )
        if mode not in (0, 1):
            raise ValueError(f"mode is {mode!r}, but must be 0 or 1.")
        super().__init__(
            dim,
            num_heads,
            kernel_size,
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            backend="reference",
            **options,
        )


class LegacyNeighborhoodAttention1D(_Legacy, NeighborhoodAttention1D):
    __doc__ = _LEGACY_DOC.format(rank=1, space="L")


class LegacyNeighborhoodAttention2D(_Legacy, NeighborhoodAttention2D):
    __doc__ = _LEGACY_DOC.format(rank=2, space="H, W")
