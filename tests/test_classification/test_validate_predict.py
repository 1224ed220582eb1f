"""validate.py and predict.py on checkpoints of train.py."""

import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from natzoo.checkpoints import path_in_cache, read_checkpoint, write_checkpoint, zoo_entries
from natzoo.classification import evaluation, predict, train, validate
from natzoo.classification.distributed import World

SCRIPTS = Path(__file__).parents[2] / "classification"


@pytest.fixture
def trained(tiny, run_folder):
    """The path of the best checkpoint of a run, and its accuracy."""
    return run_folder / "best.pth", train.main(tiny(epochs=4))


def run(script, *argv):
    path = SCRIPTS / script
    return subprocess.run([sys.executable, str(path), *map(str, argv)], capture_output=True, text=True)


def test_validate_agrees_with_training(trained, data, capsys):
    path, best = trained
    result = validate.main([str(data), "--checkpoint", str(path), "--workers", "0", "--batch-size", "5"])
    assert result["top1"] == pytest.approx(best)
    output = capsys.readouterr().out
    assert re.findall(r"top-1 [0-9.]*%", output) == [f"top-1 {best:.2f}%"]  # as quickstart.sh greps
    assert all(text in output.splitlines()[-1] for text in ("nat_mini", "embed_dim=16", str(path), str(data)))


def test_validate_ignores_unreadable_images(trained, data, capsys):
    path, _ = trained
    (data / "val" / "blue" / "0.png").write_bytes(b"no image")
    argv = [str(data), "--checkpoint", str(path), "--workers", "0"]
    with pytest.raises(ValueError, match=r"blue/0\.png"):
        validate.main(argv)
    one_by_one = validate.main([*argv, "--skip-bad-images", "--batch-size", "1"])
    assert capsys.readouterr().out.endswith(f"\n  {data / 'val' / 'blue' / '0.png'}\n")
    together = validate.main([*argv, "--skip-bad-images"])
    assert one_by_one == pytest.approx(together)
    assert round(one_by_one["top1"] * 26 / 100, 6).is_integer()
    for image in (data / "val").rglob("*.png"):
        image.write_bytes(b"no image")
    with pytest.raises(ValueError, match="val"):
        validate.main([*argv, "--skip-bad-images"])


def test_results_file_has_the_columns_of_timm(trained, data, tmp_path):
    path, best = trained
    table = tmp_path / "new" / "results.csv"
    validate.main([str(data), "--checkpoint", str(path), "--results-file", str(table), "--workers", "0"])
    with table.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["model"] == "nat_mini"
    assert float(row["top1"]) == pytest.approx(best, abs=1e-3)
    assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)
    assert (row["img_size"], row["crop_pct"], row["interpolation"]) == ("16", "1.0", "bicubic")
    assert (row["images"], row["published_top1"]) == ("27", "")  # not the published weights


def test_flip_averages_with_mirrored_images(trained, data):
    path, _ = trained
    argv = [str(data), "--checkpoint", str(path), "--workers", "0"]
    plain, flipped = validate.main(argv), validate.main([*argv, "--tta", "flip"])
    assert plain["loss"] != flipped["loss"]
    for image in data.rglob("val/**/*.png"):
        Image.open(image).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(image)
    assert validate.main([*argv, "--tta", "flip"]) == pytest.approx(flipped)
    assert validate.main(argv)["loss"] != pytest.approx(plain["loss"])


def test_real_labels(trained, data, tmp_path):
    """All classes correct; only the true class correct; images without labels ignored."""
    path, best = trained
    for number, image in enumerate(sorted((data / "val").rglob("*.png"))):
        image.rename(image.with_name(f"ILSVRC2012_val_{number + 1:08d}.png"))
    targets = [number // 9 for number in range(27)]
    argv = [str(data), "--checkpoint", str(path), "--workers", "0", "--real-labels", str(tmp_path / "real.json")]

    def score(labels):
        (tmp_path / "real.json").write_text(json.dumps(labels))
        return validate.main(argv)

    assert score([[0, 1, 2]] * 27)["top1"] == 100
    same = score([[target] for target in targets])
    assert (same["top1"], same["count"]) == (pytest.approx(best), 27)
    assert score([[target] if target else [] for target in targets])["count"] == 18
    with pytest.raises(ValueError, match="val_00000021"):
        score([[0]] * 20)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        validate.main([*argv[:-1], str(tmp_path / "nowhere.json")])


@pytest.fixture
def imagenet(data, tmp_path, monkeypatch):
    """Options for the dataset with 1000 classes, and the weights of two published models in the cache."""
    (tmp_path / "classes.txt").write_text("\n".join(["amber", "blue", "crimson", *map(str, range(997))]))
    monkeypatch.setenv("NATZOO_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "cache").mkdir()
    for image in data.rglob("val/*/[2-9].png"):
        image.unlink()
    for name in ("nat_isotropic_small", "nat_mini"):
        torch.manual_seed(0)
        path = path_in_cache(zoo_entries()[name])
        torch.save(timm.create_model(name).state_dict(), path)
    return [str(data), "--class-map", str(tmp_path / "classes.txt"), "--pretrained", "--workers", "0"]


def test_several_published_models(imagenet, tmp_path, capsys):
    table = tmp_path / "results.csv"
    with pytest.raises(ValueError, match="dinat_mini"):
        validate.main([*imagenet, "--models", "*nat_mini", "nat_iso*small", "--results-file", str(table)])
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["model"], row["published_top1"]) for row in rows] == [
        ("nat_mini", "81.8"),
        ("nat_isotropic_small", "80.0"),
    ]
    for row in rows:
        assert float(row["difference"]) == pytest.approx(float(row["top1"]) - float(row["published_top1"]), abs=1e-3)
    assert "81.8%" in capsys.readouterr().out
    with pytest.raises(ValueError, match="wibble"):
        validate.main([*imagenet, "--models", "wibble*"])
    with pytest.raises(ValueError, match="--models"):
        validate.main([*imagenet, "--models", "nat_*", "--model", "nat_mini"])


