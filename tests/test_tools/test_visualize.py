"""tools/visualize.py: learning curves, attention, saliency, receptive fields and neighborhoods."""

from types import SimpleNamespace

import pytest
import timm
import torch
import visualize
from drawn_text import check_saved_figures
from figures import attention, neighborhood, receptive_field, saliency
from figures.curves import read_summary
from figures.models import load_model
from figures.style import theme_paths
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import natzoo  # noqa: F401  registers the models
from natten.geometry.drawing import PALETTES
from natzoo.checkpoints import write_checkpoint, write_weights

KWARGS = {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16, "kernel_size": 3}
COLORS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
PREPROCESSING = {"input_size": [3, 32, 32], "crop_pct": 1.0, "interpolation": "bicubic", **COLORS}


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
def image(tmp_path):
    Image.effect_noise((40, 40), 80).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


@pytest.fixture
def texts(monkeypatch):
    """Titles and axis labels of all saved figures, none of which may be cut off or overlap another."""
    check_saved_figures(monkeypatch)
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


# ----- curves --------------------------------------------------------------------------------------------------------


def test_curves(texts, tmp_path):
    for name in ("nat", "dinat"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "summary.csv").write_text("epoch,train_loss,val_loss,top1\n0,2.0,1.9,30\n1,1.0,0.9,70\n")
    out = tmp_path / "new" / "curves.png"
    visualize.main(["curves", str(tmp_path / "nat"), str(tmp_path / "dinat"), "--out", str(out), "--theme", "both"])
    for theme, path in theme_paths(out, "both").items():
        with Image.open(path) as image:
            assert image.size == (1500, 600)
            assert "#{:02x}{:02x}{:02x}".format(*image.getpixel((0, 0))) == PALETTES[theme].page


def test_missing_and_empty_summary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"summary\.csv"):
        read_summary(tmp_path)
    (tmp_path / "summary.csv").write_text("epoch,top1\n")
    with pytest.raises(ValueError, match=r"summary\.csv"):
        read_summary(tmp_path)


# ----- attention -----------------------------------------------------------------------------------------------------


def test_attention_of_a_checkpoint(checkpoint, image, texts, tmp_path):
    out = tmp_path / "attention.png"
    visualize.main(["attention", image, image, "--checkpoint", checkpoint, "--out", str(out)])
    with Image.open(out) as drawn:
        assert drawn.size == (1125, 780)


def test_evidence(model):
    answer = attention.compute_evidence(model, torch.randn(1, 3, 32, 40))
    assert answer.number in (0, 1)
    assert answer.evidence_HW.shape == answer.weights_HW.shape == (8, 10)
    assert answer.evidence_HW[answer.token] == answer.evidence_HW.max()
    assert answer.weights_HW[answer.token] > 0


def test_model_without_neighborhood_attention():
    model = timm.create_model("resnet10t", num_classes=2).eval()
    with pytest.raises(ValueError, match="ResNet"):
        attention.compute_evidence(model, torch.randn(1, 3, 32, 32))


def test_token_in_each_layer(checkpoint, image, texts, tmp_path):
    visualize.main(["token", image, "--checkpoint", checkpoint, "--out", str(tmp_path / "layers.png")])
    assert [text for text in texts if "layer 1" in text] == [
        "stage 1, layer 1\nDiNA 3x3, dilation 2",
        "stage 2, layer 1\nNA 3x3",
    ]


def test_token_in_each_head(checkpoint, image, texts, tmp_path):
    options = ["token", image, "--checkpoint", checkpoint, "--out", str(tmp_path / "heads.png")]
    visualize.main([*options, "--stage", "2", "--point", "31,0", "--heads", "2"])
    assert {"mean", "layer 1\nNA 3x3", "head 2"} <= set(texts) and "head 1" not in texts


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("--stage 3", "--stage 3"),
        ("--stage 1 --heads 2", "--heads 2"),
        ("--heads 1", "--heads .*--stage"),
        ("--point 32,0", "--point 32,0"),
    ],
)
def test_tokens_out_of_range(options, named, checkpoint, image, tmp_path):
    argv = ["token", image, "--checkpoint", checkpoint, "--out", str(tmp_path / "a.png"), *options.split()]
    with pytest.raises(ValueError, match=named):
        visualize.main(argv)


# ----- comparison of models ------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """Two class scores, each a weighted sum of the pixels."""

    def __init__(self, weights_2CHW):
        super().__init__()
        self.weights_2CHW = weights_2CHW

    def forward(self, x_BCHW):
        return torch.einsum("kchw,bchw->bk", self.weights_2CHW, x_BCHW)


@pytest.mark.parametrize("samples", [1, 3])
def test_saliency_of_a_linear_model_equals_its_weights(samples):
    weights = torch.randn(2, 3, 5, 4)
    found = saliency.compute_saliency(Linear(weights), weights[1:] * 10, samples)
    assert found.number == 1 and found.probability == pytest.approx(1)
    assert torch.allclose(found.map_HW, weights[1].abs().amax(0), atol=1e-6)


