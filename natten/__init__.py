"""Neighborhood attention for PyTorch: 1-D, 2-D and 3-D, with dilation, stride, causal axes and relative position bias.

Functions: `na1d`, `na2d`, `na3d`, each also with `_qkvpacked`, `_qk` and `_av`; `merge_attentions`.
Layers: `NeighborhoodAttention1D`, `NeighborhoodAttention2D`, `NeighborhoodAttention3D`.
"""

from natten import backends as _backends
from natten import compat, context, functional  # noqa: F401  older code finds natten.context there
from natten.backends import use_backend
from natten.functional import *  # noqa: F403
from natten.modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from natten.version import __version__

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "use_backend",
    *functional.__all__,
]

_backends.read_environment()


def __getattr__(name: str):
    """Names of older releases, such as `natten.has_cuda`; see natten/compat.py."""
    return compat.old_name(__name__, name)
