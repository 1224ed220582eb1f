"""The embedded data set."""

import make_data
import numpy as np
import pytest
from PIL import Image


def test_digits(tmp_path, capsys):
    folder = tmp_path / "data" / "digits"
    make_data.main(["digits", str(folder)])
    for split, count in (("train", 1437), ("val", 360)):
        assert sorted(path.name for path in (folder / split).iterdir()) == [str(digit) for digit in range(10)]
        assert len(list((folder / split).rglob("*.png"))) == count
    with Image.open(folder / "val" / "0" / "0000.png") as image:
        assert image.size == (32, 32)
        assert np.asarray(image).std() > 50
    assert sorted(path.name for path in folder.parent.iterdir()) == ["digits"]

    make_data.main(["digits", str(folder)])
    assert "is there already; nothing was written" in capsys.readouterr().out


def test_unknown_name(tmp_path):
    with pytest.raises(SystemExit) as error:
        make_data.main(["wibble", str(tmp_path / "x")])
    assert error.value.code == 2
