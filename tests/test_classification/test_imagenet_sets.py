"""ImageNet's other test sets, drawn as folders of images whose color is the class."""

from __future__ import annotations

import csv
import json
import pkgutil

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from natzoo.classification import imagenet_sets, validate
from natzoo.classification.imagenet_sets import (
    ALEXNET_ERRORS,
    SETS,
    ClassSubset,
    add_differences,
    class_numbers,
    mean_corruption_error,
    parse_set,
    timm_lines,
)

SYNSETS = timm_lines("imagenet_synsets")


class ColorModel(nn.Module):
    """Predicts the class that the color of an image encodes; see `draw`."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = timm.get_pretrained_cfg("nat_mini").to_dict()
        self.num_classes = 1000
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x_BCHW):
        mean, std = (torch.tensor(self.pretrained_cfg[key]) for key in ("mean", "std"))
        digit_B3 = ((x_BCHW.mean((2, 3)) * std + mean) * 255 / 25).round().long().clamp(0, 9)
        number_B = digit_B3 @ torch.tensor([100, 10, 1])
        return nn.functional.one_hot(number_B, 1000).float()


def draw(folder, number, name="a.png"):
    """Draw an image whose color has the three digits of a number."""
    folder.mkdir(parents=True, exist_ok=True)
    color = tuple(25 * (number // 10**power % 10) for power in (2, 1, 0))
    Image.new("RGB", (8, 8), color).save(folder / name)


@pytest.fixture
def model(monkeypatch):
    """The model that validate.py loads, whatever its options name."""
    model = ColorModel().eval()
    monkeypatch.setattr(validate, "load_everywhere", lambda *_: (model, {"classes": None, "preprocessing": {}}))
    return model


def run(tmp_path, *sets):
    words = ["--model", "nat_mini", "--pretrained", "--device", "cpu", "--workers", "0", "--batch-size", "8"]
    validate.main([*words, "--sets", *sets, "--results-dir", str(tmp_path / "out")])
    tables = {}
    for path in (tmp_path / "out").glob("*.csv"):
        with path.open(newline="") as file:
            tables[path.stem.removeprefix("results-")] = list(csv.DictReader(file))
    return tables


def test_sets_with_some_of_the_classes(tmp_path, model):
    """A wrong class outside of the 200 does not count, and ImageNet's folder serves as the clean set."""
    classes = [SYNSETS.index(name) for name in timm_lines("imagenet_a_synsets")]
    other = next(number for number in range(1000) if number not in classes)
    draw(tmp_path / "a" / SYNSETS[classes[5]], classes[5])
    draw(tmp_path / "a" / SYNSETS[classes[150]], classes[5])  # wrong
    for number in (classes[5], other):
        draw(tmp_path / "val" / SYNSETS[number], number)
    tables = run(tmp_path, f"a={tmp_path / 'a'}", f"a-clean={tmp_path / 'val'}", f"imagenet={tmp_path / 'val'}")
    assert {name: float(table[0]["top1"]) for name, table in tables.items()} == {
        "imagenet-a": 50,
        "imagenet-a-clean": 100,
        "imagenet": 100,
    }
    assert tables["imagenet-a"][0]["top1_diff"] == "-50.000" and tables["imagenet-a"][0]["rank_diff"] == "0"
    assert "| nat_mini | 50.0 | 100.0 | 100.0 |" in (tmp_path / "out" / "table.md").read_text()
    assert tuple(tables["imagenet-a"][0]) == imagenet_sets.SET_COLUMNS
    assert tuple(tables["imagenet"][0]) == imagenet_sets.SET_COLUMNS[:9]


def test_numbered_folders(tmp_path, model):
    """ImageNet-V2 numbers its folders; their names do not sort like numbers."""
    for number in (2, 10, 999):
        draw(tmp_path / "v2" / str(number), number)
    assert float(run(tmp_path, f"v2={tmp_path / 'v2'}")["imagenetv2-matched-frequency"][0]["top1"]) == 100


