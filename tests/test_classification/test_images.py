"""Folders of images, their order and their randomness."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from classification.images import FolderImages, evaluation_loader, split_folder, training_loader


def images_of(folder, **kwargs):
    transform = create_transform(
        16, is_training=True, scale=(0.3, 1.0), auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.5
    )
    return FolderImages(folder, kwargs.pop("classes", None), transform, **kwargs)


def batches(data, epoch, workers=0, seed=3):
    loader = training_loader(images_of(data / "train"), 8, workers, seed, pin_memory=False)
    loader.sampler.epoch = epoch
    return [(x.clone(), y.clone()) for x, y in loader]


def are_equal(one, other):
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))


def test_an_epoch_depends_on_seed_and_epoch_alone(data):
    expected = batches(data, epoch=2)
    np.random.seed(99)
    torch.manual_seed(99)
    assert are_equal(expected, batches(data, epoch=2))
    assert are_equal(expected, batches(data, epoch=2, workers=2))
    assert not are_equal(expected, batches(data, epoch=3))
    assert not are_equal(expected, batches(data, epoch=2, seed=4))


def test_loading_processes_that_live_on_follow_the_epoch(data):
    loader = training_loader(images_of(data / "train"), 8, 1, 3, pin_memory=False)
    for epoch in range(3):
        loader.sampler.epoch = epoch
        assert are_equal(list(loader), batches(data, epoch))


def test_an_epoch_shows_every_image_once(data):
    targets = torch.cat([y for _, y in batches(data, epoch=0)])
    assert targets.bincount().tolist() == [24, 24, 24]
    assert not torch.equal(targets, targets.sort().values)


def test_evaluation_is_in_order(data):
    loader = evaluation_loader(images_of(data / "val"), 4, 0, pin_memory=False)
    assert torch.cat([y for _, y in loader]).tolist() == [0] * 9 + [1] * 9 + [2] * 9


def test_classes_are_sorted_as_people_count(tmp_path):
    for name in ("10", "9", "1"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "a.png")
    assert images_of(tmp_path).classes == ["1", "9", "10"]


def test_classes_keep_the_numbers_of_training(data):
    images = images_of(data / "val", classes=["amber", "azure", "blue", "crimson"])
    assert {target for _, target in images.samples} == {0, 2, 3}


def test_unreadable_images(data):
    (data / "val" / "blue" / "0.png").write_bytes(b"no image")
    images = images_of(data / "val")
    assert images[9][1] == 1
    assert images.bad_images() == [str(data / "val" / "blue" / "0.png")]
    images = images_of(data / "val", replace=False)
    assert images[9][1] == -1
    assert images[10][1] == 1


def test_nothing_readable(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of the 1 images in"):
        images_of(tmp_path)[0]


def test_folders_that_are_wrong(data, tmp_path):
    with pytest.raises(FileNotFoundError, match="no data set was given"):
        split_folder(None, "train")
    with pytest.raises(FileNotFoundError, match=r"no data folder .*nowhere: it should hold train/"):
        split_folder(str(tmp_path / "nowhere"), "train")
    with pytest.raises(FileNotFoundError, match="has no folder test2"):
        split_folder(str(data), "test2")
    (data / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*empty holds no images: fill it or remove it"):
        images_of(data / "train")
    with pytest.raises(ValueError, match="a class 'blue', which the model was not trained on"):
        images_of(data / "val", classes=["amber", "crimson"])
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="holds no class folders"):
        images_of(tmp_path / "bare")


def test_other_names_of_splits(data):
    (data / "val").rename(data / "validation")
    assert split_folder(str(data), "val") == data / "validation"
    assert split_folder(str(data / "validation"), "val") == data / "validation"
