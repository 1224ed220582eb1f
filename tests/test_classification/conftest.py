"""A tiny dataset, and the options of a run on it that takes seconds."""

import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image
from tar_files import tar_bytes

from natzoo.classification import train

CLASSES = ("amber", "blue", "crimson")


@pytest.fixture
def data(tmp_path):
    """Three classes that differ in color, each with 24 training and 9 validation images of 16x16 pixels."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 9)):
        for number, name in enumerate(CLASSES):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = noise.integers(0, 160, (16, 16, 3))
                pixels[..., number] += 80
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "data"


@pytest.fixture
def shards(data):
    """Webdataset shards of each split, and _info.json; the folders are removed."""
    info = {}
    for split in ("train", "val"):
        files = sorted((data / split).rglob("*.png"), key=lambda file: (file.stem, file.parent.name))
        names, lengths = [], []
        for shard in range(4):
            names.append(f"{split}-{shard:04d}.tar")
            lengths.append(len(files[shard::4]))
            entries = {}
            for file in files[shard::4]:
                key = f"{file.parent.name}_{file.stem}"
                entries[f"{key}.png"] = file.read_bytes()
                entries[f"{key}.cls"] = str(CLASSES.index(file.parent.name)).encode()
            (data / names[-1]).write_bytes(tar_bytes(entries))
        info[split] = {"name": split, "filenames": names, "shard_lengths": lengths, "num_samples": len(files)}
        shutil.rmtree(data / split)
    (data / "_info.json").write_text(json.dumps({"splits": info}))
    return data


@pytest.fixture
def tiny(data, tmp_path):
    """A function that returns the command line of a tiny run; its arguments override options."""

    def options(*more, epochs=2):
        return [
            *(str(data), "--output", str(tmp_path / "output"), "--experiment", "tiny", "--device", "cpu"),
            *("--model", "nat_mini", "--img-size", "16", "--crop-pct", "1.0"),
            *("--model-kwargs", "depths=(1,1)", "num_heads=(1,2)", "embed_dim=16", "kernel_size=3"),
            *("--epochs", str(epochs), "--warmup-epochs", "0", "--cooldown-epochs", "0", "--lr", "2e-3"),
            *("--batch-size", "8", "--workers", "0", "--aa", "none", "--scale", "0.5", "1.0", "--reprob", "0"),
            *("--mixup", "0", "--cutmix", "0", "--threads", "1", "--log-interval", "1"),
            *map(str, more),
        ]

    return options


@pytest.fixture
def run_folder(tmp_path):
    return tmp_path / "output" / "tiny"


@pytest.fixture
def stop_after(monkeypatch):
    """A function that runs train.py and sends a signal after a number of updates."""

    def run(updates, options, number=signal.SIGTERM):
        original, calls = train.Trainer.update_weights, []

        def update_weights(self, loss):
            calls.append(loss)
            if len(calls) == updates:
                os.kill(os.getpid(), number)
            return original(self, loss)

        with monkeypatch.context() as patch:
            patch.setattr(train.Trainer, "update_weights", update_weights)
            with pytest.raises(SystemExit) as exit_info:
                train.main(options)
        assert exit_info.value.code == 128 + number
        assert not multiprocessing.active_children()  # the data-loading workers have stopped too

    return run
