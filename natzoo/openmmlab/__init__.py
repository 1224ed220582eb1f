"""Detection and segmentation: the backbones for mmdet and mmseg, and what makes OpenMMLab run on today's PyTorch.

Importing this package registers all of it with mmengine, so a config needs one line:

    custom_imports = dict(imports=["natzoo.openmmlab"])
"""

import importlib.util

_NEEDED = ("mmengine", "mmcv", "mmdet", "mmseg", "torchvision", "pycocotools")
_missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(
        f"natzoo.openmmlab needs {', '.join(_missing)}, which the extra `openmmlab` brings: run "
        "`bash tools/setup.sh openmmlab`, or `pip install '.[openmmlab]'` in the checkout."
    )

from natzoo.openmmlab import stand_in  # noqa: E402

stand_in.install()  # before anything imports mmcv.ops

from natzoo.openmmlab.backbones import NAT, DiNAT_s  # noqa: E402

__all__ = ["NAT", "DiNAT_s"]
