"""Readers on thousands of damaged copies of valid data: each call succeeds, or raises one line that names the file."""

import io
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mutations import check_reader, damaged_bytes, damaged_values
from PIL import Image
from tar_files import tar_bytes

from natzoo.classification.data.datasets import ImageDataset, RealLabelsDataset, ShardDataset, read_image
from natzoo.classification.data.readers import FolderReader, TarReader, open_reader, read_class_map, read_shards
from natzoo.classification.distributed import World
from natzoo.classification.logger import COLUMNS, RunLogger
from natzoo.classification.options import parse

pytestmark = pytest.mark.slow
COUNT = 2000
CLASSES = ["amber", "blue", "crimson"]
RECIPE = b"""# A recipe.
base: base.yml
model: nat_mini
model_kwargs: {depths: [1, 1], num_heads: [1, 2], embed_dim: 16, dilations: null}
epochs: 20
lr: 1.0e-3
scale: [0.5, 1.0]
opt_betas: &betas [0.9, 0.999]
mean: [0.5, 0.5, 0.5]
model_ema: true
amp: none
work_dir: output/x
"""


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    assert not list((tmp_path / "here").iterdir())


def assert_both(outcomes, count=COUNT):
    """Check that there were successes and refusals, and that none of the calls was left out."""
    assert outcomes["succeeded"] + outcomes["refused"] == count
    assert outcomes["succeeded"] > 0.01 * count < outcomes["refused"]


def written(path, read):
    """Return a function that writes its argument to a file and reads it."""

    def call(content):
        path.write_bytes(content)
        return read(path)

    return call


def test_info(shards):
    pytest.importorskip("webdataset")
    valid = json.loads((shards / "_info.json").read_text())
    valid["splits"]["train"]["alt_label"] = "label"
    read = written(shards / "_info.json", lambda path: read_shards(str(shards), "train"))
    contents = (json.dumps(value).encode() for value in damaged_values(valid, COUNT))
    assert_both(check_reader(read, contents, "_info.json"))
    assert_both(check_reader(read, damaged_bytes(json.dumps(valid).encode(), COUNT, seed=1), "_info.json"))


def test_recipe(tmp_path):
    (tmp_path / "base.yml").write_text("batch_size: 4\nmodel_kwargs: {mlp_ratio: 2}\n")
    read = written(tmp_path / "a.yml", lambda path: parse(["-c", str(path)]))
    assert_both(check_reader(read, damaged_bytes(RECIPE, COUNT), "a.yml"))


def test_class_map(tmp_path):
    read = written(tmp_path / "classes.txt", lambda path: read_class_map(str(path)))
    valid = "\n".join(["amber", "blue", "crimson", "caf\u00e9", *map(str, range(20))]).encode()
    assert_both(check_reader(read, damaged_bytes(valid, COUNT), "classes.txt"))


def test_real_labels(data, tmp_path):
    for number, image in enumerate(sorted((data / "val").rglob("*.png"))):
        image.rename(image.with_name(f"ILSVRC2012_val_{number + 1:08d}.png"))
    images = ImageDataset(FolderReader(data / "val"))
    read = written(tmp_path / "real.json", lambda path: RealLabelsDataset(images, str(path)))
    valid = [[number % 3] for number in range(27)] + [[], [0, 1, 2]]
    contents = (json.dumps(value).encode() for value in damaged_values(valid, COUNT))
    assert_both(check_reader(read, contents, "real"))


def test_summary(tmp_path):
    """It never stops a run."""
    rows = ["1,2.5,2.4,10,50,0.001,1.5,100,3.5,0", "2,2.4,2.3,20,60,0.001,1.5,100,3.5,0"]
    valid = "\n".join([",".join(COLUMNS), *rows, ""]).encode()
    values = dict.fromkeys(COLUMNS, 1)

    def log(path):
        logger = RunLogger(tmp_path, first_epoch=3)
        logger.log_epoch(1, **values)
        logger.close()
        shutil.rmtree(tmp_path / "tensorboard")
        assert path.read_text().splitlines()[0] == ",".join(COLUMNS)

    cases = list(damaged_bytes(valid, 300))
    assert check_reader(written(tmp_path / "summary.csv", log), cases, "summary.csv")["succeeded"] == 300


# ----- images and folders -----

SUFFIXES = {
    ".jpg": {"quality": 90},
    ".png": {},
    ".webp": {},
    ".bmp": {},
    ".gif": {},
    ".ppm": {},
    ".tif": {"compression": "tiff_lzw"},
}