def test_processes_share_the_images(trained, data):
    path, _ = trained
    alone = validate.main([str(data), "--checkpoint", str(path), "--workers", "0"])
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += [str(SCRIPTS / "validate.py"), str(data), "--checkpoint", str(path)]
    done = subprocess.run([*words, "--device", "cpu", "--batch-size", "5"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "[Gloo]" not in line)  # printed by PyTorch 2.10
    assert f"27 images, top-1 {alone['top1']:.2f}%, loss {alone['loss']:.4f}" in line


def test_signal_stops_the_evaluation(trained, data, tmp_path, monkeypatch, capsys):
    """Between two batches, without a row for the unfinished model."""
    original = evaluation.check_bad_images
    monkeypatch.setattr(
        evaluation, "check_bad_images", lambda *args: (os.kill(os.getpid(), signal.SIGUSR1), original(*args))
    )
    argv = [str(data), "--checkpoint", str(trained[0]), "--workers", "0", "--batch-size", "5"]
    with pytest.raises(SystemExit) as exit_info:
        validate.main([*argv, "--results-file", str(tmp_path / "results.csv")])
    assert exit_info.value.code == 128 + signal.SIGUSR1
    assert "SIGUSR1" in capsys.readouterr().out
    assert not (tmp_path / "results.csv").exists()


def test_all_processes_skip_a_model_that_one_could_not_download(imagenet, data, monkeypatch, capsys):
    def gather(self, value):
        return [value, "node b cannot be reached"] if value is None else [value]

    for image in data.rglob("val/*/1.png"):
        image.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(World, "gather", gather)
        with pytest.raises(ValueError, match="nat_isotropic_small"):
            validate.main([*imagenet, "--models", "nat_iso*small"])
    assert "nat_isotropic_small: node b cannot be reached" in capsys.readouterr().out
    validate.main([*imagenet, "--model", "nat_isotropic_small", "--tta", "flip"])
    assert "published" not in capsys.readouterr().out  # not comparable


def test_bare_weights_need_a_model_name(trained, data, tmp_path):
    path, _ = trained
    write_checkpoint(tmp_path / "bare.pth", read_checkpoint(path)["model"])
    with pytest.raises(ValueError, match=r"bare\.pth.*--model"):
        validate.main([str(data), "--checkpoint", str(tmp_path / "bare.pth")])
    with pytest.raises(ValueError, match=r"bare\.pth"):
        validate.main([str(data), "--checkpoint", str(tmp_path / "bare.pth"), "--model", "nat_mini"])


def test_bare_weights_with_model_arguments(trained, data, tmp_path, capsys):
    path, best = trained
    write_checkpoint(tmp_path / "bare.pth", read_checkpoint(path)["model"])
    argv = ["--checkpoint", str(tmp_path / "bare.pth"), "--model", "nat_mini", "--num-classes", "3", "--img-size", "16"]
    argv += ["--crop-pct", "1.0", "--model-kwargs", "depths=(1,1)", "num_heads=(1,2)", "embed_dim=16", "kernel_size=3"]
    assert validate.main([str(data), *argv, "--workers", "0"])["top1"] == pytest.approx(best)
    predict.main([str(data / "val" / "blue" / "0.png"), *argv])
    assert "0.png: " in capsys.readouterr().out
    (data / "val" / "blue").rename(data / "spare")
    with pytest.raises(ValueError, match=r"val.*--class-map"):
        validate.main([str(data), *argv, "--workers", "0"])


def test_predict_with_more_outputs_than_classes(tiny, data, run_folder, capsys):
    train.main(tiny("--num-classes", "5", epochs=1))
    predict.main([str(data / "val" / "blue" / "0.png"), "--checkpoint", str(run_folder / "best.pth")])
    line = capsys.readouterr().out.splitlines()[-1]
    assert all(f"{name} " in line for name in ("amber", "blue", "crimson", "3", "4"))


def test_errors_of_validate(trained, data):
    path, _ = trained
    with pytest.raises(ValueError, match="--checkpoint"):
        validate.main([str(data)])
    with pytest.raises(ValueError, match=r"nat_mini.*nat_tiny"):
        validate.main([str(data), "--checkpoint", str(path), "--model", "nat_tiny"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        validate.main([str(data), "--checkpoint", "nowhere.pth"])
    with pytest.raises(FileNotFoundError, match=str(path)):
        validate.main([str(data), "--checkpoint", str(path.parent)])


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


def test_predictions_as_json_and_png(trained, data, tmp_path):
    path, _ = trained
    grid, table = tmp_path / "grid.png", tmp_path / "out" / "answers.json"
    folder = data / "val" / "amber"
    predict.main([str(folder), "--checkpoint", str(path), "--grid", str(grid), "--json", str(table)])
    answers = json.loads(table.read_text())
    assert list(answers) == [str(file) for file in sorted(folder.iterdir())]
    for answer in answers.values():
        assert {entry["class"] for entry in answer} == {"amber", "blue", "crimson"}
        assert sum(entry["probability"] for entry in answer) == pytest.approx(1, abs=1e-5)
    picture = Image.open(grid)
    assert picture.format == "PNG"
    assert 0.8 < picture.width / picture.height < 1.2  # nine images in three rows of up to four, with text below each


def test_closed_pipe_is_not_an_error(trained, data):
    """As in `predict.py ... | head`."""
    path, _ = trained
    pictures = [str(data / "val")] * 100  # more output than a pipe buffers
    words = [sys.executable, str(SCRIPTS / "predict.py"), *pictures, "--checkpoint", str(path)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 128 + 13


def test_missing_and_unreadable_images_are_skipped(trained, data, tmp_path, capsys):
    path, _ = trained
    (tmp_path / "a.png").write_bytes(b"no image")
    pictures = [str(tmp_path / "nowhere.png"), str(data / "val" / "blue"), str(tmp_path / "a.png")]
    with pytest.raises(ValueError, match="2 of 11"):
        predict.main([*pictures, "--checkpoint", str(path), "--json", str(tmp_path / "answers.json")])
    assert len(json.loads((tmp_path / "answers.json").read_text())) == 9
    errors = capsys.readouterr().err
    assert "nowhere.png" in errors and "a.png" in errors


def test_errors_of_predict(trained, data, tmp_path):
    path, _ = trained
    (tmp_path / "a.png").write_bytes(b"no image")
    pictures = [str(tmp_path / "a.png"), str(data / "val" / "blue"), "--json", str(tmp_path / "answers.json")]
    with pytest.raises(ValueError, match="1 of 10"):
        predict.main([*pictures, "--checkpoint", str(path), "--grid", str(tmp_path / "grid.png")])
    assert len(json.loads((tmp_path / "answers.json").read_text())) == 9
    assert (tmp_path / "grid.png").exists()
    (tmp_path / "empty").mkdir()
    for name in ("a.png", "nowhere.png", "empty"):
        with pytest.raises(ValueError, match=name):
            predict.main([str(tmp_path / name), "--checkpoint", str(path)])
    with pytest.raises(OSError, match="--json"):
        predict.main([str(data / "val" / "blue"), "--checkpoint", str(path), "--json", str(path / "a" / "b.json")])
    with pytest.raises(ValueError, match="--checkpoint"):
        predict.main([str(data / "val" / "blue")])
    with pytest.raises(ValueError, match="nowhere"):  # before a model is looked for
        predict.main([str(tmp_path / "nowhere.png"), "--model", "no_such_model", "--pretrained"])
    with pytest.raises(ValueError, match="--random"):
        predict.main([str(data / "val" / "blue"), "--checkpoint", str(path), "--random"])


def test_random_weights(data, capsys):
    """--random tries a command without a download; the weights are the same in each call."""
    words = ["--model", "nat_mini", "--random", "--num-classes", "3", "--img-size", "32"]
    lines = []
    for _ in range(2):
        predict.main([str(data / "val" / "blue" / "0.png"), *words])
        lines.append(capsys.readouterr().out)
    assert lines[0] == lines[1]
    assert all(f"{number} " in lines[0] for number in range(3))


def test_a_class_without_images_is_named(trained, data, tiny, capsys):
    path, _ = trained
    shutil.rmtree(data / "val" / "blue")
    validate.main([str(data), "--checkpoint", str(path), "--workers", "0"])
    output = capsys.readouterr().out
    assert "1 class: blue" in output
    assert "top-5" not in output  # there are only three classes
    train.main(tiny("--experiment", "other", epochs=1))
    assert "1 class: blue" in capsys.readouterr().out


def test_scripts(trained, data):
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
    assert done.stderr.startswith("error: ") and str(path) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["train", "validate", "predict"])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_modules_run_as_programs(name, monkeypatch, capsys):
    """As in `python -m natzoo.classification.train`."""
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_module(f"natzoo.classification.{name}", run_name="__main__")
    assert exit_info.value.code == 0
    assert "--batch-size" in capsys.readouterr().out


def test_checkpoints_are_plain_data(trained):
    state = torch.load(trained[0], weights_only=True)
    json.dumps(state["record"])
