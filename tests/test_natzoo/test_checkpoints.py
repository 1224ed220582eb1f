"""Weight files: written so that nothing is lost, read so that nothing runs, loaded whole or not at all."""

import errno
import os
import pickle

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

import natzoo  # noqa: F401  registers the models
from natzoo.checkpoints import load_weights, read_checkpoint, read_weights, write_atomically, write_checkpoint


def small(**kwargs):
    arguments = {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16, "kernel_size": 3, "num_classes": 5, **kwargs}
    return timm.create_model("nat_mini", **arguments)


def load(model, path, **kwargs):
    return load_weights(model, read_weights(path), path, **kwargs)


@pytest.fixture
def weights():
    return small().state_dict()


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


# ----- reading and loading -----


def test_bare_weights(tmp_path, weights):
    write_checkpoint(tmp_path / "a.pth", weights)
    save_file(weights, tmp_path / "a.safetensors")
    assert_same(weights, read_weights(tmp_path / "a.pth"))
    assert_same(weights, read_weights(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema", "state_dict_ema"])
def test_wrapped_weights(tmp_path, weights, wrapper):
    write_checkpoint(tmp_path / "a.pth", {wrapper: weights, "epoch": 3})
    assert_same(weights, read_weights(tmp_path / "a.pth"))


def test_averaged_weights_come_first(tmp_path, weights):
    average = {name: value + 1 for name, value in weights.items()}
    write_checkpoint(tmp_path / "a.pth", {"model": weights, "model_ema": average})
    assert_same(average, read_weights(tmp_path / "a.pth"))
    write_checkpoint(tmp_path / "b.pth", {"model": weights, "model_ema": None})
    assert_same(weights, read_weights(tmp_path / "b.pth"))


def test_loading(tmp_path, weights):
    write_checkpoint(tmp_path / "a.pth", weights)
    model = small()
    load(model, tmp_path / "a.pth")
    assert_same(weights, model.state_dict())


def test_another_model_is_refused_with_a_list_and_changes_nothing(tmp_path, weights):
    write_checkpoint(tmp_path / "a.pth", {**weights, "wibble": torch.zeros(1)})
    model = small(depths=(2, 1), num_classes=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load(model, tmp_path / "a.pth")
    text = str(error.value)
    assert "a.pth is of another model" in text
    assert "missing: levels.0.blocks.1." in text
    assert "and 9 more" in text
    assert "1 unexpected: wibble" in text
    assert "head.weight (5, 32) instead of (6, 32)" in text
    assert_same(before, model.state_dict())


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*nowhere\.pth: check the path"):
        read_checkpoint(tmp_path / "nowhere.pth")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_file(tmp_path, weights, suffix, keep):
    path = tmp_path / f"a{suffix}"
    write_checkpoint(path, weights) if suffix == ".pth" else save_file(weights, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if keep in (0.5, 0.99) else keep])
    with pytest.raises(ValueError, match=r"a\.(pth|safetensors) is (truncated or no checkpoint|refused)"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_bytes_never_raise_anything_else(tmp_path, weights, suffix):
    path = tmp_path / f"a{suffix}"
    write_checkpoint(path, weights) if suffix == ".pth" else save_file(weights, path)
    content = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for place in random.integers(0, min(len(content), 2000), 8):
            damaged[place] = random.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 30


def test_a_classifier_of_other_classes_can_be_left_out(tmp_path, weights):
    write_checkpoint(tmp_path / "a.pth", weights)
    model = small(num_classes=7)
    head = model.head.weight.clone()
    assert load(model, tmp_path / "a.pth", new_classifier=True)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    assert not load(small(), tmp_path / "a.pth", new_classifier=True)
    with pytest.raises(ValueError, match="of another shape"):
        load(small(embed_dim=32), tmp_path / "a.pth", new_classifier=True)


class Payload:
    def __reduce__(self):
        return os.system, ("touch payload-ran",)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_a_pickle_that_is_not_plain_weights_is_refused_and_does_not_run(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({"model": Payload()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="is refused: it is not plain weights"):
        read_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><html>", b"\x00" * 200])
def test_a_file_of_another_kind(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pth is (truncated or no checkpoint|refused)"):
        read_checkpoint(tmp_path / "a.pth")


def test_no_weights_in_it(tmp_path):
    write_checkpoint(tmp_path / "a.pth", {"epoch": 3})
    with pytest.raises(ValueError, match="holds no weights; its entries: epoch"):
        read_weights(tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "b.pth")
    with pytest.raises(ValueError, match="holds a list"):
        read_weights(tmp_path / "b.pth")


# ----- writing -----


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.pth"
    write_checkpoint(path, {"epoch": 1})

    def fail(file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"a\.pth could not be written; .*unharmed \(No space left on device\)"):
        write_atomically(path, fail)
    assert read_checkpoint(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_full_disk_during_save(monkeypatch, tmp_path):
    """/dev/full refuses every byte, as a full disk does."""
    path = tmp_path / "a.pth"
    write_checkpoint(path, {"epoch": 1})
    real = os.open
    monkeypatch.setattr(os, "open", lambda *_: real("/dev/full", os.O_WRONLY))
    with pytest.raises(OSError, match="what was there before is unharmed"):
        write_checkpoint(path, {"weights": torch.zeros(100_000)})
    monkeypatch.undo()
    assert read_checkpoint(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["a.pth"]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / ".a.pth.tmp").write_bytes(b"half of it")
    write_checkpoint(tmp_path / "a.pth", {"epoch": 1})
    assert read_checkpoint(tmp_path / "a.pth") == {"epoch": 1}
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_file_system_that_cannot_sync_folders(monkeypatch, tmp_path):
    real = os.fsync

    def refuse_folders(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_checkpoint(tmp_path / "a.pth", {"epoch": 1})
    assert read_checkpoint(tmp_path / "a.pth") == {"epoch": 1}


def test_missing_folder(tmp_path):
    with pytest.raises(OSError, match="could not be written"):
        write_checkpoint(tmp_path / "nowhere" / "a.pth", {})


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_checkpoint(tmp_path / "a.pth", {})
    finally:
        os.umask(old)
    assert (tmp_path / "a.pth").stat().st_mode & 0o777 == 0o640