def picture(suffix):
    pixels = np.random.default_rng(0).integers(0, 255, (12, 9, 3)).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, Image.registered_extensions()[suffix], **SUFFIXES[suffix])
    return content.getvalue()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.filterwarnings("ignore")
def test_images(tmp_path, suffix):
    read = written(tmp_path / f"a{suffix}", read_image)
    assert_both(check_reader(read, damaged_bytes(picture(suffix), COUNT), f"a{suffix}"))


def damage_folder(folder: Path, draw: random.Random) -> None:
    """Change one file or folder."""
    path = draw.choice([*sorted(folder.rglob("*")), folder / "train"])
    kind = draw.randrange(9)
    if kind in (0, 1, 2) and path.is_file() and not path.is_symlink():
        path.write_bytes(next(damaged_bytes(path.read_bytes(), 1, draw.randrange(10**6))))
        return
    name = draw.choice([b"\xff\xfe", b"\x1b[31m", b"a\nb", b"..x", b"-c", b" ", "\u202e".encode(), b"x" * 200])
    other = os.path.join(os.fsencode(path.parent), name + os.fsencode(path.suffix))
    if os.path.lexists(other) or not path.parent.is_dir():
        return
    if kind == 3:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    elif kind == 4:
        os.mkfifo(other)
    elif kind == 5:
        os.symlink(draw.choice([b"/dev/zero", b"/dev/null", b"missing", b"."]), other)
    elif kind == 6 and path.exists():
        os.rename(path, other)
    elif kind == 7:
        os.mkdir(other)
    elif kind == 8:
        Path(os.fsdecode(other)).write_bytes(draw.choice([b"", b"x", b"GIF89a", b"%!PS-Adobe-3.0"]))


def test_folder(tmp_path):
    def read(seed):
        draw = random.Random(seed)
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        for split, name in (("train", "a"), ("train", "b"), ("val", "a"), ("val", "b")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number, content in enumerate(contents):
                (tmp_path / "data" / split / name / f"{number}.png").write_bytes(content)
        for _ in range(draw.choice((1, 1, 2, 5))):
            damage_folder(tmp_path / "data", draw)
        for split in ("train", "val"):
            images = ImageDataset(open_reader("", str(tmp_path / "data"), split, None), torch.tensor, replace=False)
            images.transform = lambda image: torch.zeros(1)
            bad = [index for index in range(len(images)) if images[index][1] < 0]
            assert len(images.bad_images()) == len(bad)
            assert (images.first_problem() is None) == (not bad)

    contents = [picture(".png"), picture(".jpg")]
    # Names of files may have line breaks, which commands escape.
    assert_both(check_reader(lambda seed: one_line(read, seed), range(COUNT), "data"))


def one_line(read, value):
    try:
        return read(value)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(str(error).replace("a\nb", "a b")) from error


# ----- tar files -----


def test_tar(tmp_path):
    image = picture(".png")
    inner = tar_bytes({"b/0.png": image, "b/1.png": image})
    valid = tar_bytes({"a/0.png": image, "in.tar": inner, "c/" + "x" * 120 + ".png": image, "notes.txt": b"x"})

    def read(path):
        reader = TarReader(path)
        for index in range(len(reader)):
            try:
                read_image(reader[index][0], reader.filename(index))
            except ValueError as error:
                assert "x.tar" in str(error)

    assert_both(check_reader(written(tmp_path / "x.tar", read), damaged_bytes(valid, COUNT), "x.tar"))


def test_shard(tmp_path):
    pytest.importorskip("webdataset")
    image = picture(".jpg")
    valid = tar_bytes(
        {f"{number}.{suffix}": value for number in range(4) for suffix, value in (("jpg", image), ("cls", b"1"))}
    )
    found = set()

    def read(path):
        dataset = ShardDataset(str(tmp_path), "x.tar|4", CLASSES, 1, 0, False, World())
        dataset.transform = lambda image: torch.zeros(1)
        targets = [target for _, target in dataset]
        assert all(target in range(3) for target in targets)
        assert all(str(path) in problem for problem in dataset.bad_images())
        found.add((len(targets), len(dataset.bad_images())))

    outcomes = check_reader(written(tmp_path / "x.tar", read), damaged_bytes(valid, COUNT), "x.tar")
    assert outcomes["succeeded"] > 0.9 * COUNT  # only an empty file is refused; others lose images
    assert {(4, 0), (3, 1)} <= found
