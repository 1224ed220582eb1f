"""mmdet's and mmseg's own inference functions, which only require `import natzoo.openmmlab`."""

import re

import pytest
from PIL import Image
from runs import ROOT, load_config

import natzoo.openmmlab  # noqa: F401  before mmdet and mmseg
from natzoo.checkpoints import find_entry, locate, path_in_cache, write_checkpoint

EXAMPLES = {  # subproject -> small config, and the config and checkpoint of the README
    "detection": ("mask_rcnn", "detection/mask_rcnn_nat_mini_3x", "nat_mini_maskrcnn"),
    "segmentation": ("upernet", "segmentation/upernet_nat_mini_160k", "nat_mini_upernet"),
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of downloads."""
    monkeypatch.setenv("NATZOO_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def build(kind, config, checkpoint=None):
    if kind == "detection":
        from mmdet.apis import init_detector

        return init_detector(config, checkpoint, device="cpu")
    from mmseg.apis import init_model

    return init_model(config, checkpoint, device="cpu")


def infer(kind, model, image):
    if kind == "detection":
        from mmdet.apis import inference_detector

        found = inference_detector(model, image)
        return (found.pred_instances.masks.shape[-2:], found.pred_instances.scores)
    from mmseg.apis import inference_model

    found = inference_model(model, image)
    return (found.pred_sem_seg.data.shape[-2:], found.seg_logits.data)


@pytest.mark.parametrize("meta", [{"meta": {"epoch": 1, "CLASSES": ("a",), "PALETTE": [[0, 0, 0]]}}, {}])
@pytest.mark.parametrize("kind", EXAMPLES)
def test_published_name(kind, meta, cache, drawn):
    """A file with the layout of the published ones, and a file of bare weights."""
    small, _, name = EXAMPLES[kind]
    cfg = load_config(ROOT / "configs" / "quickstart" / f"{small}.py")
    weights = build(kind, cfg).state_dict()
    write_checkpoint(path_in_cache(find_entry(name)), {**meta, "state_dict": weights} if meta else weights)
    model = build(kind, cfg, name)
    assert all(value.equal(weights[key]) for key, value in model.state_dict().items())
    path = next((drawn / "images" / "validation").iterdir())
    size, scores = infer(kind, model, str(path))
    with Image.open(path) as image:
        assert size == image.size[::-1]
    assert scores.isfinite().all()


@pytest.mark.parametrize("kind", EXAMPLES)
def test_inferencer(kind, cache, drawn, tmp_path):
    """mmdet's DetInferencer and mmseg's MMSegInferencer give the same results, and draw them."""
    small, _, name = EXAMPLES[kind]
    cfg = load_config(ROOT / "configs" / "quickstart" / f"{small}.py")
    write_checkpoint(path_in_cache(find_entry(name)), {"state_dict": build(kind, cfg).state_dict()})
    path = str(next((drawn / "images" / "validation").iterdir()))
    if kind == "detection":
        from mmdet.apis import DetInferencer, inference_detector

        expected = inference_detector(build(kind, cfg, name), path).pred_instances.scores
        (found,) = DetInferencer(cfg, name, device="cpu")(path, out_dir=str(tmp_path))["predictions"]
        assert found["scores"] == pytest.approx(expected.tolist())
    else:
        from mmseg.apis import MMSegInferencer, inference_model

        expected = inference_model(build(kind, cfg, name), path).pred_sem_seg.data
        found = MMSegInferencer(cfg, name, device="cpu")(path, out_dir=str(tmp_path))["predictions"]
        assert (found == expected[0].numpy()).all()
    assert list((tmp_path / "vis").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXAMPLES)
def test_example_of_readme(kind, cache, drawn, tmp_path, monkeypatch):
    _, config, name = EXAMPLES[kind]
    path = ROOT / "configs" / f"{config}.py"
    write_checkpoint(path_in_cache(find_entry(name)), {"state_dict": build(kind, path).state_dict(), "meta": {}})
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    with Image.open(next((drawn / "images" / "validation").iterdir())) as image:
        image.save(tmp_path / "image.jpg")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"^```py\n(.*?)^```", (ROOT / kind / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert locate(name).parent == cache
