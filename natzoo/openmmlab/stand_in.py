"""Lets modules be imported that mmdet and mmseg want and nobody can install: each finds a file of this folder.

`mmcv._ext` are mmcv's compiled operators: mmcv does not compile against today's PyTorch, and mmcv-lite is mmcv without
that one module. `panopticapi` is on no package index.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path

_FILES = {
    "mmcv._ext": "operators.py",
    "panopticapi": "panoptic.py",
    "panopticapi.evaluation": "panoptic.py",
    "panopticapi.utils": "panoptic.py",
}


class _Finder(MetaPathFinder):
    """Is asked last, so that what is really installed wins."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname not in _FILES:
            return None
        file = Path(__file__).with_name(_FILES[fullname])
        inside = [] if fullname == "panopticapi" else None  # a package, whose modules are found here too
        return importlib.util.spec_from_file_location(fullname, file, submodule_search_locations=inside)


def install() -> None:
    """Puts the stand-ins at the end of Python's finders, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
