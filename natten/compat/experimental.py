"""natten.experimental of NATTEN 0.17: fused attention for torch.compile, with dilation as the fifth argument.

The functions of natten support torch.compile themselves; these only differ in the order of arguments.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from natten import functional
from natten.checks import BoolOrTuple, IntOrTuple


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None = 1,
    is_causal: BoolOrTuple | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    xformers_kwargs: dict | None = None,
) -> Tensor:
    """Call `natten.na1d`, with the arguments in the order of NATTEN 0.17."""
    window: dict[str, Any] = {"kernel_size": kernel_size, "dilation": dilation, "is_causal": is_causal}
    additional: dict[str, Any] = {"additional_keys": additional_keys, "additional_values": additional_values}
    out: Any = functional.na1d(query, key, value, **window, rpb=rpb, scale=scale, **additional)
    return out


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None = 1,
    is_causal: BoolOrTuple | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    xformers_kwargs: dict | None = None,
) -> Tensor:
    """Call `natten.na2d`, with the arguments in the order of NATTEN 0.17."""
    window: dict[str, Any] = {"kernel_size": kernel_size, "dilation": dilation, "is_causal": is_causal}
    additional: dict[str, Any] = {"additional_keys": additional_keys, "additional_values": additional_values}
    out: Any = functional.na2d(query, key, value, **window, rpb=rpb, scale=scale, **additional)
    return out


def na3d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: IntOrTuple,
    dilation: IntOrTuple | None = 1,
    is_causal: BoolOrTuple | None = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    xformers_kwargs: dict | None = None,
) -> Tensor:
    """Call `natten.na3d`, with the arguments in the order of NATTEN 0.17."""
    window: dict[str, Any] = {"kernel_size": kernel_size, "dilation": dilation, "is_causal": is_causal}
    additional: dict[str, Any] = {"additional_keys": additional_keys, "additional_values": additional_values}
    out: Any = functional.na3d(query, key, value, **window, rpb=rpb, scale=scale, **additional)
    return out
