"""A resumed run notices that its images have changed, and does without its summary.csv."""

import shutil

import pytest
from PIL import Image
from tar_files import tar_bytes

from natzoo.checkpoints import read_checkpoint, write_checkpoint
from natzoo.classification import train
from natzoo.classification.data.readers import HubReader, TarReader
from natzoo.classification.options import parse


def swap(data):
    for one, other in (("amber/0.png", "x.png"), ("blue/0.png", "amber/0.png"), ("x.png", "blue/0.png")):
        (data / "train" / one).rename(data / "train" / other)


@pytest.mark.parametrize(
    ("change", "split"),
    [
        (lambda data: (data / "train/amber/0.png").rename(data / "train/amber/x.png"), "training"),
        (lambda data: (data / "train/amber/0.png").rename(data / "train/blue/x.png"), "training"),
        (swap, "training"),
        (lambda data: Image.new("RGB", (9, 9)).save(data / "train/amber/0.png"), "training"),
        (lambda data: shutil.rmtree(data / "val/crimson"), "validation"),
        (lambda data: (data / "val/amber/0.png").unlink(), "validation"),
    ],
    ids=["renamed", "moved", "swapped", "replaced", "class removed", "image removed"],
)
def test_resuming_with_changed_images_is_refused(data, tiny, tmp_path, run_folder, change, split):
    Image.new("RGB", (30, 30)).save(data / "train" / "amber" / "0.png")
    train.main(tiny(epochs=1))
    shutil.copytree(data, tmp_path / "copy")
    moved = tiny("--resume")
    moved[0] = str(tmp_path / "copy")
    train.Trainer(parse(moved)).log.close()  # the same images in another folder
    change(data)
    with pytest.raises(ValueError, match=rf"last\.pth has digest of .*{split} images"):
        train.main(tiny("--resume"))


def test_checkpoints_without_digests_resume(tiny, run_folder):
    train.main(tiny(epochs=1))
    state = read_checkpoint(run_folder / "last.pth")
    state["images"] = {"number of training images": 72}
    write_checkpoint(run_folder / "last.pth", state)
    train.main(tiny("--resume"))


def written(path, content):
    path.write_bytes(content)
    return path


def test_digests_of_readers_follow_their_images(data, tmp_path):
    image = (data / "val" / "blue" / "0.png").read_bytes()
    digests = {
        TarReader(written(tmp_path / "x.tar", tar_bytes(entries))).digest
        for entries in (
            {"a/0.png": image, "b/0.png": image},
            {"a/0.png": image, "b/1.png": image},
            {"a/0.png": image, "b/0.png": image + b"x"},
            {"a/0.png": image, "a/1.png": image},
        )
    }
    assert len(digests) == 4
    for name, classes in (("one", [0, 1]), ("two", [1, 0])):
        datasets = pytest.importorskip("datasets")
        (tmp_path / name).mkdir()
        pictures = [{"bytes": image, "path": None}] * 2
        table = datasets.Dataset.from_dict({"image": pictures, "label": classes})
        table.to_parquet(tmp_path / name / "train.parquet")
        digests.add(HubReader(str(tmp_path / name), "train", str(tmp_path / "cache"), ["a", "b"]).digest)
    assert len(digests) == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(",", ";"),
        lambda text: text.replace(",", "\t"),
        lambda text: "",
        lambda text: "\0" * 50,
        lambda text: text + "x,y\n",
        lambda text: text.replace("epoch", "Epoch"),
        lambda text: text[: len(text) // 2],
        lambda text: text.replace("1,", "one,"),
        lambda text: "\ufeff" + text,
        lambda text: '"' + text,
    ],
    ids=range(10),
)
def test_damaged_summary_does_not_stop_a_run(tiny, run_folder, change, caplog):
    train.main(tiny(epochs=1))
    path = run_folder / "summary.csv"
    text = path.read_text()
    damaged = change(text)
    path.write_text(damaged)
    train.main(tiny("--resume", epochs=2))
    lines = path.read_text().splitlines()
    assert lines[0] == text.splitlines()[0]
    assert lines[-1].startswith("1,")
    if "summary.csv" in caplog.text:
        assert path.with_suffix(".damaged.csv").read_text() == damaged
    else:
        assert len(lines) == 3 or not damaged
