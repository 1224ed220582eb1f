"""These tests need the extra `openmmlab`; where it is not installed none is collected, and the run says so."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("mmengine", "mmcv", "mmdet", "mmseg") if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if MISSING else []


def pytest_report_header():
    if MISSING:
        return f"openmmlab: tests/test_openmmlab is left out, since {', '.join(MISSING)} is not installed"
    return "openmmlab: installed"


@pytest.fixture(autouse=True)
def _forget_other_tests():
    from runs import forget

    forget()
    yield
    forget()


@pytest.fixture
def shapes(tmp_path):
    """A few pictures of shapes, as tools/make_data.py draws them."""
    sys.path.insert(0, str(ROOT / "tools"))
    import make_data

    counts = dict(make_data._SHAPES_COUNTS)
    make_data._SHAPES_COUNTS.update(training=6, validation=3)
    try:
        make_data.make_shapes(tmp_path / "shapes")
    finally:
        make_data._SHAPES_COUNTS.update(counts)
    return tmp_path / "shapes"
