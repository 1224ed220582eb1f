"""tools/flops.py: one table for registered models and for configs."""

import importlib.util
from pathlib import Path

import flops
import pytest

CONFIGS = Path(__file__).parents[2] / "configs"
needs_openmmlab = pytest.mark.skipif(
    importlib.util.find_spec("mmdet") is None, reason="the extra openmmlab is not installed"
)


def test_table_of_models(capsys):
    flops.main(["nat_mini", "dinat_large_384"])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert rows[0].split() == ["nat_mini", "224", "x", "224", "19.98", "M", "2.7", "G"]
    assert rows[1].split()[:6] == ["dinat_large_384", "384", "x", "384", "200.94", "M"]
    assert float(rows[1].split()[6]) == pytest.approx(89.7, rel=0.01)


def test_another_size(capsys):
    flops.main(["nat_mini", "--size", "448", "448"])
    assert float(capsys.readouterr().out.split()[-2]) == pytest.approx(4 * 2.7, rel=0.02)


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("nat_huge", ValueError, "'nat_huge' is neither a config"),
        ("nothing.py", FileNotFoundError, "there is no config nothing.py"),
    ],
)
def test_unknown(what, error, message):
    with pytest.raises(error, match=message):
        flops.main([what])


@needs_openmmlab
def test_config(capsys):
    flops.main([str(CONFIGS / "segmentation" / "nuclei_upernet_nat.py")])
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["nuclei_upernet_nat", "192", "x", "192"]
