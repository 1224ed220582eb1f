"""Images from tar files, Hugging Face datasets and webdataset shards, and noise."""

import importlib.util
import itertools
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from natzoo.checkpoints import read_checkpoint
from natzoo.classification import train, validate
from natzoo.classification.data.datasets import ImageDataset, ShardDataset
from natzoo.classification.data.readers import FolderReader, HubReader, TarReader, open_reader, read_class_map
from natzoo.classification.distributed import World

CLASSES = ["amber", "blue", "crimson"]


def pack(folder, path, pattern="*.png"):
    """Write a tar file with the content of a folder."""
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob(pattern)):
            tar.add(file, file.relative_to(folder))


@pytest.fixture
def tars(data):
    """One tar file per split; the folders are removed."""
    for split in ("train", "val"):
        pack(data / split, data / f"{split}.tar")
        shutil.rmtree(data / split)
    return data


def test_tar_files_have_the_images_of_the_folders(data, tmp_path):
    folder = FolderReader(data / "train")
    pack(data / "train", tmp_path / "all.tar")
    many = tmp_path / "many"
    many.mkdir()
    for name in CLASSES:
        pack(data / "train" / name, many / f"{name}.tar")
    pack(many, tmp_path / "nested.tar", "*.tar")
    for root in (tmp_path / "all.tar", many, tmp_path / "nested.tar"):
        tar = open_reader("", str(root), "val", None)
        assert isinstance(tar, TarReader)
        assert tar.classes == CLASSES
        contents = {(file.read(), target) for file, target in (tar[index] for index in range(len(tar)))}
        assert contents == {
            (Path(path).read_bytes(), target) for path, target in map(folder.__getitem__, range(len(folder)))
        }
    assert "0.png" in tar.filename(0)
    assert "blue" in TarReader(many, ["blue", "amber", "crimson"]).filename(0)


