"""The model families, one a file."""

from natzoo.models.nat import NAT

__all__ = ["NAT"]
