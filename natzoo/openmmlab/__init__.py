"""NAT, DiNAT and DiNAT_s for mmdet and mmseg, on current PyTorch and without compiled mmcv.

Import this package before mmdet or mmseg. It registers the backbones with mmengine, lets mmengine load checkpoints by
published name, and provides two modules that mmdet and mmseg import but that cannot be installed:

- `mmcv._ext`, the compiled operators of mmcv: mmcv does not compile against current PyTorch, and mmcv-lite does not
  include them. operators.py implements them with torchvision.
- `panopticapi`, which is not on PyPI. panopticapi.py implements the parts that mmdet uses.

An installed module takes precedence over its replacement. A config needs a single line:

    custom_imports = dict(imports=["natzoo.openmmlab"])
"""

import importlib.util
import pkgutil
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path

_REQUIRED = ("mmengine", "mmcv", "mmdet", "mmseg", "torchvision", "pycocotools")
_missing = [name for name in _REQUIRED if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(
        f"natzoo.openmmlab requires {', '.join(_missing)}; install the extra with `bash tools/setup.sh openmmlab`, or "
        "with `pip install '.[openmmlab]'` in the checkout."
    )

_REPLACEMENTS = {
    "mmcv._ext": "operators.py",
    "panopticapi": "panopticapi.py",
    "panopticapi.evaluation": "panopticapi.py",
    "panopticapi.utils": "panopticapi.py",
}


class _ReplacementFinder(MetaPathFinder):
    """Find replacements for modules that are not installed."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname not in _REPLACEMENTS:
            return None
        file = Path(__file__).with_name(_REPLACEMENTS[fullname])
        submodules = [] if fullname == "panopticapi" else None  # an empty list marks a package
        return importlib.util.spec_from_file_location(fullname, file, submodule_search_locations=submodules)


sys.meta_path.append(_ReplacementFinder())  # last, so that an installed module is found first

if not hasattr(pkgutil, "find_loader"):  # removed in Python 3.14, but mmengine and mmcv call it

    def _find_loader(fullname: str):
        spec = importlib.util.find_spec(fullname)
        return None if spec is None else spec.loader

    pkgutil.find_loader = _find_loader

from natzoo.openmmlab import checkpoints  # noqa: E402, F401  lets mmengine load published names
from natzoo.openmmlab.backbones import NAT, DiNAT_s  # noqa: E402

__all__ = ["NAT", "DiNAT_s"]
