"""tools/make_data.py: the contents of both data sets."""

import json

import make_data
import numpy as np
import pytest
from PIL import Image


def test_digits(tmp_path):
    folder = tmp_path / "data" / "digits"
    make_data.main(["digits", str(folder)])
    for split, count in (("train", 1437), ("val", 360)):
        assert sorted(path.name for path in (folder / split).iterdir()) == [str(digit) for digit in range(10)]
        assert len(list((folder / split).rglob("*.png"))) == count
    with Image.open(folder / "val" / "0" / "0000.png") as image:
        assert image.size == (32, 32)
        assert np.asarray(image).std() > 50
    assert sorted(path.name for path in folder.parent.iterdir()) == ["digits"]

    (folder / "val" / "0" / "0000.png").unlink()
    make_data.main(["digits", str(folder)])  # an existing folder is left alone
    assert not (folder / "val" / "0" / "0000.png").exists()


def test_files_are_synced_to_disk(tmp_path, monkeypatch):
    from natzoo.checkpoints import write

    synced, sync = set(), write.sync
    monkeypatch.setattr(write, "sync", lambda path: (synced.add(path.name), sync(path)))
    monkeypatch.setattr(make_data, "_SHAPES_COUNTS", {"training": 2})
    make_data.main(["shapes", str(tmp_path / "shapes")])
    written = {path.name for path in (tmp_path / "shapes").rglob("*")}
    assert {"0000.png", "0001.png", "instances_training.json"} < written <= synced


def test_shapes(tmp_path):
    folder = tmp_path / "shapes"
    make_data.main(["shapes", str(folder)])
    for split, count in (("training", 192), ("validation", 32)):
        coco = json.loads((folder / f"instances_{split}.json").read_text())
        assert [category["name"] for category in coco["categories"]] == ["circle", "square", "triangle"]
        assert len(coco["images"]) == count
        assert len({one["id"] for one in coco["annotations"]}) == len(coco["annotations"]) > count
        for image in coco["images"]:
            with Image.open(folder / "images" / split / image["file_name"]) as picture:
                assert (picture.mode, picture.size) == ("RGB", (image["width"], image["height"]))
            with Image.open(folder / "annotations" / split / image["file_name"]) as picture:
                labels = np.asarray(picture)
            assert labels.min() == 1
            instances = [one for one in coco["annotations"] if one["image_id"] == image["id"]]
            assert set(np.unique(labels)) == {1} | {one["category_id"] + 1 for one in instances}
            for one in instances:
                x, y, width, height = one["bbox"]
                box = labels[round(y) : round(y + height) + 1, round(x) : round(x + width) + 1]
                # Shapes do not touch, so the pixels of its class in its box are those of the shape, including its edge.
                assert np.sum(box == one["category_id"] + 1) == pytest.approx(one["area"], rel=0.3)
    again = tmp_path / "again"
    make_data.main(["shapes", str(again)])
    for path in folder.rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(folder)).read_bytes()


def test_unknown_name(tmp_path):
    with pytest.raises(SystemExit) as error:
        make_data.main(["wibble", str(tmp_path / "x")])
    assert error.value.code == 2
