"""Pictures of runs, of attention, of salience and receptive fields, and of the neighborhood."""

from types import SimpleNamespace

import pytest
import timm
import torch
import visualize
from matplotlib.figure import Figure
from pictures import attention, neighborhood, receptive_field, salient
from pictures.curves import read_summary
from pictures.models import contestant
from pictures.style import places
from PIL import Image
from torch import nn

import natzoo  # noqa: F401  registers the models
from natten.geometry.drawing import PALETTES
from natzoo.checkpoints import write_checkpoint, write_weights

KWARGS = {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16, "kernel_size": 3}
COLOURS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
PREPROCESSING = {"input_size": [3, 32, 32], "crop_pct": 1.0, "interpolation": "bicubic", **COLOURS}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model("dinat_mini", num_classes=2, dilations=[[2], [1]], **KWARGS).eval()


@pytest.fixture
def checkpoint(model, tmp_path):
    kwargs = {**KWARGS, "dilations": [[2], [1]]}
    record = {"model": "dinat_mini", "model_kwargs": kwargs, "num_classes": 2, "classes": ["cat", "dog"]}
    path = tmp_path / "run" / "best.pth"
    path.parent.mkdir()
    write_checkpoint(path, {"model": model.state_dict(), "record": {**record, "preprocessing": PREPROCESSING}})
    return str(path)


@pytest.fixture
def picture(tmp_path):
    Image.effect_noise((40, 40), 80).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


@pytest.fixture
def texts(monkeypatch):
    """All that is written in the figures drawn."""
    found = []
    draw = Figure.savefig

    def savefig(figure, *args, **kwargs):
        parts = [
            figure._suptitle,
            *(t for axes in figure.axes for t in (axes.title, axes.xaxis.label, axes.yaxis.label)),
        ]
        found.extend(part.get_text() for part in parts if part and part.get_text())
        draw(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


# ----- runs ----------------------------------------------------------------------------------------------------------


def test_curves(tmp_path, capsys):
    for name in ("nat", "dinat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.csv").write_text("epoch,train_loss,val_loss,top1\n0,2.0,1.9,30\n1,1.0,0.9,70\n")
    out = tmp_path / "pictures" / "curves.png"
    visualize.main(["curves", str(tmp_path / "nat"), str(tmp_path / "dinat"), "--out", str(out), "--theme", "both"])
    for theme, path in places(out, "both").items():
        with Image.open(path) as image:
            assert image.size == (1500, 600)
            assert "#{:02x}{:02x}{:02x}".format(*image.getpixel((0, 0))) == PALETTES[theme].page
        assert f"wrote {path}" in capsys.readouterr().out or theme == "dark"


def test_runs_without_figures(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no summary\.csv"):
        read_summary(tmp_path)
    (tmp_path / "summary.csv").write_text("epoch,top1\n")
    with pytest.raises(ValueError, match="has no rows yet"):
        read_summary(tmp_path)


# ----- attention -----------------------------------------------------------------------------------------------------


def test_attention_of_a_checkpoint(checkpoint, picture, tmp_path):
    out = tmp_path / "attention.png"
    visualize.main(["attention", picture, picture, "--checkpoint", checkpoint, "--out", str(out)])
    with Image.open(out) as image:
        assert image.size == (1125, 780)


def test_evidence_and_window(model):
    answer = attention.evidence_and_window(model, torch.randn(1, 3, 32, 40))
    assert answer.number in (0, 1)
    assert answer.evidence_HW.shape == answer.weights_HW.shape == (8, 10)
    assert answer.evidence_HW[answer.token] == answer.evidence_HW.max()
    assert answer.weights_HW[answer.token] > 0


def test_a_model_without_neighborhood_attention():
    model = timm.create_model("resnet10t", num_classes=2).eval()
    with pytest.raises(ValueError, match="no neighborhood attention"):
        attention.evidence_and_window(model, torch.randn(1, 3, 32, 32))


def test_a_token_in_each_layer(checkpoint, picture, texts, tmp_path):
    words = ["token", picture, "--checkpoint", checkpoint, "--out", str(tmp_path / "layers.png")]
    visualize.main(words)
    assert texts[1:] == ["stage 1, layer 1\nDiNA 3x3, dilation 2", "stage 2, layer 1\nNA 3x3"]


def test_a_token_in_each_head(checkpoint, picture, texts, tmp_path):
    words = ["token", picture, "--checkpoint", checkpoint, "--out", str(tmp_path / "heads.png")]
    visualize.main([*words, "--stage", "2", "--point", "31,0", "--heads", "2"])
    assert texts == ["attention of the framed token, stage 2", "mean", "layer 1\nNA 3x3", "head 2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--stage 3", "--stage 3: the model has the stages 1 to 2"),
        ("--stage 1 --heads 2", "--heads 2: the layers of this stage have the heads 1 to 1"),
        ("--heads 1", "--heads needs --stage"),
        ("--point 32,0", "--point 32,0 lies outside of the picture of 32x32 pixels"),
    ],
)
def test_tokens_that_are_not_there(words, message, checkpoint, picture, tmp_path):
    with pytest.raises(ValueError, match=message):
        visualize.main(["token", picture, "--checkpoint", checkpoint, "--out", str(tmp_path / "a.png"), *words.split()])


# ----- models side by side -------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Scores of two classes that are sums over pixels."""

    def __init__(self, weights_2CHW):
        super().__init__()
        self.weights_2CHW = weights_2CHW

    def forward(self, x_BCHW):
        return torch.einsum("kchw,bchw->bk", self.weights_2CHW, x_BCHW)