def test_saliency_maps_show_models_and_predictions(checkpoint, image, texts, tmp_path):
    argv = ["salient", image, image, "--models", "resnet10t", checkpoint, "--samples", "1", "--theme", "dark"]
    visualize.main([*argv, "--out", str(tmp_path / "salient.png")])
    titles = [text.split("\n") for text in texts if "\n" in text]
    assert [name for name, _ in titles] == ["resnet10t", "run"] and "best.pth" in titles[1][1]
    answers = [text for text in texts if "%" in text]
    assert len(answers) == 2 and all(answer.split()[0] in ("cat", "dog") for answer in answers)  # trained model only


def test_random_weights_are_reproducible_and_weight_files_need_a_name(tmp_path):
    cpu = torch.device("cpu")
    first, again = (load_model("resnet10t", False, cpu) for _ in range(2))
    assert torch.equal(first.model.conv1[0].weight, again.model.conv1[0].weight)
    write_weights(tmp_path / "r.safetensors", first.model.state_dict())
    named = load_model(f"resnet10t={tmp_path / 'r.safetensors'}", False, cpu)
    assert named.is_trained and not first.is_trained
    with pytest.raises(ValueError, match=r"r\.safetensors"):
        load_model(str(tmp_path / "r.safetensors"), False, cpu)


def test_receptive_field_of_convolutions():
    """Two 3x3 convolutions, the first with stride 2, have receptive fields of 3 and 7 pixels."""

    class Convolutions(nn.Module):
        def forward_intermediates(self, x, intermediates_only, output_fmt):
            first = nn.functional.conv2d(x, torch.ones(4, 3, 3, 3), stride=2, padding=1)
            return [first, nn.functional.conv2d(first, torch.ones(4, 4, 3, 3), padding=1)]

    fields = receptive_field.receptive_fields(Convolutions(), [torch.randn(1, 3, 32, 32) for _ in range(2)])
    squares = [receptive_field.smallest_square(field, share=1.0) for field in fields]
    assert squares == [(16, 16, 3), (16, 16, 7)]  # token 8 of 16 is centered on pixel 16
    row, column, side = squares[1]
    outside = fields[1].clone()
    outside[row - side // 2 : row + side // 2 + 1, column - side // 2 : column + side // 2 + 1] = 0
    assert outside.abs().max() == 0 and fields[1].max() > 0


def test_receptive_fields(checkpoint, image, texts, tmp_path):
    out = str(tmp_path / "fields.png")
    visualize.main(["receptive-field", image, "--models", checkpoint, "--out", out])
    visualize.main(["receptive-field", "--models", checkpoint, "--inputs", "2", "--out", out])
    assert sum(text.startswith("stage 2: ") for text in texts) == 2


def test_selection_of_stages():
    assert receptive_field.select_maps(list(range(1, 13))) == [3, 6, 9, 12]
    with pytest.raises(ValueError, match="forward_intermediates"):
        receptive_field.receptive_fields(nn.Identity(), [])


# ----- neighborhood --------------------------------------------------------------------------------------------------


def test_neighborhood_as_png(texts, tmp_path):
    out = tmp_path / "neighborhood.png"
    visualize.main(["neighborhood", "--out", str(out), "--theme", "dark"])
    assert len(texts) == 4 + 3  # a title per problem, a label per place of the query
    with Image.open(out) as drawn:
        found = {"#{:02x}{:02x}{:02x}".format(*color) for _, color in drawn.getcolors(1 << 20)}
    palette = PALETTES["dark"]
    assert found.issuperset((palette.page, *palette.parts[:2], *palette.parts[3:]))


def test_neighborhood_as_gif(tmp_path):
    out = tmp_path / "neighborhood.gif"
    argv = ["neighborhood", "--size", "3", "--kernel-size", "2", "--dilation", "1", "--stride", "2"]
    visualize.main([*argv, "--theme", "both", "--out", str(out)])
    for theme, path in theme_paths(out, "both").items():
        with Image.open(path) as animation:
            assert animation.n_frames == 9 and animation.info["loop"] == 0
            colors = {"#{:02x}{:02x}{:02x}".format(*c) for _, c in animation.convert("RGB").getcolors(1 << 20)}
        assert {PALETTES[theme].page, PALETTES[theme].parts[-1]} <= colors


def test_captions():
    plain = next(iter(neighborhood.make_problems(7, 3, 2, 2).values()))
    corners, borders, interior = (
        {neighborhood.caption(plain, query) for query in queries}
        for queries in ([(0, 0), (0, 6)], [(3, 0), (6, 3)], [(1, 5), (3, 3)])
    )
    assert len(corners) == len(borders) == len(interior) == 1
    assert len(corners | borders | interior) == 3


def test_window_larger_than_the_map(tmp_path):
    with pytest.raises(ValueError, match="kernel_size"):
        neighborhood.prepare(SimpleNamespace(size=4, kernel_size=3, dilation=2, stride=1, out=tmp_path / "a.png"))
