"""Neighborhood attention for PyTorch: 1-D, 2-D and 3-D, with dilation, stride, causal axes and relative position bias.

Functions: `na1d`, `na2d`, `na3d`, each also with `_qkvpacked`, `_qk` and `_av`; `merge_attentions`.
Layers: `NeighborhoodAttention1D`, `NeighborhoodAttention2D`, `NeighborhoodAttention3D`.
"""

import sys as _sys

from natten import backends as _backends
from natten import compat as _compat
from natten import context, functional  # noqa: F401  older code uses natten.context without importing it
from natten.backends import use_backend
from natten.functional import (
    merge_attentions,
    na1d,
    na1d_av,
    na1d_qk,
    na1d_qkvpacked,
    na2d,
    na2d_av,
    na2d_qk,
    na2d_qkvpacked,
    na3d,
    na3d_av,
    na3d_qk,
    na3d_qkvpacked,
)
from natten.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D

__version__ = "1.0.0"

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na1d_qkvpacked",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na2d_qkvpacked",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "na3d_qkvpacked",
    "use_backend",
]

_backends.read_environment()
_compat.install(_sys.modules[__name__])


def __dir__() -> list[str]:
    """Hide the names of older releases from completion."""
    return sorted(set(globals()) - set(_compat.__all__))
