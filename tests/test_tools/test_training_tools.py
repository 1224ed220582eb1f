"""`benchmark.py training` and tools/compare.py, on runs of seconds."""

import csv

import benchmark
import compare
import numpy as np
import pytest
from benchmarks import training
from PIL import Image

TINY = """
model: nat_mini
model_kwargs: {depths: [1, 1], num_heads: [1, 2], embed_dim: 16, kernel_size: 3}
img_size: 16
crop_pct: 1.0
batch_size: 4
workers: 0
threads: 1
device: cpu
epochs: 2
warmup_epochs: 0
cooldown_epochs: 0
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "tiny.yml"
    path.write_text(TINY)
    return path


def test_the_training_loop_is_timed_against_its_parts(recipe, tmp_path, monkeypatch):
    out = tmp_path / "training.csv"
    options = f"--config {recipe} --synthetic 32 --num-classes 3 --grad-accum 2 --updates 2 --rounds 2".split()
    measure, epochs = training.measure, []
    monkeypatch.setattr(
        training,
        "measure",
        lambda trainer, *args: (measure(trainer, *args), epochs.append(len(trainer.train_loader)))[0],
    )
    benchmark.main(["training", *options, "--out", str(out)])
    assert epochs == [2 * 2]  # so that no images are loaded while the next loop is timed
    with out.open(newline="") as file:
        rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["loop", "loader", "step", "loop", "loop and loader"]
    assert rows[2][2] == "100.0"
    assert all(float(row[1]) > 0 for row in rows[1:])
    with pytest.raises(ValueError, match="--updates 5"):
        benchmark.main(["training", *options, "--updates", "5"])


def test_recipes_are_compared_over_seeds(recipe, tmp_path):
    noise = np.random.default_rng(0)
    for folder in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "data" / folder).mkdir(parents=True)
        for number in range(4):
            pixels = noise.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / folder / f"{number}.png")
    (tmp_path / "base.yml").write_text("epochs: 2  # a base without a model is not trained\n")
    output = tmp_path / "output"
    configs = [str(tmp_path / "base.yml"), str(recipe)]
    argv = [str(tmp_path / "data"), "--configs", *configs, "--seeds", "1", "2", "--output", str(output)]
    compare.main([*argv, "--", "--epochs", "1"])
    with (output / "compare.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["recipe"], row["model"], row["seeds"]) == ("tiny", "nat_mini", "2")
    assert float(row["top1_least"]) <= float(row["top1_mean"]) <= float(row["top1_most"])
    assert Image.open(output / "compare.png").format == "PNG"
    assert sorted(path.name for path in output.iterdir() if path.is_dir()) == ["tiny-1", "tiny-2"]
    with pytest.raises(ValueError, match="tiny-1"):
        compare.main([*argv, "--", "--model", "nat_tiny"])
