"""The page of tools/demo.py: what it computes, and the folder that it writes for a Space."""

import importlib.util
import subprocess
import sys
from types import ModuleType

import demo
import numpy as np
import pytest
import torch
from PIL import Image
from small_models import small
from timm.data import create_transform

from natzoo.checkpoints import write_checkpoint

has_gradio = importlib.util.find_spec("gradio") is not None


@pytest.fixture
def app(monkeypatch):
    """The module, where gradio is not installed with nothing in its place; only the page itself needs it."""
    if not has_gradio:
        monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    monkeypatch.delitem(sys.modules, "space.app", raising=False)
    from space import app

    yield app
    sys.modules.pop("space.app", None)


@pytest.fixture
def looker(app):
    transform = create_transform((3, 32, 40), is_training=False, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0)
    return app.Looker(small("dinat_mini"), transform, [0.5] * 3, [0.25] * 3, list("abcde"))


@pytest.fixture
def picture():
    return Image.effect_noise((50, 40), 80)  # grey, as some pictures are


def test_five_classes(looker, picture):
    answer = looker.classify(picture)
    assert sorted(answer) == list("abcde")
    assert list(answer.values()) == sorted(answer.values(), reverse=True)
    assert sum(answer.values()) == pytest.approx(1, abs=1e-5)


def test_choices(looker):
    assert looker.stages() == [1, 2]
    assert looker.titles(1) == ["layer 1: DiNA 3x3, dilation 2"]
    assert looker.heads(2) == ["mean over heads", "head 1", "head 2"]


def test_a_click_moves_the_window(looker, picture):
    title = looker.titles(1)[0]
    middle = looker.overlay(picture, 1, title, "head 1", None)
    assert middle.size == (40 * 14, 32 * 14)
    point = looker.point_of(picture, (40 * 14 - 1, 0))
    assert point == (0, pytest.approx(39.9, abs=0.1))
    corner = np.asarray(looker.overlay(picture, 1, title, "head 1", point)).astype(int)
    assert corner[1, -2].tolist() == [0, 255, 255]  # the frame of the token in the upper right
    # Only the window, columns 5, 7 and 9 of rows 0, 2 and 4, has colour; all else is grey but for a tint of nothing.
    colour = np.abs(corner - np.asarray(middle)).max(-1).reshape(8, 56, 10, 56).max((1, 3)) > 40
    assert colour[0, 9] and not colour[7, 0]


@pytest.mark.skipif(not has_gradio, reason="the extra demo is not installed")
def test_page(app, looker):
    page = app.make_page(looker, "a model")
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"picture", "stage", "layer", "head", "attention of the framed token"} <= labels


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError, match=r"^the demo needs gradio: pip install gradio\.$"):
        demo.main(["--checkpoint", "x.pth"])


def test_a_model_is_restored_with_its_classes(app, tmp_path, monkeypatch):
    monkeypatch.setattr(app, "make_page", lambda looker, title: (looker, title))
    kwargs = {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16, "kernel_size": 3}
    config = {"input_size": [3, 32, 32], "crop_pct": 1.0, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [1] * 3}
    record = {"model": "nat_mini", "model_kwargs": kwargs, "num_classes": 5, "classes": list("vwxyz")}
    weights = small("nat_mini").state_dict()
    write_checkpoint(tmp_path / "best.pth", {"model": weights, "record": {**record, "preprocessing": config}})
    pages = []
    monkeypatch.setattr(demo, "make_page", lambda args, make=demo.make_page: pages.append(make(args)) or Launched())
    demo.main(["--checkpoint", str(tmp_path / "best.pth")])
    looker, title = pages[0]
    assert (title, looker.names) == ("nat_mini", list("vwxyz"))
    assert looker.input_of(Image.new("L", (9, 9))).shape == (1, 3, 32, 32)


class Launched:
    def launch(self, server_port):
        assert server_port == 7860


def test_the_folder_of_a_space_needs_nothing_beside_it(tmp_path, capsys):
    folder = tmp_path / "my-space"
    demo.main(["--export", str(folder)])
    assert capsys.readouterr().out == f"wrote {folder}\n"
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "app.py", "requirements.txt", "packages.txt", "LICENSE", "natten", "natzoo")
    }
    front = (folder / "README.md").read_text().split("---\n")[1]
    assert "sdk: gradio\n" in front and "app_file: app.py\n" in front
    lines = (
        "import sys, types; sys.modules.setdefault('gradio', types.ModuleType('gradio')); import app, natten, natzoo;"
    )
    words = [sys.executable, "-c", f"{lines} print(natten.__file__, natzoo.__file__, app.__file__)"]
    done = subprocess.run(words, cwd=folder, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    assert done.stdout.count(str(folder)) == 3
    with pytest.raises(FileExistsError, match="is there already"):
        demo.export(folder)


def test_the_published_model_of_a_space(app, monkeypatch):
    model = small("nat_mini", num_classes=1000)
    monkeypatch.setattr(app.timm, "create_model", lambda name, pretrained: model)
    looker = app.published("nat_mini")
    answer = looker.classify(Image.new("RGB", (300, 200)))
    assert len(answer) == 5
    assert looker.names[207] == "golden retriever"
    assert torch.equal(looker.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
