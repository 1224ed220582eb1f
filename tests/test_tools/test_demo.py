"""tools/demo.py: the results on the page, and the exported folder of a Space."""

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
    """tools/space/app.py, with an empty module instead of gradio if that is not installed."""
    if not has_gradio:
        monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    monkeypatch.delitem(sys.modules, "space.app", raising=False)
    from space import app

    yield app
    sys.modules.pop("space.app", None)


@pytest.fixture
def viewer(app):
    transform = create_transform((3, 32, 40), is_training=False, mean=(0.5,) * 3, std=(0.25,) * 3, crop_pct=1.0)
    return app.AttentionViewer(small("dinat_mini"), transform, [0.5] * 3, [0.25] * 3, list("abcde"))


@pytest.fixture
def image():
    return Image.effect_noise((50, 40), 80)  # grayscale


def test_five_classes(viewer, image):
    answer = viewer.classify(image)
    assert sorted(answer) == list("abcde")
    assert list(answer.values()) == sorted(answer.values(), reverse=True)
    assert sum(answer.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("size", [(1, 65_535), (65_535, 1), (2, 10_000)])
def test_elongated_image(viewer, size):
    """Resizing the short side would fill the memory."""
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]}"):
        viewer.classify(Image.new("RGB", size))


@pytest.mark.usefixtures("app")
def test_image_with_too_many_pixels(tmp_path):
    """A file of a few kilobytes that describes 900 megapixels."""
    Image.new("1", (30_000, 30_000)).save(tmp_path / "large.png")
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "large.png")


def test_choices(viewer):
    assert viewer.stages() == [1, 2]
    assert viewer.layer_titles(1) == ["layer 1: DiNA 3x3, dilation 2"]
    assert viewer.head_titles(2) == ["mean over heads", "head 1", "head 2"]


def test_click_moves_the_window(viewer, image):
    title = viewer.layer_titles(1)[0]
    middle = viewer.overlay(image, 1, title, "head 1", None)
    assert middle.size == (40 * 14, 32 * 14)
    point = viewer.to_point(image, (40 * 14 - 1, 0))
    assert point == (0, pytest.approx(39.9, abs=0.1))
    corner = np.asarray(viewer.overlay(image, 1, title, "head 1", point)).astype(int)
    assert corner[1, -2].tolist() == [0, 255, 255]  # the frame of the token in the top right corner
    # Only the window is colored: columns 5, 7 and 9 of rows 0, 2 and 4.
    color = np.abs(corner - np.asarray(middle)).max(-1).reshape(8, 56, 10, 56).max((1, 3)) > 40
    assert color[0, 9] and not color[7, 0]


@pytest.mark.skipif(not has_gradio, reason="the extra demo is not installed")
def test_page(app, viewer):
    page = app.create_page(viewer, "a model")
    labels = {block.label for block in page.blocks.values() if getattr(block, "label", None)}
    assert {"stage", "layer", "head"} <= labels


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ModuleNotFoundError, match="gradio"):
        demo.main(["--checkpoint", "x.pth"])


def test_model_is_restored_with_its_classes(app, tmp_path, monkeypatch):
    pages = []
    monkeypatch.setattr(app, "create_page", lambda viewer, title: pages.append((viewer, title)) or Launched())
    kwargs = {"depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16, "kernel_size": 3}
    config = {"input_size": [3, 32, 32], "crop_pct": 1.0, "interpolation": "bicubic", "mean": [0.5] * 3, "std": [1] * 3}
    record = {"model": "nat_mini", "model_kwargs": kwargs, "num_classes": 5, "classes": list("vwxyz")}
    weights = small("nat_mini").state_dict()
    write_checkpoint(tmp_path / "best.pth", {"model": weights, "record": {**record, "preprocessing": config}})
    demo.main(["--checkpoint", str(tmp_path / "best.pth")])
    viewer, title = pages[0]
    assert (title, viewer.classes) == ("nat_mini", list("vwxyz"))
    assert viewer.to_input(Image.new("L", (9, 9))).shape == (1, 3, 32, 32)


class Launched:
    def launch(self, server_port, max_file_size):
        assert (server_port, max_file_size) == (7860, "20mb")


def test_exported_folder_is_self_contained(tmp_path):
    folder = tmp_path / "my-space"
    demo.main(["--export", str(folder)])
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "app.py", "requirements.txt", "packages.txt", "LICENSE", "natten", "natzoo")
    }
    front = (folder / "README.md").read_text().split("---\n")[1]
    assert "sdk: gradio\n" in front and "app_file: app.py\n" in front
    lines = (
        "import sys, types; sys.modules.setdefault('gradio', types.ModuleType('gradio')); import app, natten, natzoo;"
    )
    argv = [sys.executable, "-c", f"{lines} print(natten.__file__, natzoo.__file__, app.__file__)"]
    done = subprocess.run(argv, cwd=folder, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    assert done.stdout.count(str(folder)) == 3
    with pytest.raises(FileExistsError, match="my-space"):
        demo.export(folder)


def test_published_model_of_a_space(app, monkeypatch):
    model = small("nat_mini", num_classes=1000)
    monkeypatch.setattr(app.timm, "create_model", lambda name, pretrained: model)
    viewer = app.load_published("nat_mini")
    answer = viewer.classify(Image.new("RGB", (300, 200)))
    assert len(answer) == 5
    assert viewer.classes[207] == "golden retriever"
    assert torch.equal(viewer.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
