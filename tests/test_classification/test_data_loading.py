"""Datasets, the order of images, and their random augmentation."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from natzoo.classification.data.datasets import ImageDataset, read_image
from natzoo.classification.data.loader import create_evaluation_loader, create_training_loader, iterate_epoch
from natzoo.classification.data.readers import FolderReader, find_split
from natzoo.classification.data.transforms import training_transform
from natzoo.classification.distributed import World
from natzoo.classification.options import parse

CONFIG = {"input_size": [3, 16, 16], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def images_of(folder, classes=None, **kwargs):
    return ImageDataset(FolderReader(folder, classes), transform=lambda image: torch.zeros(1), **kwargs)


def loader_of(data, workers=0, seed=3, world=None):
    args = parse(["--batch-size", "8", "--scale", "0.3", "1", "--reprob", "0.5"])
    args.workers, args.seed = workers, seed
    return create_training_loader(args, images_of(data / "train"), CONFIG, world or World(), pin_memory=False)


def batches(data, epoch, first=0, **kwargs):
    return [(x.clone(), y.clone()) for x, y in iterate_epoch(loader_of(data, **kwargs), epoch, first)]


def are_equal(one, other):
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))


def test_batches_depend_only_on_seed_and_epoch(data):
    expected = batches(data, epoch=2)
    np.random.seed(99)
    torch.manual_seed(99)
    assert are_equal(expected, batches(data, epoch=2))
    assert are_equal(expected, batches(data, epoch=2, workers=2))
    assert not are_equal(expected, batches(data, epoch=3))
    assert not are_equal(expected, batches(data, epoch=2, seed=4))


def test_persistent_workers_follow_the_epoch(data):
    loader = loader_of(data, workers=1)
    for epoch in range(3):
        assert are_equal(list(iterate_epoch(loader, epoch, 0)), batches(data, epoch))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_epoch_can_start_at_any_batch(data, workers):
    assert are_equal(batches(data, epoch=1)[4:], batches(data, epoch=1, first=4, workers=workers))
    assert batches(data, epoch=1, first=9) == []


def test_processes_take_the_batches_of_an_epoch_in_turn(data):
    alone = batches(data, epoch=1)
    shares = [batches(data, epoch=1, world=World(rank, 2, rank, 2)) for rank in range(2)]
    assert [len(share) for share in shares] == [4, 4]
    assert are_equal(alone[:8], [batch for pair in zip(*shares, strict=True) for batch in pair])
    assert are_equal(shares[1][3:], batches(data, epoch=1, first=3, world=World(1, 2, 1, 2)))


def test_epoch_has_every_image_once(data):
    targets = torch.cat([y for _, y in batches(data, epoch=0)])
    assert targets.bincount().tolist() == [24, 24, 24]
    assert not torch.equal(targets, targets.sort().values)


def test_evaluation_is_in_order(data):
    loader = create_evaluation_loader(images_of(data / "val"), 4, 0, pin_memory=False)
    assert torch.cat([y for _, y in loader]).tolist() == [0] * 9 + [1] * 9 + [2] * 9


def test_processes_share_the_evaluation(data):
    shares = [
        create_evaluation_loader(images_of(data / "val"), 4, 0, False, World(rank, 2, rank, 2)) for rank in range(2)
    ]
    counts = [torch.cat([y for _, y in share]).bincount() for share in shares]
    assert [count.sum().item() for count in counts] == [14, 13]
    assert sum(counts).tolist() == [9, 9, 9]


def test_classes_are_in_natural_order(tmp_path):
    for name in ("10", "9", "1"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    assert images_of(tmp_path).classes == ["1", "9", "10"]


def test_classes_keep_their_training_numbers(data):
    images = images_of(data / "val", classes=["amber", "azure", "blue", "crimson"])
    assert {images.reader[index][1] for index in range(len(images))} == {0, 2, 3}


def test_unreadable_images(data):
    (data / "val" / "blue" / "0.png").write_bytes(b"no image")
    images = images_of(data / "val")
    assert images[9][1] == 1
    assert images.bad_images() == [str(data / "val" / "blue" / "0.png")]
    images = images_of(data / "val", replace=False)
    assert images[9][1] == -1
    assert images[10][1] == 1


def test_16_bit_gray_images(tmp_path):
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "deep.png")), gray[..., None].repeat(3, 2))
    Image.fromarray(gray.astype(np.int32)).save(tmp_path / "deeper.tif")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "deeper.tif")), gray[..., None].repeat(3, 2))


def test_no_readable_image(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=str(tmp_path)):
        images_of(tmp_path)[0]


def test_posterize_to_zero_bits():
    """RandAugment of the published recipes draws it; Pillow 13 refuses it."""
    args = parse(["--aa", "rand-m10-inc1-n20-p1.0", "--hflip", "0"])
    transform = training_transform(args, {**CONFIG, "mean": [0.0] * 3, "std": [1.0] * 3})
    image = Image.fromarray(np.full((16, 16, 3), 200, dtype=np.uint8))
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    made = [transform(image) for _ in range(50)]
    assert any((x == 0).all() for x in made)


def test_wrong_folders(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="DATA"):
        find_split(None, "train")
    with pytest.raises(FileNotFoundError, match=r"nowhere.*train/"):
        find_split(str(tmp_path / "nowhere"), "train")
    with pytest.raises(FileNotFoundError, match="test2"):
        find_split(str(data), "test2")
    (data / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="empty"):
        images_of(data / "train")
    with pytest.raises(ValueError, match="'blue'"):
        images_of(data / "val", classes=["amber", "crimson"])
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="bare"):
        images_of(tmp_path / "bare")


def test_alternative_split_names(data):
    (data / "val").rename(data / "validation")
    assert find_split(str(data), "val") == data / "validation"
    assert find_split(str(data / "validation"), "val") == data / "validation"
