"""Model families; importing this package registers all models with timm."""

from natzoo.models.isotropic import Isotropic
from natzoo.models.nat import NAT, DiNAT, DiNAT_s

__all__ = ["NAT", "DiNAT", "DiNAT_s", "Isotropic"]
