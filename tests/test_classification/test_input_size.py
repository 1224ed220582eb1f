"""Gray images, sizes that are not square, and models that take only one size."""

import json

import pytest
import torch
from PIL import Image

from natzoo.checkpoints import read_checkpoint
from natzoo.classification import predict, train, validate
from natzoo.classification.data.transforms import evaluation_transform, preprocessing
from natzoo.classification.factory import create_model
from natzoo.classification.options import parse

SWIN = ("--model", "swin_tiny_patch4_window7_224", "--model-kwargs", "depths=(1,1)", "num_heads=(1,2)", "embed_dim=16")
VIT = ("--model", "vit_tiny_patch16_224", "--model-kwargs", "depth=1", "num_heads=1", "embed_dim=16")
NAT = ("--model", "nat_mini", "--model-kwargs", "depths=(1,1)", "num_heads=(1,2)", "embed_dim=16", "kernel_size=3")


@pytest.fixture
def options(tiny):
    """A function that returns the command line of a tiny run without a model and an image size."""

    def make(*more):
        words = tiny(epochs=1)
        del words[words.index("--model") : words.index("--epochs")]
        return [*words, "--crop-pct", "1.0", *map(str, more)]

    return make


@pytest.mark.parametrize(
    ("more", "shape"),
    [
        ((*NAT, "--in-chans", "1", "--img-size", "16"), (1, 16, 16)),
        ((*NAT, "in_chans=1", "--img-size", "16", "--aa", "rand-m9-mstd0.5-inc1"), (1, 16, 16)),
        ((*NAT, "--input-size", "1", "16", "24", "--mixup", "0.8", "--reprob", "0.5"), (1, 16, 24)),
        ((*NAT, "--input-size", "3", "24", "16"), (3, 24, 16)),
        ((*SWIN, "--img-size", "33"), (3, 33, 33)),
        ((*SWIN, "--input-size", "1", "32", "64"), (1, 32, 64)),
        ((*VIT, "--img-size", "32"), (3, 32, 32)),
    ],
)
def test_runs_and_their_evaluation(options, data, run_folder, tmp_path, more, shape):
    best = train.main(options(*more))
    record = read_checkpoint(run_folder / "best.pth")["record"]
    assert record["preprocessing"]["input_size"] == list(shape)
    assert len(record["preprocessing"]["mean"]) == len(record["preprocessing"]["std"]) == shape[0]
    checkpoint = ["--checkpoint", str(run_folder / "best.pth")]
    assert validate.main([str(data), *checkpoint, "--workers", "0"])["top1"] == pytest.approx(best)
    predict.main([str(data / "val" / "blue"), *checkpoint, "--json", str(tmp_path / "a.json")])
    assert len(json.loads((tmp_path / "a.json").read_text())) == 9
    train.main(options(*more, "--resume", "--epochs", "2"))


def test_gray_input_has_the_average_mean_and_std():
    model = create_model("nat_mini", {"depths": (1, 1), "num_heads": (1, 2), "embed_dim": 16, "in_chans": 1})
    config = preprocessing(parse(["--in-chans", "1", "--img-size", "16"]), model)
    color = preprocessing(parse(["--img-size", "16"]), model)
    assert config["mean"] == [pytest.approx(sum(color["mean"]) / 3)]
    assert config["std"] == [pytest.approx(sum(color["std"]) / 3)]
    x_1HW = evaluation_transform(config)(Image.new("RGB", (20, 20), (100, 100, 100)))
    torch.testing.assert_close(x_1HW, torch.full((1, 16, 16), (100 / 255 - config["mean"][0]) / config["std"][0]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ((*NAT, "--in-chans", "3", "--input-size", "1", "16", "16"), "--in-chans and --input-size"),
        ((*NAT, "in_chans=3", "--in-chans", "1"), "--in-chans and --model-kwargs in_chans"),
        ((*NAT, "--img-size", "16", "--input-size", "3", "16", "24"), "--img-size 16 and --input-size 16 24"),
        ((*NAT, "--in-chans", "4", "--img-size", "16"), "--in-chans 4"),
        ((*SWIN, "img_size=32", "--img-size", "48"), "--img-size.*48x48"),
        ((*VIT, "img_size=32", "--img-size", "48"), "--img-size.*48x48"),
        ((*NAT, "depths=None"), "nat_mini.*depths"),
        ((*NAT, "embed_dim=-8"), "nat_mini.*embed_dim"),
        ((*NAT, "num_heads='ab'"), "nat_mini.*num_heads"),
        ((*SWIN, "depths=3"), "swin.*depths"),
    ],
)
def test_what_is_refused_before_training(options, more, message):
    with pytest.raises(ValueError, match=message):
        train.Trainer(parse(options(*more)))


def test_evaluation_at_another_size(options, data, run_folder):
    train.main(options(*NAT, "--img-size", "16"))
    argv = [str(data), "--checkpoint", str(run_folder / "best.pth"), "--workers", "0"]
    assert validate.main([*argv, "--img-size", "24"])["count"] == 27
    assert validate.main([*argv, "--input-size", "3", "24", "16"])["count"] == 27
    with pytest.raises(ValueError, match="--in-chans 1"):
        validate.main([*argv, "--in-chans", "1"])
    train.main(options(*SWIN, "--img-size", "32", "--experiment", "swin"))
    with pytest.raises(ValueError, match=r"--img-size.*64x64"):
        validate.main([str(data), "--checkpoint", str(run_folder.parent / "swin" / "best.pth"), "--img-size", "64"])


@pytest.mark.parametrize(
    "name", ["local-dir:/tmp/nowhere", "hf-hub:", "hf-hub:owner/name", "timm/x", "x:y", "http://a/b", ""]
)
def test_models_from_elsewhere(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"--model {name}"):
        create_model(name, {})
