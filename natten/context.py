"""The switches of older NATTEN releases, where older code imports them from; see natten/compat."""

from natten.compat import *  # noqa: F403
from natten.compat import SWITCHES

__all__ = list(SWITCHES)