@pytest.mark.parametrize("samples", [1, 3])
def test_salience_of_a_linear_model_is_its_weights(samples):
    weights = torch.randn(2, 3, 5, 4)
    found = salient.salience(Linear(weights), weights[1:] * 10, samples)
    assert found.number == 1 and found.probability == pytest.approx(1)
    assert torch.allclose(found.map_HW, weights[1].abs().amax(0), atol=1e-6)


def test_salient_maps_say_whose_weights_they_show(checkpoint, picture, texts, tmp_path):
    words = ["salient", picture, picture, "--models", "resnet10t", checkpoint, "--samples", "1", "--theme", "dark"]
    visualize.main([*words, "--out", str(tmp_path / "salient.png")])
    assert {"resnet10t\nrandom weights", "run\nweights of best.pth"} <= set(texts)
    answers = [text for text in texts if "%" in text]
    assert len(answers) == 2 and all(answer.split()[0] in ("cat", "dog") for answer in answers)  # of the trained one


def test_random_weights_are_the_same_each_time_and_bare_weights_are_named(tmp_path):
    cpu = torch.device("cpu")
    first, again = (contestant("resnet10t", False, cpu) for _ in range(2))
    assert torch.equal(first.model.conv1[0].weight, again.model.conv1[0].weight)
    write_weights(tmp_path / "r.safetensors", first.model.state_dict())
    named = contestant(f"resnet10t={tmp_path / 'r.safetensors'}", False, cpu)
    assert named.is_trained and not first.is_trained
    with pytest.raises(ValueError, match="does not say which model it is of"):
        contestant(str(tmp_path / "r.safetensors"), False, cpu)


def test_receptive_field_of_convolutions():
    """Two 3x3 convolutions with a stride of 2 in the first: 3, then 7 pixels around the token's own."""

    class Convolutions(nn.Module):
        def forward_intermediates(self, x, intermediates_only, output_fmt):
            first = nn.functional.conv2d(x, torch.ones(4, 3, 3, 3), stride=2, padding=1)
            return [first, nn.functional.conv2d(first, torch.ones(4, 4, 3, 3), padding=1)]

    fields = receptive_field.receptive_fields(Convolutions(), [torch.randn(1, 3, 32, 32) for _ in range(2)])
    squares = [receptive_field.square_of_share(field, share=1.0) for field in fields]
    assert squares == [(16, 16, 3), (16, 16, 7)]  # token 8 of 16 stands on pixel 16
    row, column, side = squares[1]
    outside = fields[1].clone()
    outside[row - side // 2 : row + side // 2 + 1, column - side // 2 : column + side // 2 + 1] = 0
    assert outside.abs().max() == 0 and fields[1].max() > 0


def test_receptive_fields(checkpoint, picture, texts, tmp_path):
    out = str(tmp_path / "fields.png")
    visualize.main(["receptive-field", picture, "--models", checkpoint, "--out", out])
    visualize.main(["receptive-field", "--models", checkpoint, "--inputs", "2", "--out", out])
    assert [text.split("mean over ")[1].split("\n")[0] for text in texts if "mean over" in text] == [
        "1 pictures",
        "2 inputs of noise",
    ]
    assert sum(text.startswith("stage 2: ") for text in texts) == 2


def test_more_stages_than_are_drawn():
    assert receptive_field.spread(list(range(1, 13))) == [3, 6, 9, 12]
    with pytest.raises(ValueError, match="has no forward_intermediates"):
        receptive_field.receptive_fields(nn.Identity(), [])


# ----- the neighborhood ----------------------------------------------------------------------------------------------


def test_neighborhood_as_a_picture(texts, tmp_path):
    out = tmp_path / "neighborhood.png"
    visualize.main(["neighborhood", "--out", str(out), "--theme", "dark"])
    assert {"neighborhood attention\n5x5", "dilated\nby 2", "in the corner", "at the border", "inside"} <= set(texts)
    with Image.open(out) as image:
        found = {"#{:02x}{:02x}{:02x}".format(*colour) for _, colour in image.getcolors(1 << 20)}
    palette = PALETTES["dark"]
    assert found.issuperset((palette.page, *palette.parts[:2], *palette.parts[3:]))


def test_neighborhood_as_a_film(tmp_path):
    out = tmp_path / "neighborhood.gif"
    words = ["neighborhood", "--size", "3", "--kernel-size", "2", "--dilation", "1", "--stride", "2"]
    visualize.main([*words, "--theme", "both", "--out", str(out)])
    for theme, path in places(out, "both").items():
        with Image.open(path) as film:
            assert film.n_frames == 9 and film.info["loop"] == 0
            colours = {"#{:02x}{:02x}{:02x}".format(*c) for _, c in film.convert("RGB").getcolors(1 << 20)}
        assert {PALETTES[theme].page, PALETTES[theme].parts[-1]} <= colours


def test_captions_of_the_border_cases():
    plain = neighborhood.kinds(7, 3, 2, 2)["neighborhood attention\n3x3"]
    words = [neighborhood.caption(plain, query).split(":")[0] for query in ((0, 6), (3, 0), (1, 5))]
    assert words == ["in a corner", "at a border", "inside"]


def test_a_window_too_large(tmp_path):
    with pytest.raises(ValueError, match="on axis 0, but that axis has only 4 tokens"):
        neighborhood.prepare(SimpleNamespace(size=4, kernel_size=3, dilation=2, stride=1, out=tmp_path / "a.png"))
