"""Frozen features: k-nearest neighbors and a linear classifier, on digits, photographs of hands and drawn data."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small

from natzoo.checkpoints import write_weights
from natzoo.classification import probe
from natzoo.classification.probe import knn_accuracy, linear_accuracy

SIGN_DIGITS = Path(__file__).parents[3] / "shared" / "data" / "sign_digits"
TINY = ["--model", "nat_mini", "--model-kwargs", "depths=(1,1)", "num_heads=(1,2)", "embed_dim=16", "kernel_size=3"]
SMALL_IMAGES = ["--img-size", "32", "--crop-pct", "1", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """The first 400 digits of scikit-learn as folders: 300 to train, 100 to test."""
    from sklearn.datasets import load_digits

    root, data = tmp_path_factory.mktemp("digits"), load_digits()
    for index, (image, target) in enumerate(zip(data.images[:400], data.target, strict=False)):
        folder = root / ("val" if index % 4 == 0 else "train") / str(target)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 15).astype(np.uint8)).resize((32, 32)).save(folder / f"{index}.png")
    return root


def run(data, *words):
    torch.manual_seed(0)
    return probe.main([str(data), *words, *SMALL_IMAGES])


def test_digits(digits, tmp_path):
    """Random features of a small NAT recognize most digits, and the table holds what is returned."""
    row = run(digits, *TINY, "--random", "--results-file", str(tmp_path / "probe.csv"))
    assert (row["train_images"], row["test_images"], row["features"]) == (300, 100, 32)
    assert row["knn_top1"] > 60 and row["linear_top1"] > 60
    with (tmp_path / "probe.csv").open(newline="") as file:
        (written,) = csv.DictReader(file)
    assert written == {name: str(row[name]) for name in probe.COLUMNS}


def test_checkpoint(digits, tmp_path):
    """A checkpoint of another number of classes: its classifier is not used."""
    write_weights(tmp_path / "small.safetensors", small("nat_mini").state_dict())
    kwargs = ["--num-classes", "5", *TINY]
    row = run(digits, "--checkpoint", str(tmp_path / "small.safetensors"), *kwargs)
    assert row["features"] == 32 and row["knn_top1"] > 30


@pytest.mark.skipif(not SIGN_DIGITS.is_dir(), reason="the photographs of hands are not here")
def test_sign_digits():
    row = run(SIGN_DIGITS, *TINY, "--random")
    assert (row["train_images"], row["test_images"]) == (1653, 409)
    assert row["knn_top1"] > 20 and row["linear_top1"] > 20


def test_features_that_separate_classes():
    generator = np.random.default_rng(0)
    targets = np.arange(90) % 3
    features = np.eye(3)[targets] + 0.05 * generator.normal(size=(90, 3))
    train, test = (features[:60], targets[:60]), (features[60:], targets[60:])
    assert knn_accuracy(train, test, 5) == 100 and linear_accuracy(train, test) == 100
    noise = generator.normal(size=(2, 60, 3))
    train, test = (noise[0], targets[:60]), (noise[1], targets[:60])
    assert knn_accuracy(train, test, 5) < 70 and linear_accuracy(train, test) < 70


def test_nearer_neighbors_weigh_more():
    """One identical neighbor outvotes two distant ones."""
    train = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), np.array([0, 1, 1])
    assert knn_accuracy(train, (np.array([[1.0, 0.0]]), np.array([0])), 3) == 100


def test_refusals(digits, tmp_path):
    with pytest.raises(ValueError, match="--random"):
        run(digits, "--random", "--checkpoint", "x.pth")
    with pytest.raises(ValueError, match="DATA"):
        linear_accuracy((np.eye(4), np.arange(4)), (np.eye(4), np.arange(4)))
