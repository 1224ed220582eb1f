"""The model families, one a file."""

from natzoo.models.dinat_s import DiNAT_s
from natzoo.models.isotropic import Isotropic
from natzoo.models.nat import NAT

__all__ = ["NAT", "DiNAT_s", "Isotropic"]
