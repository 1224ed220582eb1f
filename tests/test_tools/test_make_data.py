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


# ----- other formats -----

CLASSES = ["circle", "square", "triangle"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A few drawn images, and their annotations of COCO."""
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_data, "_SHAPES_COUNTS", {"training": 4, "validation": 2})
        make_data.make_shapes(folder)
    return folder


def objects(folder, split):
    """Return image name -> list of (class, box) of a converted dataset."""
    coco = json.loads((folder / f"instances_{split}.json").read_text())
    names = {one["id"]: one["name"] for one in coco["categories"]}
    found = {image["file_name"]: [] for image in coco["images"]}
    images = {image["id"]: image["file_name"] for image in coco["images"]}
    for one in coco["annotations"]:
        found[images[one["image_id"]]].append((names[one["category_id"]], one["bbox"]))
    return found


def assert_same_objects(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name in expected:
        assert [label for label, _ in found[name]] == [label for label, _ in expected[name]]
        for (_, box), (_, other) in zip(found[name], expected[name], strict=True):
            assert box == pytest.approx(other, abs=tolerance)


def test_voc(shapes, tmp_path, capsys):
    source = tmp_path / "VOC"
    for part in ("JPEGImages", "Annotations", "SegmentationClass", "ImageSets/Main"):
        (source / part).mkdir(parents=True)
    for split, short in (("training", "train"), ("validation", "val")):
        names = []
        for name, found in objects(shapes, split).items():
            stem = f"{short}_{name[:-4]}"
            names.append(stem)
            (source / "JPEGImages" / f"{stem}.png").write_bytes((shapes / "images" / split / name).read_bytes())
            labels = np.asarray(Image.open(shapes / "annotations" / split / name)) - 1
            Image.fromarray(labels).save(source / "SegmentationClass" / f"{stem}.png")
            items = "".join(
                f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin>"
                f"<xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
                for label, (x, y, w, h) in found
            )
            (source / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{items}</annotation>")
        (source / "ImageSets" / "Main" / f"{short}.txt").write_text("\n".join(names))
    make_data.main(["voc", str(source), str(tmp_path / "mine"), "--maps"])
    expected = {f"train_{name}": found for name, found in objects(shapes, "training").items()}
    assert_same_objects(objects(tmp_path / "mine", "training"), expected, 1e-6)
    labels = Image.open(tmp_path / "mine" / "annotations" / "training" / "train_0000.png")
    assert (np.asarray(labels) == np.asarray(Image.open(shapes / "annotations" / "training" / "0000.png"))).all()
    assert f"classes = {['background', *CLASSES]!r}" in capsys.readouterr().out
    (source / "Annotations" / "val_0000.xml").write_text("<annotation><object>")
    with pytest.raises(ValueError, match=r"val_0000\.xml"):
        make_data.main(["voc", str(source), str(tmp_path / "other")])


@pytest.mark.parametrize("kind", ["boxes", "polygons"])
def test_yolo(shapes, tmp_path, kind):
    source = tmp_path / "yolo"
    for split, short in (("training", "train"), ("validation", "val")):
        coco = json.loads((shapes / f"instances_{split}.json").read_text())
        for image in coco["images"]:
            for part in ("images", "labels"):
                (source / part / short).mkdir(parents=True, exist_ok=True)
            name = image["file_name"]
            (source / "images" / short / name).write_bytes((shapes / "images" / split / name).read_bytes())
            lines = []
            for one in coco["annotations"]:
                if one["image_id"] == image["id"]:
                    x, y, w, h = one["bbox"]
                    values = [x + w / 2, y + h / 2, w, h] if kind == "boxes" else one["segmentation"][0]
                    lines.append(" ".join(map(str, (one["category_id"] - 1, *(value / 128 for value in values)))))
            (source / "labels" / short / name).with_suffix(".txt").write_text("\n".join(lines))
    (source / "data.yaml").write_text("names: [circle, square, triangle]\ntrain: images/train\nval: images/val\n")
    more = ["--maps"] if kind == "polygons" else ["--link"]
    make_data.main(["yolo", str(source), str(tmp_path / "mine"), *more])
    for split in ("training", "validation"):
        assert_same_objects(objects(tmp_path / "mine", split), objects(shapes, split), 1e-3)
    if kind == "polygons":
        pytest.importorskip("pycocotools")
        found = np.asarray(Image.open(tmp_path / "mine" / "annotations" / "training" / "0001.png"))
        drawn = np.asarray(Image.open(shapes / "annotations" / "training" / "0001.png"))
        assert (found == drawn).mean() > 0.97  # but for the edges
    else:
        assert (tmp_path / "mine" / "images" / "training" / "0000.png").is_symlink()
        (source / "labels" / "train" / "0002.txt").write_text("7 0.5 0.5 0.1 0.1\n")
        with pytest.raises(ValueError, match=r"0002\.txt.*1"):
            make_data.main(["yolo", str(source), str(tmp_path / "other")])


def test_coco_without_a_split(shapes, tmp_path):
    """A single file next to the images: every fifth image becomes validation data."""
    source = tmp_path / "coco"
    (source).mkdir()
    for image in (shapes / "images" / "training").iterdir():
        (source / image.name).write_bytes(image.read_bytes())
    content = json.loads((shapes / "instances_training.json").read_text())
    content["categories"] = [{"id": 10 * one["id"], "name": one["name"]} for one in content["categories"]]
    for one in content["annotations"]:
        one["category_id"] *= 10
    (source / "labels.json").write_text(json.dumps(content))
    make_data.main(["coco", str(source / "labels.json"), str(tmp_path / "mine")])
    found = {**objects(tmp_path / "mine", "training"), **objects(tmp_path / "mine", "validation")}
    assert list(objects(tmp_path / "mine", "validation")) == ["0000.png"]
    assert_same_objects(found, {name: objects(shapes, "training")[name] for name in found}, 1e-6)
    content["images"][0]["file_name"] = "../../secret.png"
    (source / "labels.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="secret"):
        make_data.main(["coco", str(source / "labels.json"), str(tmp_path / "other")])


def test_usage_of_conversions(tmp_path, capsys):
    for words in (["voc", str(tmp_path)], ["digits", str(tmp_path), str(tmp_path / "x")]):
        with pytest.raises(SystemExit) as error:
            make_data.main(words)
        assert error.value.code == 2
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        make_data.main(["voc", str(tmp_path), str(tmp_path / "x")])
