"""Whether the extra `openmmlab` is installed, and which images its tests use."""

import importlib.util
import os
from pathlib import Path

MISSING = [name for name in ("mmengine", "mmcv", "mmdet", "mmseg") if importlib.util.find_spec(name) is None]

# Folder with photographs in the layouts of COCO (coco_ccby/) and ADE20K (coco_ade/). Without it, drawn shapes are used.
PHOTOGRAPHS = Path(os.environ.get("NATTEN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def has_photographs() -> bool:
    return all((PHOTOGRAPHS / name).is_dir() for name in ("coco_ccby", "coco_ade"))


def description() -> str:
    """Return a line for the header of a test run."""
    if MISSING:
        return f"openmmlab: tests/test_openmmlab is not collected because {', '.join(MISSING)} is not installed"
    return (
        f"openmmlab: configs are tested on {f'photographs in {PHOTOGRAPHS}' if has_photographs() else 'drawn shapes'}"
    )
