"""Lets `import mmcv._ext`, mmcv's compiled operators, find operators.py where nothing was compiled.

mmcv does not compile against today's PyTorch. mmcv-lite is mmcv without that one module.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path

_NAME = "mmcv._ext"
_OPERATORS = Path(__file__).with_name("operators.py")


class _Finder(MetaPathFinder):
    """Is asked last, so that a really compiled module wins."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(_NAME, _OPERATORS) if fullname == _NAME else None


def install() -> None:
    """Puts the stand-in at the end of Python's finders, once."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
