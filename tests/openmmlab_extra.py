"""Whether the extra `openmmlab` is there, and pictures to try its configs on."""

import importlib.util
import os
from pathlib import Path

MISSING = [name for name in ("mmengine", "mmcv", "mmdet", "mmseg") if importlib.util.find_spec(name) is None]

# Where photographs in COCO's and ADE20K's layouts are: coco_ccby/ and coco_ade/. Without them drawn shapes serve.
PHOTOGRAPHS = Path(os.environ.get("NATTEN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def has_photographs() -> bool:
    return all((PHOTOGRAPHS / name).is_dir() for name in ("coco_ccby", "coco_ade"))


def description() -> str:
    """A line for the head of a run of tests."""
    if MISSING:
        return f"openmmlab: tests/test_openmmlab is left out, since {', '.join(MISSING)} is not installed"
    return f"openmmlab: configs are tried on {f'photographs of {PHOTOGRAPHS}' if has_photographs() else 'drawn shapes'}"
