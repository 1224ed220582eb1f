"""Every Neighborhood Attention Transformer; importing this package registers them all with timm."""

from natten import __version__
from natzoo import models

__all__ = ["__version__", "models"]
