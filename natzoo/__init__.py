"""Neighborhood Attention Transformers; importing this package registers all models with timm."""

from natten import __version__
from natzoo import models

__all__ = ["__version__", "models"]
