"""tools/check_data.py: counts per class, problems, and pictures of samples."""

import check_data
import numpy as np
import pytest
from openmmlab_extra import MISSING
from PIL import Image


def write(path, color):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), color).save(path)


def test_folder(tmp_path, capsys):
    for name, count in (("cat", 12), ("dog", 2)):
        for index in range(count):
            write(tmp_path / "data" / "train" / name / f"{index}.png", (40 * index % 256, 80, 160))
    write(tmp_path / "data" / "val" / "cat" / "0.png", (0, 0, 0))
    check_data.main([str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    output = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.startswith(("cat", "dog"))}
    assert rows == {"cat": ["12", "1"], "dog": ["2", "0"]}
    assert output.count("Warning: ") == 2  # few dogs, and none for validation
    assert np.asarray(Image.open(tmp_path / "out" / "train.png")).std() > 10
    (tmp_path / "data" / "train" / "dog" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 image "):
        check_data.main([str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    assert "dog/0.png" in capsys.readouterr().out


def test_several_problems_are_listed(tmp_path, capsys):
    write(tmp_path / "data" / "train" / "cat" / "0.png", (0, 0, 0))
    (tmp_path / "data" / "train" / "cat" / "1.png").write_bytes(b"no image")
    write(tmp_path / "data" / "val" / "dog" / "0.png", (0, 0, 0))  # not a class of training
    with pytest.raises(ValueError, match="2 problems"):
        check_data.main([str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    output = capsys.readouterr().out
    assert all(f"\n- {start}" in output for start in (str(tmp_path / "data" / "val"), "1 image"))
    (tmp_path / "shapes" / "annotations").mkdir(parents=True)
    with pytest.raises(ValueError, match="shapes has labels for detection or segmentation"):
        check_data.main([str(tmp_path / "shapes"), "--out", str(tmp_path / "new")])
    with pytest.raises(FileNotFoundError):
        check_data.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(bool(MISSING), reason="requires the extra openmmlab")
@pytest.mark.parametrize("name", ["mask_rcnn", "upernet"])
def test_config(tmp_path, name, capsys, monkeypatch):
    import json
    from pathlib import Path

    import make_data

    monkeypatch.setattr(make_data, "_SHAPES_COUNTS", {"training": 4, "validation": 2})
    folder = tmp_path / "shapes"
    make_data.make_shapes(folder)
    config = Path(__file__).parents[2] / "configs" / "quickstart" / f"{name}.py"
    arguments = [str(config), "--data", str(folder), "--out", str(tmp_path / "out"), "--samples", "2"]
    check_data.main(arguments)
    output = capsys.readouterr().out
    if name == "mask_rcnn":
        coco = json.loads((folder / "instances_training.json").read_text())
        circles = sum(one["category_id"] == 1 for one in coco["annotations"])
        row = next(line for line in output.splitlines() if line.startswith("circle"))
        assert row.split()[2] == str(circles)
    else:
        shares = [line.split()[-1] for line in output.splitlines() if line.startswith("background")]
        labels = [np.asarray(Image.open(path)) for path in (folder / "annotations" / "training").iterdir()]
        assert float(shares[0].rstrip("%")) == pytest.approx(100 * np.mean([part == 1 for part in labels]), abs=0.01)
    pictures = list((tmp_path / "out").glob("*/*.jpg"))
    assert len(pictures) == 4
    assert all(np.asarray(Image.open(path)).std() > 10 for path in pictures)
    next((folder / ("images" if name == "mask_rcnn" else "annotations") / "training").iterdir()).unlink()
    with pytest.raises(FileNotFoundError):
        check_data.main(arguments)
