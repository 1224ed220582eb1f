"""Data from strangers: nothing in it runs commands, leaves its folder, or exhausts memory or time."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import limited
from PIL import Image
from tar_files import tar_bytes

from natzoo.classification import train
from natzoo.classification.data.datasets import ImageDataset, RealLabelsDataset, ShardDataset, read_image
from natzoo.classification.data.pictures import Pictures
from natzoo.classification.data.readers import FolderReader, HubReader, TarReader, read_class_map, read_shards
from natzoo.classification.data.transforms import evaluation_transform
from natzoo.classification.distributed import World
from natzoo.classification.options import parse

PREDICT = str(Path(__file__).parents[2] / "classification" / "predict.py")
CLASSES = ["amber", "blue", "crimson"]


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert not list((tmp_path / "here").iterdir())


# ----- shards -----


@pytest.fixture
def info(shards):
    """A function that changes the training split of _info.json and opens it."""
    pytest.importorskip("webdataset")
    valid = json.loads((shards / "_info.json").read_text())

    def change(_text=None, schemes=(), **values):
        split = {**valid["splits"]["train"], **values}
        content = {"splits": {**valid["splits"], "train": split}}
        (shards / "_info.json").write_text(_text if _text is not None else json.dumps(content))
        return read_shards(str(shards), "train", schemes)

    return change


@pytest.mark.parametrize(
    "name",
    [
        *("pipe:touch OWNED; cat train-0000.tar", "PIPE:touch OWNED", "file:/etc/passwd", "https://localhost:1/a.tar"),
        *(
            "/etc/passwd",
            "../data/train-0000.tar",
            "a/../../x.tar",
            "~/x.tar",
            "/dev/zero",
            "",
            "-",
            None,
            3,
            ["a.tar"],
        ),
        *("train-0000.tar\0", "pipe:{touch,OWNED}", "train-{0000..0001}.tar", "x" * 5000, "missing.tar", "."),
    ],
)
def test_shards_are_files_in_the_folder(info, name):
    with pytest.raises((ValueError, FileNotFoundError), match=r"_info\.json.*'train'|_info\.json") as error:
        info(filenames=["train-0000.tar", name])
    assert len(str(error.value)) < 1500


def test_shards_are_not_devices(info, shards):
    os.mkfifo(shards / "fifo.tar")
    (shards / "zero.tar").symlink_to("/dev/zero")
    for name in ("fifo.tar", "zero.tar"):
        with pytest.raises(FileNotFoundError, match=name):
            info(filenames=[name])


def test_remote_shards_need_the_name_of_their_scheme(info, shards, tiny):
    with pytest.raises(ValueError, match="--allow-remote-shards https"):
        info(filenames=["https://localhost:1/a.tar"], schemes=["http"])
    assert info(filenames=["https://localhost:1/a.tar"], schemes=["https"]).urls == ["https://localhost:1/a.tar"]
    with pytest.raises(ValueError, match=r"DATA.*--allow-remote-shards pipe"):
        read_shards("pipe:touch OWNED", "train")
    with pytest.raises(ValueError, match="--allow-remote-shards pipe"):
        read_shards(str(shards), "pipe:touch OWNED; cat {0..3}.tar|10")
    command = f"pipe:cat {shards}/train-0000.tar"
    info(filenames=[command], schemes=["pipe"])
    options = tiny("--dataset", "wds", "--num-classes", "3", "--workers", "0", epochs=1)
    with pytest.raises(ValueError, match="--allow-remote-shards pipe"):
        train.main(options)
    assert train.main([*options, "--allow-remote-shards", "pipe"]) > 0


def test_recipes_cannot_allow_remote_shards(tmp_path):
    (tmp_path / "a.yml").write_text("allow_remote_shards: [pipe]\n")
    with pytest.raises(ValueError, match=r"a\.yml.*allow_remote_shards"):
        parse(["-c", str(tmp_path / "a.yml")])


@pytest.mark.parametrize(
    "text",
    [
        *("", "[", "[]", "null", "3", '"x"', "{}", '{"splits": []}', '{"splits": null}', '{"splits": {"train": null}}'),
        *('{"splits": {"train": []}}', '{"splits": {"val": {}}}', "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "NaN"),
    ],
)
def test_info_of_another_form(info, text):
    with pytest.raises(ValueError, match=r"_info\.json") as error:
        info(text)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("filenames", value) for value in (None, [], "train-0000.tar", {}, 3, ["train-0000.tar"] * 2)],
        ("filenames", ["train-0000.tar", "./train-0000.tar"]),
        *[("num_samples", value) for value in (None, "72", 0, -1, 10**15, 10**400, 7.5, True, [72], float("nan"))],
        *[("alt_label", value) for value in (3, ["a"], {"a": 1}, True)],
    ],
)
def test_values_of_info(info, key, value):
    if key == "num_samples" and isinstance(value, int) and value > 10**300:
        value = 10**300
    with pytest.raises(ValueError, match=rf"_info\.json, split 'train',.*{'train-0000' if value == 2 else ''}"):
        info(**{key: value})


def test_what_info_may_leave_out(info, shards):
    names = [f"train-{number:04d}.tar" for number in range(4)]
    text = json.dumps({"splits": {"train": {"filenames": names, "num_samples": 72}}})
    assert info("\ufeff" + text).urls == [str(shards / name) for name in names]
    assert read_shards(str(shards), "train-{0000..0003}.tar|72").urls == [str(shards / name) for name in names]
    assert read_shards(str(shards), "train-000{0,1}.tar::train-0003.tar|9").num_samples == 9
    (shards / "below").mkdir()
    (shards / names[0]).rename(shards / "below" / names[0])
    assert read_shards(str(shards), f"below/{names[0]}|18").urls == [str(shards / "below" / names[0])]


@pytest.mark.parametrize(
    "split", ["{0..999999999}.tar|9", "{0..9999}{0..9999}.tar|9", "train-{0000..0003}.tar", "a.tar|x"]
)
def test_split_patterns(shards, split):
    with limited(), pytest.raises(ValueError, match="split"):
        read_shards(str(shards), split)


def one_shard(folder, *samples):
    """Write a shard of samples {suffix: content}, and return the images of it that can be read, and the problems."""
    entries = {f"{number}.{key}": value for number, sample in enumerate(samples) for key, value in sample.items()}
    (folder / "s.tar").write_bytes(tar_bytes(entries))
    count = len(samples)
    dataset = ShardDataset(str(folder), f"s.tar|{count}", CLASSES, 1, 0, False, World())
    dataset.transform = lambda image: torch.zeros(1)
    dataset.set_workers(0)
    return [target for _, target in dataset], dataset.bad_images()


LABELS = [b"3", b"-1", b"amber", b"", b"1.5", b"9" * 5000, b"\xff", b"1e999", b"[1]", b"\x1b[31m"]


@pytest.mark.parametrize("label", LABELS, ids=range(len(LABELS)))
def test_labels_of_shards(shards, label):
    png = next(shards.parent.rglob("*.tar"))
    with tarfile.open(png) as tar:
        image = tar.extractfile(next(entry for entry in tar if entry.name.endswith(".png"))).read()
    targets, problems = one_shard(shards, {"png": image, "cls": b" 2\n"}, {"png": image, "cls": label}, {"png": image})
    assert targets == [2]
    assert len(problems) == 1 and f"{shards}/s.tar/1 " in problems[0]  # the first problem of each shard


@pytest.mark.parametrize(
    "content", [b"{}", b"[]", b"3", b'{"k": null}', b'{"k": [1]}', b'{"k": 1.0}', b"{" * 10**5, b"[" * 10**5]
)
def test_labels_in_json_files(shards, content):
    dataset = ShardDataset(str(shards), "train", CLASSES, 1, 0, False, World())
    dataset.shards = dataset.shards._replace(label_key="k")
    assert dataset._label({"json": b'{"k": 1}'}, "x") == dataset._label({"json": b'{"k": "1"}'}, "x") == 1
    with pytest.raises(ValueError, match=r"^x "):
        dataset._label({"json": content}, "x")


def test_label_beyond_the_classes_stops_the_run_before_the_loss(shards, tiny):
    pytest.importorskip("webdataset")
    options = tiny("--dataset", "wds", "--num-classes", "2", "--workers", "1", epochs=1)
    with pytest.raises(ValueError, match=r"train-000\d\.tar/crimson_\d+ .*class 2.*--skip-bad-images"):
        train.main(options)
    train.main([*options, "--skip-bad-images"])


# ----- tar files -----


def tar_of(path, **entries):
    path.write_bytes(tar_bytes(entries))
    return path


@pytest.mark.parametrize("name", ["../a/0.png", "a/../../b/0.png", "/a/0.png", "a/../0.png"])
def test_tar_members_stay_in_their_folder(data, tmp_path, name):
    image = (data / "val" / "blue" / "0.png").read_bytes()
    with pytest.raises(ValueError, match=r"x\.tar.*0\.png"):
        TarReader(tar_of(tmp_path / "x.tar", **{"b/1.png": image, name: image}))


@pytest.mark.parametrize(("depth", "is_read"), [(7, True), (8, False), (400, False)])
def test_nested_tar_files(data, tmp_path, depth, is_read):
    content = tar_of(tmp_path / "x.tar", **{"a/0.png": (data / "val/blue/0.png").read_bytes()}).read_bytes()
    for _ in range(depth):
        content = tar_of(tmp_path / "x.tar", **{"x.tar": content}).read_bytes()
    with limited():
        if is_read:
            assert TarReader(tmp_path / "x.tar").classes == ["a"]
        else:
            with pytest.raises(ValueError, match=r"x\.tar"):
                TarReader(tmp_path / "x.tar")


def test_tar_header_with_a_negative_size(data, tmp_path):
    image = (data / "val" / "blue" / "0.png").read_bytes()
    path = tar_of(tmp_path / "x.tar", **{"a/0.png": image, "a/1.png": image})
    content = bytearray(path.read_bytes())
    content[124:136] = (-1536).to_bytes(12, "big", signed=True)
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    path.write_bytes(content)
    with limited(), pytest.raises(ValueError, match=r"x\.tar"):
        TarReader(path)


# ----- folders and images -----


def test_fifos_are_not_read(data, tmp_path, capsys):
    os.mkfifo(data / "val" / "blue" / "fifo.png")
    os.mkfifo(tmp_path / "x.tar")
    os.mkfifo(tmp_path / "classes.txt")
    images = ImageDataset(FolderReader(data / "val"), lambda image: torch.zeros(1), replace=False)
    with limited():
        targets = [images[index][1] for index in range(len(images))]
        assert targets.count(-1) == 1
        assert str(data / "val" / "blue" / "fifo.png") in images.first_problem()
        with pytest.raises(FileNotFoundError, match=r"x\.tar"):
            TarReader(tmp_path / "x.tar")
        with pytest.raises(FileNotFoundError, match=r"classes\.txt"):
            read_class_map(str(tmp_path / "classes.txt"))
        with pytest.raises(ValueError, match=r"x\.tar"):
            Pictures([str(tmp_path / "x.tar")])


def test_fifo_in_a_hugging_face_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "table").mkdir()
    pictures = [{"bytes": None, "path": str(tmp_path / "x.png")}]
    datasets.Dataset.from_dict({"image": pictures, "label": [0]}).to_parquet(tmp_path / "table" / "train.parquet")
    images = ImageDataset(HubReader(str(tmp_path / "table"), "train", str(tmp_path / "cache"), ["a"]), replace=False)
    images.transform = lambda image: torch.zeros(1)
    with limited():
        assert images[0][1] == -1


def test_hugging_face_dataset_does_not_run_its_script(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "x.py").write_text(
        "open('OWNED', 'w')\nimport datasets\nclass X(datasets.GeneratorBasedBuilder): ...\n"
    )
    with pytest.raises(ValueError, match="hfds"):
        HubReader(str(tmp_path / "x"), "train", str(tmp_path / "cache"))


@pytest.mark.parametrize("size", [(1, 65535), (65535, 1), (2, 5000), (1, 300)])
def test_elongated_images(data, tmp_path, size):
    """Resizing the short side to 224 pixels would make 14 million pixels of the long side."""
    path = data / "val" / "blue" / "long.png"
    Image.new("RGB", size).save(path)
    images = ImageDataset(FolderReader(data / "val"), lambda image: torch.zeros(1), replace=False)
    with limited():
        assert [images[index][1] for index in range(len(images))].count(-1) == 1
        assert str(path) in images.first_problem() and str(max(size)) in images.first_problem()
        with pytest.raises(ValueError, match=r"long\.png.*\d x \d"):
            read_image(path)


def test_elongated_image_in_a_run(data, tiny):
    Image.new("RGB", (1, 60000)).save(data / "train" / "blue" / "long.png")
    Image.new("RGB", (60000, 1)).save(data / "val" / "amber" / "wide.png")
    options = tiny(epochs=1)
    with pytest.raises(ValueError, match=r"(long|wide)\.png.*--skip-bad-images"):
        train.main(options)
    train.main([*options, "--skip-bad-images"])


def test_images_of_ordinary_shapes(tmp_path):
    transform = evaluation_transform(
        {"input_size": [3, 32, 32], "crop_pct": 0.875, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    )
    for size in ((1, 1), (1, 200), (640, 3), (3000, 2000)):
        Image.new("RGB", size, "red").save(tmp_path / "a.png")
        assert transform(read_image(tmp_path / "a.png")).shape == (3, 32, 32)


def test_only_known_formats_are_decoded(tmp_path):
    """Pillow recognizes formats by content, and passes PostScript to another program."""
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"a\.jpg"):
        read_image(tmp_path / "a.jpg")


# ----- small files of text -----


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"a\na\n", b"a\n\nb\n", b"\xff\xfe\n", b"a\xe9\n", b" \n", b"a\n a \n"]
)
def test_class_maps_that_are_refused(tmp_path, content):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=r"classes\.txt"):
        read_class_map(str(tmp_path / "classes.txt"))


def test_class_map_with_a_byte_order_mark(tmp_path):
    for content in (b"\xef\xbb\xbfblue\r\namber\r\n", b"blue\namber", b"blue\namber\n"):
        (tmp_path / "classes.txt").write_bytes(content)
        assert read_class_map(str(tmp_path / "classes.txt")) == ["blue", "amber"]
    (tmp_path / "classes.txt").write_bytes("caf\u00e9\n\u6c34\n".encode())
    assert read_class_map(str(tmp_path / "classes.txt")) == ["caf\u00e9", "\u6c34"]


REAL_LABELS = [
    {},
    [],
    [3],
    [None],
    [["a"]],
    [[3]],
    [[-1]],
    [[0.5]],
    [[True]],
    [[0] * 9],
    [[10**30]],
    [[[0]]],
    "x",
    [{}],
]


@pytest.mark.parametrize("labels", REAL_LABELS, ids=map(str, REAL_LABELS))
def test_real_labels_that_are_refused(data, tmp_path, labels):
    (tmp_path / "real.json").write_text(json.dumps(labels))
    with pytest.raises(ValueError, match=r"--real-labels .*real\.json"):
        RealLabelsDataset(ImageDataset(FolderReader(data / "val")), str(tmp_path / "real.json"))


def test_every_picture_counts_once(data):
    reader = FolderReader(data / "train")
    (data / "train" / "blue" / "more").mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(data / "train" / "blue" / "more" / "x.png")
    (data / "train" / "blue" / "folder.png").mkdir()
    (data / "train" / "blue" / "link.png").symlink_to(data / "train" / "blue" / "0.png")
    (data / "train" / "blue" / "link").symlink_to(data / "train" / "amber")  # links to folders are not followed
    assert len(FolderReader(data / "train")) == len(reader) + 2