def test_real_labels(tmp_path, model):
    labels = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))
    index, label = next((index, found[1]) for index, found in enumerate(labels) if len(found) > 1)
    draw(tmp_path / "val" / SYNSETS[0], label, f"ILSVRC2012_val_{index + 1:08d}.png")  # the second of its labels
    assert float(run(tmp_path, f"real={tmp_path / 'val'}")["imagenet-real"][0]["top1"]) == 100


def test_corruptions(tmp_path, model):
    for index, name in enumerate(ALEXNET_ERRORS):
        for severity in range(1, 6):
            folder = tmp_path / "c" / f"category{index % 3}" / name / str(severity)
            draw(folder / SYNSETS[7], 7)
            draw(folder / SYNSETS[8], 8 if severity < 5 else 9)
    row = run(tmp_path, f"c={tmp_path / 'c'}")["imagenet-c"][0]
    assert float(row["top1"]) == pytest.approx(90, abs=1e-3)
    assert float(row["snow"]) == pytest.approx(10 / 0.866816, abs=1e-3)
    expected = sum(10 / error for error in ALEXNET_ERRORS.values()) / 15
    assert float(row["mce"]) == pytest.approx(expected, abs=1e-3)


def test_incomplete_corruptions(tmp_path, model):
    draw(tmp_path / "c" / "snow" / "1" / SYNSETS[7], 7)
    with pytest.raises(ValueError, match="imagenet-c"):
        run(tmp_path, f"c={tmp_path / 'c'}")


def test_alexnet_itself_has_an_error_of_100():
    errors = {(name, s): 100 * error + (s - 3) for name, error in ALEXNET_ERRORS.items() for s in range(1, 6)}
    mce, relative = mean_corruption_error(errors)
    assert mce == pytest.approx(100) and set(relative) == set(ALEXNET_ERRORS)
    assert sum(ALEXNET_ERRORS.values()) / 15 == pytest.approx(
        0.7890, abs=5e-4
    )  # the mean that the paper's tables imply


@pytest.mark.parametrize("name", [name for name, test_set in SETS.items() if test_set.classes])
def test_classes_are_those_of_timm(name):
    numbers = class_numbers(SETS[name], None)
    assert numbers == [int(line) for line in timm_lines(f"{SETS[name].classes}_indices")]
    shuffled = SYNSETS[::-1]
    assert class_numbers(SETS[name], shuffled) == [999 - number for number in numbers]
    assert ClassSubset(nn.Identity(), numbers)(torch.arange(1000.0)[None]).tolist() == [numbers]


def test_refusals(tmp_path, model):
    for text in ("a", "b=."):
        with pytest.raises(ValueError, match=text):
            parse_set(text)
    with pytest.raises(FileNotFoundError, match="missing"):
        run(tmp_path, f"a={tmp_path / 'missing'}")
    with pytest.raises(ValueError, match="lacks"):
        class_numbers(SETS["imagenet-a"], ["cat", "dog"])
    (tmp_path / "empty" / SYNSETS[0]).mkdir(parents=True)
    draw(tmp_path / "empty" / SYNSETS[0], 0)
    with pytest.raises(ValueError, match="empty"):
        run(tmp_path, f"a={tmp_path / 'empty'}")
    with pytest.raises(ValueError, match="--sets"):
        validate.main([str(tmp_path), "--model", "nat_mini", "--pretrained", "--sets", f"a={tmp_path}"])


def test_ranks_of_several_models():
    def row(model, top1):
        return {"model": model, "top1": top1, "top5": top1}

    rows = {
        "imagenet": [row("one", 80.0), row("two", 81.0), row("three", 79.0)],
        "sketch": [row("one", 40.0), row("two", 30.5)],
    }
    found = add_differences(rows)
    assert [row["model"] for row in found["imagenet"]] == ["two", "one", "three"]
    assert [(row["model"], row["top1_diff"], row["rank_diff"]) for row in found["sketch"]] == [
        ("one", "-40.000", "+1"),
        ("two", "-50.500", "-1"),
    ]
