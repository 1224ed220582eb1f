"""validate.py and predict.py on what train.py wrote."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from classification import predict, train, validate
from natzoo.checkpoints import read_checkpoint, write_checkpoint


@pytest.fixture
def trained(tiny, run_folder):
    """Path of the best checkpoint of a run, and its accuracy."""
    return run_folder / "best.pth", train.main(tiny(epochs=4))


def run(script, *argv):
    path = Path(train.__file__).with_name(script)
    return subprocess.run([sys.executable, str(path), *map(str, argv)], capture_output=True, text=True)


def test_validate_finds_what_training_found(trained, data, capsys):
    path, best = trained
    result = validate.main([str(data), "--checkpoint", str(path), "--workers", "0", "--batch-size", "5"])
    assert result["top1"] == pytest.approx(best)
    assert f"27 images, top-1 {best:.2f}%" in capsys.readouterr().out


def test_validate_leaves_unreadable_images_out(trained, data):
    path, _ = trained
    (data / "val" / "blue" / "0.png").write_bytes(b"no image")
    argv = [str(data), "--checkpoint", str(path), "--workers", "0"]
    with pytest.raises(ValueError, match=r"blue/0\.png cannot be read"):
        validate.main(argv)
    one_by_one = validate.main([*argv, "--skip-bad-images", "--batch-size", "1"])
    together = validate.main([*argv, "--skip-bad-images"])
    assert one_by_one == pytest.approx(together)
    assert round(one_by_one["top1"] * 26 / 100, 6).is_integer()
    for image in (data / "val").rglob("*.png"):
        image.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the images in .*val can be read"):
        validate.main([*argv, "--skip-bad-images"])


def test_bare_weights_need_the_name_of_the_model(trained, data, tmp_path):
    path, _ = trained
    write_checkpoint(tmp_path / "bare.pth", read_checkpoint(path)["model"])
    with pytest.raises(ValueError, match=r"bare\.pth does not say which model it is of: name it with --model"):
        validate.main([str(data), "--checkpoint", str(tmp_path / "bare.pth")])
    with pytest.raises(ValueError, match="is of another model than the NAT built here"):
        validate.main([str(data), "--checkpoint", str(tmp_path / "bare.pth"), "--model", "nat_mini"])


def test_bare_weights_with_their_arguments(trained, data, tmp_path, capsys):
    path, best = trained
    write_checkpoint(tmp_path / "bare.pth", read_checkpoint(path)["model"])
    argv = ["--checkpoint", str(tmp_path / "bare.pth"), "--model", "nat_mini", "--num-classes", "3", "--img-size", "16"]
    argv += ["--crop-pct", "1.0", "--model-kwargs", "depths=(1,1)", "num_heads=(1,2)", "embed_dim=16", "kernel_size=3"]
    assert validate.main([str(data), *argv, "--workers", "0"])["top1"] == pytest.approx(best)
    predict.main([str(data / "val" / "blue" / "0.png"), *argv])
    assert "0.png: " in capsys.readouterr().out
    (data / "val" / "blue").rename(data / "spare")
    with pytest.raises(ValueError, match="val has 2 classes, but the model has 3"):
        validate.main([str(data), *argv, "--workers", "0"])


def test_predict_with_more_outputs_than_classes(tiny, data, run_folder, capsys):
    train.main(tiny("--num-classes", "5", epochs=1))
    predict.main([str(data / "val" / "blue" / "0.png"), "--checkpoint", str(run_folder / "best.pth")])
    line = capsys.readouterr().out.splitlines()[-1]
    assert all(f"{name} " in line for name in ("amber", "blue", "crimson", "3", "4"))


def test_mistakes(trained, data):
    path, _ = trained
    with pytest.raises(ValueError, match="no model to use"):
        validate.main([str(data)])
    with pytest.raises(ValueError, match="is of the model 'nat_mini', not of 'nat_tiny'"):
        validate.main([str(data), "--checkpoint", str(path), "--model", "nat_tiny"])
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        validate.main([str(data), "--checkpoint", "nowhere.pth"])


def test_predict(trained, data, capsys):
    path, _ = trained
    pictures = [str(data / "val" / "amber" / "0.png"), str(data / "val" / "blue")]
    predict.main([*pictures, "--checkpoint", str(path), "--topk", "2", "--batch-size", "4"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[0].startswith(pictures[0] + ": ")
    for line in lines:
        shares = [float(share) for share in re.findall(r"(?:amber|blue|crimson) ([\d.]+)%", line)]
        assert len(shares) == 2
        assert shares == sorted(shares, reverse=True)


def test_predict_names_what_is_wrong(trained, data, tmp_path):
    path, _ = trained
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    for picture, error, message in (
        (tmp_path / "a.png", ValueError, r"a\.png cannot be read as an image"),
        (tmp_path / "nowhere.png", FileNotFoundError, "no picture"),
        (tmp_path / "empty", ValueError, "holds no images"),
    ):
        with pytest.raises(error, match=message):
            predict.main([str(picture), "--checkpoint", str(path)])
    with pytest.raises(ValueError, match="no model to use"):
        predict.main([str(data / "val" / "blue")])


def test_the_command_lines(trained, data):
    path, best = trained
    done = run("validate.py", data, "--checkpoint", path)
    assert done.returncode == 0, done.stderr
    assert f"top-1 {best:.2f}%" in done.stdout
    done = run("predict.py", data / "val" / "blue" / "0.png", "--checkpoint", path)
    assert done.returncode == 0, done.stderr
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    done = run("validate.py", data, "--checkpoint", path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path} is truncated or no checkpoint")
    assert "Traceback" not in done.stderr


def test_checkpoints_are_plain_data(trained):
    state = torch.load(trained[0], weights_only=True)
    json.dumps(state["record"])