def test_wrong_tar_files(data, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(ValueError, match=r"a\.tar"):
        TarReader(tmp_path / "a.tar")
    pack(data / "train", tmp_path / "b.tar")
    with pytest.raises(ValueError, match=r"b\.tar.*'amber'"):
        TarReader(tmp_path / "b.tar", ["blue", "crimson", "zinc"])
    pack(data / "train" / "blue", tmp_path / "d.tar")
    with pytest.raises(ValueError, match=r"d\.tar.*0\.png"):
        TarReader(tmp_path / "d.tar")
    pack(data / "train", tmp_path / "c.tar", "*.txt")
    with pytest.raises(ValueError, match=r"c\.tar"):
        TarReader(tmp_path / "c.tar")


def test_truncated_tar_files(data, tmp_path):
    """Between entries, within a header or an image, before the end-of-archive marker, and nested."""
    pack(data / "train", tmp_path / "whole.tar")
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        entry = [entry for entry in tar if entry.name.endswith(".png")][40]
        tar.getmembers()
        end = tar.offset
    for cut in (entry.offset, entry.offset + 100, entry.offset_data + 100, end):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cut\.tar"):
            TarReader(tmp_path / "cut.tar")
        pack(tmp_path, tmp_path / "nested.tar", "cut.tar")
        with pytest.raises(ValueError, match=r"nested\.tar"):
            TarReader(tmp_path / "nested.tar")


def test_all_image_formats(tmp_path):
    (tmp_path / "a").mkdir()
    suffixes = [".jpg", ".JPEG", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif"]
    for suffix in suffixes:
        Image.new("RGB", (4, 4), "red").save(tmp_path / "a" / f"picture{suffix}")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    images = ImageDataset(FolderReader(tmp_path), lambda image: image.getpixel((0, 0))[0] > 250)
    assert [images[index] for index in range(len(images))] == [(True, 0)] * len(suffixes)
    pack(tmp_path, tmp_path / "a.tar", "a/*")
    assert len(TarReader(tmp_path / "a.tar")) == len(suffixes)


def test_tar_file_next_to_class_folders_is_ignored(data):
    (data / "train" / "spare.tar").write_bytes(b"")
    assert isinstance(open_reader("", str(data), "train", None), FolderReader)
    with pytest.raises(ValueError, match=r"train/spare\.tar"):
        open_reader("tar", str(data), "train", None)


def test_training_and_evaluation_on_tar_files(tars, tiny, run_folder):
    train.main(tiny("--workers", "1", epochs=1))
    result = validate.main([str(tars), "--checkpoint", str(run_folder / "best.pth"), "--workers", "0"])
    assert result["top1"] == pytest.approx(read_checkpoint(run_folder / "best.pth")["best"])
    assert result["count"] == 27


def test_training_tar_files_are_not_used_for_validation(tars):
    (tars / "val.tar").unlink()
    with pytest.raises(FileNotFoundError, match="val"):
        open_reader("", str(tars), "val", None)


def test_class_maps(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("crimson\nblue\n")
    assert read_class_map(str(path)) == ["crimson", "blue"]
    assert read_class_map(None) is None
    path.write_text("crimson\ncrimson\n")
    with pytest.raises(ValueError, match=r"classes\.txt"):
        read_class_map(str(path))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        read_class_map(str(tmp_path / "nowhere.txt"))
    pickle = tmp_path / "classes.pkl"
    pickle.write_bytes(b"")
    with pytest.raises(ValueError, match=r"classes\.pkl"):
        read_class_map(str(pickle))


def test_class_map_sets_the_class_numbers(data, tiny, run_folder, tmp_path):
    (tmp_path / "classes.txt").write_text("crimson\nzinc\nblue\namber\n")
    train.main(tiny("--class-map", tmp_path / "classes.txt", epochs=1))
    assert read_checkpoint(run_folder / "last.pth")["record"]["classes"] == ["crimson", "zinc", "blue", "amber"]


def test_unknown_data(data, tiny):
    with pytest.raises(ValueError, match="--dataset wibble/x"):
        train.main(tiny("--dataset", "wibble/x"))


def test_synthetic_images_need_no_data(tiny, run_folder):
    train.main([*tiny("--synthetic", "20", "--num-classes", "4", epochs=1)[1:]])
    with pytest.raises(ValueError, match="--synthetic"):
        train.main(tiny("--synthetic", "20", "--experiment", "other"))
    assert read_checkpoint(run_folder / "last.pth")["record"]["num_classes"] == 4


def test_hugging_face_datasets(data, tiny, run_folder):
    pytest.importorskip("datasets")
    reader = HubReader(str(data), "train")
    assert reader.classes == CLASSES
    assert len(reader) == 72
    train.main(tiny("--dataset", f"hfds/{data}", "--val-split", "validation", epochs=1)[1:])
    assert read_checkpoint(run_folder / "last.pth")["record"]["classes"] == CLASSES
    with pytest.raises(ValueError, match="wibble"):
        HubReader(str(data), "wibble")


@pytest.fixture
def table(data, tmp_path):
    """A function that writes a dataset with the given labels, without class names, in columns `picture` and `kind`."""
    datasets = pytest.importorskip("datasets")

    def write(labels):
        pictures = [
            None if label is None else {"bytes": (data / "val" / "blue" / "0.png").read_bytes(), "path": None}
            for label in labels
        ]
        folder = tmp_path / f"table-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        columns = {"picture": pictures, "kind": [label or 0 for label in labels]}
        datasets.Dataset.from_dict(columns).to_parquet(folder / "train.parquet")
        return HubReader(str(folder), "train", str(tmp_path / "cache"), *given, columns=("picture", "kind"))

    given = []
    write.given = given
    return write


def test_hugging_face_datasets_without_class_names(table):
    with pytest.raises(ValueError, match="--class-map"):
        table([0, 1, 2])
    table.given[:] = [["amber", "blue", "crimson"]]
    assert [target for _, target in map(table([2, 1, 1]).__getitem__, range(3))] == [2, 1, 1]
    with pytest.raises(ValueError, match="class 3"):
        table([0, 3])
    reader = table([1, None])
    with pytest.raises(ValueError, match="row 1"):
        reader[1]
    assert reader.filename(1).endswith("[train] image 1")


def test_class_map_renumbers_a_hugging_face_dataset(data):
    pytest.importorskip("datasets")
    reader = HubReader(str(data), "validation", classes=["zinc", "crimson", "blue", "amber"])
    found = {Path(reader.filename(index)).parent.name: reader[index][1] for index in range(len(reader))}
    assert found == {"crimson": 1, "blue": 2, "amber": 3}
    with pytest.raises(ValueError, match="'amber'"):
        HubReader(str(data), "validation", classes=["crimson", "blue"])
    with pytest.raises(ValueError, match="--target-key kind"):
        HubReader(str(data), "train", columns=("image", "kind"))


def test_webdataset_shards(shards, tiny, run_folder, tmp_path, stop_after):
    """A run that resumes within an epoch ends with the result of an uninterrupted one."""
    pytest.importorskip("webdataset")
    options = ["--dataset", "wds", "--num-classes", "3", "--workers", "1", "--mixup", "0.8"]
    train.main(tiny(*options, "--output", tmp_path / "uninterrupted", epochs=2))
    stop_after(13, tiny(*options, epochs=2))
    assert read_checkpoint(run_folder / "last.pth")["epoch"] == 1
    assert read_checkpoint(run_folder / "last.pth")["update"] > 0
    train.main(tiny(*options, "--resume", epochs=2))
    one, other = (read_checkpoint(folder / "last.pth") for folder in (tmp_path / "uninterrupted" / "tiny", run_folder))
    torch.testing.assert_close(one["model"], other["model"], rtol=0, atol=0)
    train.Trainer(train.parse(tiny(*options, "--workers", "2", "--resume", epochs=3)))  # at the end of an epoch
    stop_after(5, tiny(*options, "--resume", epochs=3))
    with pytest.raises(ValueError, match=r"--workers.*1.*2"):
        train.main(tiny(*options, "--workers", "2", "--resume", epochs=3))
    argv = [str(shards), "--checkpoint", str(run_folder / "last.pth"), "--dataset", "wds", "--workers", "0"]
    assert validate.main(argv)["count"] == 27
    with pytest.raises(ValueError, match="--real-labels"):
        validate.main([*argv, "--real-labels"])


def first_pixel(image):
    """Return the first pixel; at module level, because workers that are not forked unpickle it by name."""
    return torch.tensor(image.getpixel((0, 0)))


def shares(data, split, size, workers, is_training=False, epoch=0):
    """Return the images and targets of each process."""
    pytest.importorskip("webdataset")
    found = []
    for rank in range(size):
        images = ShardDataset(str(data), split, CLASSES, 4, 0, is_training, World(rank, size, rank, size))
        images.transform = first_pixel
        images.set_workers(workers)
        images.set_epoch(epoch)
        batches = torch.utils.data.DataLoader(images, 4, num_workers=workers)
        found.append([(tuple(x.tolist()), y.item()) for xs, ys in batches for x, y in zip(xs, ys, strict=True)])
    return found


@pytest.mark.parametrize(("size", "workers"), [(2, 0), (3, 0), (8, 0), (1, 2)])
def test_processes_share_the_shards_in_evaluation(shards, size, workers):
    found = shares(shards, "val", size, workers)
    assert sum(map(len, found)) == 27
    assert sorted(itertools.chain(*found)) == sorted(*shares(shards, "val", 1, 0))


def test_processes_get_equally_many_images_in_training(shards):
    found = shares(shards, "train", 2, 0, is_training=True)
    assert [len(share) for share in found] == [36, 36]
    assert len(set(itertools.chain(*found))) == len(set(*shares(shards, "train", 1, 0)))
    assert found != shares(shards, "train", 2, 0, is_training=True, epoch=1)
    with pytest.raises(ValueError, match=r"4 shards.*--workers"):
        shares(shards, "train", 3, 2, is_training=True)


def test_damaged_shards_are_named_or_skipped(shards, tiny, run_folder, capsys):
    """One shard has a damaged image, another one is truncated."""
    pytest.importorskip("webdataset")
    for number, change in ((0, lambda file: file.write(bytes(100))), (2, lambda file: file.truncate())):
        with tarfile.open(shards / f"train-000{number}.tar") as tar:
            entry = [entry for entry in tar if entry.name.endswith(".png")][number]
        with (shards / f"train-000{number}.tar").open("r+b") as file:
            file.seek(entry.offset_data + number)
            change(file)
    options = tiny("--dataset", "wds", "--num-classes", "3", "--batch-size", "24", epochs=1)
    with pytest.raises(ValueError, match=r"train-000.*--skip-bad-images"):
        train.main(options)
    train.main([*options, "--skip-bad-images"])
    output = capsys.readouterr().out
    assert f"{shards}/train-0000.tar/amber_0" in output
    assert f"{shards}/train-0002.tar" in output


def test_missing_requirements_of_shards(shards, tiny, monkeypatch):
    find = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == "webdataset" else find(name))
        with pytest.raises(ValueError, match=r"--dataset wds.*webdataset"):
            train.main(tiny("--dataset", "wds", "--num-classes", "3"))
    pytest.importorskip("webdataset")
    whole = (shards / "_info.json").read_text()
    (shards / "_info.json").write_text(whole.replace('"filenames"', '"files"'))
    with pytest.raises(ValueError, match=r"_info\.json.*filenames"):
        train.main(tiny("--dataset", "wds", "--num-classes", "3"))
    (shards / "_info.json").write_text(whole)
    with pytest.raises(ValueError, match="--class-map"):
        train.main(tiny("--dataset", "wds"))
