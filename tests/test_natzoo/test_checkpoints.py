"""Weight files: atomic writes, safe reads, strict loading."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file
from small_models import assert_same, small

from natzoo.checkpoints import load_weights, read_checkpoint, read_weights, write_atomically, write_checkpoint


def load(model, path, **kwargs):
    return load_weights(model, read_weights(path), path, **kwargs)


@pytest.fixture
def weights():
    return small().state_dict()


# ----- reading and loading -----


def test_bare_weights(tmp_path, weights):
    write_checkpoint(tmp_path / "a.pth", weights)
    save_file(weights, tmp_path / "a.safetensors")
    assert_same(read_weights(tmp_path / "a.pth"), weights)
    assert_same(read_weights(tmp_path / "a.safetensors"), weights)


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_ema", "state_dict_ema"])
def test_wrapped_weights(tmp_path, weights, wrapper):
    write_checkpoint(tmp_path / "a.pth", {wrapper: weights, "epoch": 3})
    assert_same(read_weights(tmp_path / "a.pth"), weights)


def test_averaged_weights_take_priority(tmp_path, weights):
    average = {name: value + 1 for name, value in weights.items()}
    write_checkpoint(tmp_path / "a.pth", {"model": weights, "model_ema": average})
    assert_same(read_weights(tmp_path / "a.pth"), average)
    write_checkpoint(tmp_path / "b.pth", {"model": weights, "model_ema": None})
    assert_same(read_weights(tmp_path / "b.pth"), weights)


def test_load_weights(tmp_path, weights):
    write_checkpoint(tmp_path / "a.pth", weights)
    model = small(seed=1)
    load(model, tmp_path / "a.pth")
    assert_same(model.state_dict(), weights)


def test_weights_of_another_model_are_listed_and_change_nothing(tmp_path, weights):
    write_checkpoint(tmp_path / "a.pth", {**weights, "wibble": torch.zeros(1)})
    model = small(depths=(2, 1), num_classes=6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        load(model, tmp_path / "a.pth")
    text = str(error.value)
    for part in ("a.pth", "levels.0.blocks.1.", "9 more", "wibble", "head.weight (5, 32) instead of (6, 32)"):
        assert part in text
    assert_same(model.state_dict(), before)


def test_new_classifier_for_other_classes(tmp_path, weights):
    write_checkpoint(tmp_path / "a.pth", weights)
    model = small(seed=1, num_classes=7)
    head = model.head.weight.clone()
    assert load(model, tmp_path / "a.pth", new_classifier=True)
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm.weight, weights["norm.weight"])
    assert not load(small(), tmp_path / "a.pth", new_classifier=True)
    with pytest.raises(ValueError, match=r"shape.*levels\.0\."):
        load(small(embed_dim=32), tmp_path / "a.pth", new_classifier=True)


# ----- writing -----


def test_failed_write_leaves_only_the_old_file(tmp_path):
    path = tmp_path / "a.pth"
    write_checkpoint(path, {"epoch": 1})

    def fail(file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"a\.pth.*No space left on device"):
        write_atomically(path, fail)
    assert read_checkpoint(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.parametrize("name", ["model.onnx", "model.pt2"])
def test_exported_programs_are_not_checkpoints(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK and more")
    with pytest.raises(ValueError, match=f"{name} is an exported program"):
        read_checkpoint(tmp_path / name)


def test_full_disk_during_save(monkeypatch, tmp_path):
    """/dev/full behaves like a full disk."""
    path = tmp_path / "a.pth"
    write_checkpoint(path, {"epoch": 1})
    real = os.open
    monkeypatch.setattr(os, "open", lambda *_: real("/dev/full", os.O_WRONLY))
    with pytest.raises(OSError, match=r"a\.pth"):
        write_checkpoint(path, {"weights": torch.zeros(100_000)})
    monkeypatch.undo()
    assert read_checkpoint(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["a.pth"]


def test_file_system_without_folder_sync(monkeypatch, tmp_path):
    real = os.fsync

    def refuse_folders(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_checkpoint(tmp_path / "a.pth", {"epoch": 1})
    assert read_checkpoint(tmp_path / "a.pth") == {"epoch": 1}


def test_missing_folder(tmp_path):
    with pytest.raises(OSError, match=r"a\.pth"):
        write_checkpoint(tmp_path / "nowhere" / "a.pth", {})


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_checkpoint(tmp_path / "a.pth", {})
    finally:
        os.umask(old)
    assert (tmp_path / "a.pth").stat().st_mode & 0o777 == 0o640
