"""Every config: it builds, has the published size, MACs and recipe, learns from an image and predicts."""

import re

import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.structures import PixelData
from runs import ROOT, load_config

import natzoo.openmmlab  # noqa: F401  registers the backbones
from natzoo.checkpoints import fit_detector, zoo_entries
from natzoo.openmmlab.counting import count_config
from natzoo.openmmlab.data import set_data_root

CONFIGS = ROOT / "configs"
PUBLISHED = [path for kind in ("detection", "segmentation") for path in sorted((CONFIGS / kind).glob("*_*_*.py"))]
PUBLISHED = [path for path in PUBLISHED if not path.name.startswith(("nuclei", "coco", "faster", "small"))]
MASK2FORMERS = [path for path in PUBLISHED if path.name.startswith("mask2former")]
SMALL_NAMES = ("*/nuclei_*", "*/coco_*", "*/small_*", "quickstart/*")
SMALL_CONFIGS = [path for name in SMALL_NAMES for path in CONFIGS.glob(f"{name}.py")]
FASTER_RCNNS = sorted(CONFIGS.glob("detection/faster_rcnn_*.py"))


def is_large(path):
    return "large" in path.name


def slow_unless_mini(path):
    return pytest.param(path, id=path.stem, marks=() if "_mini" in path.name else pytest.mark.slow)


def zoo_entry(path):
    """Return the published checkpoint of a config."""
    name = path.stem
    if name.startswith("mask2former"):
        return zoo_entries()[name]
    network, backbone = re.fullmatch(r"(mask_rcnn|cascade_mask_rcnn|upernet)_(.+)_(?:3x|160k)", name).groups()
    rows = [e for e in zoo_entries().values() if (e.facts.get("model"), e.facts.get("backbone")) == (network, backbone)]
    assert len(rows) == 1
    return rows[0]


def test_one_config_per_published_checkpoint():
    tasks = ("detection", "segmentation", "mask2former")
    named = {zoo_entry(path).name for path in PUBLISHED}
    assert named == {entry.name for entry in zoo_entries().values() if entry.task in tasks}
    assert len(PUBLISHED) == len(named) == 21 + 13 + 8


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_number_of_parameters_matches_publication(path):
    cfg = load_config(path)
    init_default_scope(cfg.default_scope)
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(zoo_entry(path).facts["params"], abs=0.5)
    start = cfg.model.backbone.init_cfg.checkpoint
    assert zoo_entries()[start].task == "classification"
    assert zoo_entry(path).facts.get("start", zoo_entry(path).facts.get("backbone", start)) == start


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_comment_states_published_result(path):
    head, facts = path.read_text().split("_base_")[0], zoo_entry(path).facts
    for key in ("params", "macs", "box_ap", "mask_ap", "miou", "miou_ms", "ap", "pq"):
        assert key not in facts or str(facts[key]) in head, key


@pytest.mark.parametrize("path", [slow_unless_mini(p) for p in PUBLISHED if not p.name.startswith("mask2former")])
def test_macs_match_publication(path):
    (model, *_), _ = count_config(load_config(path))
    assert model.macs / 1e9 == pytest.approx(zoo_entry(path).facts["macs"], rel=0.02)


def dilations(first, second, third, fourth):
    """Return the dilations of DiNAT and DiNAT_s; DiNAT_s has two blocks in all stages but the third."""
    return [[1, first, 1], second, third, fourth], [[1, first], [1, second[-1]], third, fourth[:2]]


# As published. "large" is ADE20K in crops of 640x640.
DILATIONS = {
    ("coco", 6): dilations(28, [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]),
    ("coco", 18): dilations(28, [1, 7, 1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3, 1, 3, 1]),
    ("ade20k", 6): dilations(16, [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]),
    ("ade20k", 18): dilations(16, [1, 4, 1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]),
    ("large", 18): dilations(
        20, [1, 5, 1, 10], [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5], [1, 2, 1, 2, 1]
    ),
}
# As published: drop path rate, learning rate, mixed precision, key of DILATIONS (dataset, blocks in the third stage).
RECIPES = {
    "mask_rcnn_nat_mini_3x": (0.2, 1e-4, True, None),
    "mask_rcnn_nat_tiny_3x": (0.2, 1e-4, True, None),
    "mask_rcnn_nat_small_3x": (0.35, 1e-4, True, None),
    "mask_rcnn_dinat_mini_3x": (0.2, 1e-4, True, ("coco", 6)),
    "mask_rcnn_dinat_tiny_3x": (0.2, 1e-4, True, ("coco", 18)),
    "mask_rcnn_dinat_small_3x": (0.35, 1e-4, True, ("coco", 18)),
    "mask_rcnn_dinat_s_tiny_3x": (0.2, 1e-4, True, ("coco", 6)),
    "mask_rcnn_dinat_s_small_3x": (0.35, 1e-4, True, ("coco", 18)),
    "cascade_mask_rcnn_nat_mini_3x": (0.2, 1e-4, True, None),
    "cascade_mask_rcnn_nat_tiny_3x": (0.3, 1e-4, True, None),
    "cascade_mask_rcnn_nat_small_3x": (0.3, 1e-4, True, None),
    "cascade_mask_rcnn_nat_base_3x": (0.5, 1e-4, True, None),
    "cascade_mask_rcnn_dinat_mini_3x": (0.2, 1e-4, True, ("coco", 6)),
    "cascade_mask_rcnn_dinat_tiny_3x": (0.3, 1e-4, True, ("coco", 18)),
    "cascade_mask_rcnn_dinat_small_3x": (0.5, 1e-4, True, ("coco", 18)),
    "cascade_mask_rcnn_dinat_base_3x": (0.6, 7.5e-5, True, ("coco", 18)),
    "cascade_mask_rcnn_dinat_large_3x": (0.6, 7.5e-5, False, ("coco", 18)),
    "cascade_mask_rcnn_dinat_s_tiny_3x": (0.3, 1e-4, True, ("coco", 6)),
    "cascade_mask_rcnn_dinat_s_small_3x": (0.5, 1e-4, True, ("coco", 18)),
    "cascade_mask_rcnn_dinat_s_base_3x": (0.6, 7.5e-5, True, ("coco", 18)),
    "cascade_mask_rcnn_dinat_s_large_3x": (0.6, 5e-5, True, ("coco", 18)),
    "upernet_nat_mini_160k": (0.2, 6e-5, True, None),
    "upernet_nat_tiny_160k": (0.3, 6e-5, True, None),
    "upernet_nat_small_160k": (0.5, 6e-5, True, None),
    "upernet_nat_base_160k": (0.5, 6e-5, True, None),
    "upernet_dinat_mini_160k": (0.2, 6e-5, True, ("ade20k", 6)),
    "upernet_dinat_tiny_160k": (0.3, 6e-5, True, ("ade20k", 18)),
    "upernet_dinat_small_160k": (0.5, 6e-5, True, ("ade20k", 18)),
    "upernet_dinat_base_160k": (0.5, 6e-5, True, ("ade20k", 18)),
    "upernet_dinat_large_160k": (0.3, 6e-5, False, ("large", 18)),
    "upernet_dinat_s_tiny_160k": (0.3, 6e-5, True, ("ade20k", 6)),
    "upernet_dinat_s_small_160k": (0.3, 6e-5, True, ("ade20k", 18)),
    "upernet_dinat_s_base_160k": (0.3, 6e-5, True, ("ade20k", 18)),
    "upernet_dinat_s_large_160k": (0.3, 6e-5, True, ("large", 18)),
}
# As published: iterations per dataset, queries per task.
ITERATIONS, QUERIES = {"coco": 737500, "ade20k": 160000, "cityscapes": 90000}, {"semantic": 100}


@pytest.mark.parametrize("path", [path for path in PUBLISHED if path not in MASK2FORMERS], ids=lambda path: path.stem)
def test_recipes_match_publication(path):
    rate, lr, is_mixed, key = RECIPES[path.stem]
    cfg, is_detector = load_config(path), "rcnn" in path.stem
    assert cfg.model.backbone.drop_path_rate == rate
    expected = key and DILATIONS[key]["dinat_s_" in path.stem]
    assert cfg.model.backbone.get("dilations") == expected
    assert cfg.optim_wrapper.type == ("AmpOptimWrapper" if is_mixed else "OptimWrapper")
    decay = 0.05 if is_detector else 0.01
    assert cfg.optim_wrapper.optimizer == {"type": "AdamW", "lr": lr, "betas": (0.9, 0.999), "weight_decay": decay}
    if not is_detector:
        side = 640 if is_large(path) else 512
        assert cfg.model.data_preprocessor.size == (side, side)
        assert cfg.test_pipeline[1].scale == (4 * side, side)
        assert [size.scale for size in cfg.tta_pipeline[1].transforms[0]] == [
            (4 * side * ratio, side * ratio) for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
        ]


@pytest.mark.parametrize("path", MASK2FORMERS, ids=lambda path: path.stem)
def test_mask2former_recipes_match_publication(path):
    data, task = path.stem.split("_")[-2:]
    cfg = load_config(path)
    backbone = cfg.model.backbone
    assert (backbone.drop_path_rate, backbone.arch) == (0.3, "dinat_large_21k_11x11")
    assert backbone.dilations == [[1, 14, 1], [1, 4, 1, 7], [1, 2, 1, 3] * 4 + [1, 3], [1] * 5]
    wrapper, optimizer = cfg.optim_wrapper, cfg.optim_wrapper.optimizer
    assert (wrapper.type, wrapper.clip_grad.max_norm) == ("OptimWrapper", 0.01)
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ("AdamW", 1e-4, 0.05)
    assert wrapper.paramwise_cfg.custom_keys.backbone.lr_mult == 0.1
    assert cfg.train_cfg.max_iters == ITERATIONS[data]
    head = cfg.model.get("panoptic_head") or cfg.model.decode_head
    assert head.num_queries == QUERIES.get(task, 200)
    if task == "semantic":
        sides = (320, 480, 640, 800, 960, 1120) if data == "ade20k" else (512, 768, 1024, 1280, 1536, 1792)
        assert [size.scale[1] for size in cfg.tta_pipeline[1].transforms[0]] == list(sides)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_common_settings(path):
    """Two checkpoints, TensorBoard, and InfiniteSampler in iteration-based training, which SkipSeenDataHook needs."""
    cfg = load_config(path)
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 2
    assert [backend.type for backend in cfg.visualizer.vis_backends] == ["LocalVisBackend", "TensorboardVisBackend"]
    if cfg.train_cfg.type == "IterBasedTrainLoop":
        loader = cfg.train_dataloader
        assert (loader.sampler.type, loader.sampler.shuffle) == ("InfiniteSampler", True)
        assert loader.get("batch_sampler") is None


def test_position_biases_and_norms_have_no_weight_decay():
    for name in ("detection/mask_rcnn_nat_mini_3x.py", "segmentation/mask2former_dinat_large_coco_instance.py"):
        cfg = load_config(CONFIGS / name)
        cfg.optim_wrapper.type = "OptimWrapper"
        init_default_scope(cfg.default_scope)
        with torch.device("meta"):
            model = MODELS.build(cfg.model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for group in build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups:
            for parameter in group["params"]:
                is_exempt = names[id(parameter)].endswith("rpb") or (
                    "backbone" in names[id(parameter)] and ("norm" in names[id(parameter)])
                )
                assert not is_exempt or group["weight_decay"] == 0, names[id(parameter)]
                if names[id(parameter)].endswith("qkv.weight"):
                    assert group["weight_decay"] == 0.05
                    assert group["lr"] == (1e-5 if "mask2former" in name else 1e-4)


@pytest.mark.parametrize("kind", ["detection", "segmentation"])
def test_fine_tuning_config_of_readme(kind, shapes, tmp_path):
    """Its datasets load, and its model accepts the published weights."""
    text = re.search(r"```python\n(_base_ = .*?)```", (ROOT / kind / "README.md").read_text(), re.DOTALL)[1]
    (tmp_path / "mine.py").write_text(text.replace("./", f"{CONFIGS / kind}/"))
    cfg = load_config(tmp_path / "mine.py")
    set_data_root(cfg, shapes)
    init_default_scope(cfg.default_scope)
    for loader, count in ((cfg.train_dataloader, 6), (cfg.val_dataloader, 3), (cfg.test_dataloader, 3)):
        dataset = DATASETS.build(loader.dataset)
        assert len(dataset) == count
        assert dataset[0]["data_samples"] is not None
    base = load_config(CONFIGS / kind / re.search(r'_base_ = "./(.+)"', text)[1])
    with torch.device("meta"):
        published = MODELS.build(base.model).state_dict()
    weights = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in published.items()}
    _, notes = fit_detector(weights, MODELS.build(cfg.model), "published.pth", new_classes=True)
    assert len(notes) == 1


# ----- training and prediction -----


def batch_of(cfg, images):
    """Return a batch of one annotated image of at most 128 x 128 pixels."""
    detection, segmentation, meta = images
    resize = {"type": "Resize", "scale": (128, 128), "keep_ratio": True}
    if cfg.default_scope == "mmdet":
        load = {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True}
        pack = {"type": "PackDetInputs", "meta_keys": ("img_path", "ori_shape", "img_shape", "scale_factor")}
        classes = meta["classes"][: count_things(cfg.model)]
        common = {**detection, "type": "CocoDataset", "metainfo": {"classes": classes}}
        common["filter_cfg"] = {"filter_empty_gt": True, "min_size": 32}
    else:
        load, pack = {"type": "LoadAnnotations", "reduce_zero_label": True}, {"type": "PackSegInputs"}
        prefix = {"img_path": "images/training", "seg_map_path": "annotations/training"}
        common = {**segmentation, "type": "BaseSegDataset", "reduce_zero_label": True, "data_prefix": prefix}
    pipeline = [{"type": "LoadImageFromFile"}, load, resize, pack]
    batch = pseudo_collate([DATASETS.build({**common, "pipeline": pipeline})[0]])
    if cfg.default_scope == "mmseg":  # ignore labels beyond the classes of the model
        labels = batch["data_samples"][0].gt_sem_seg.data
        labels[labels >= cfg.model.decode_head.num_classes] = 255
        assert (labels != 255).any()
    return batch


def count_things(model):
    """Return the number of object classes of a detector."""
    if model.type == "Mask2Former":
        return model.panoptic_head.num_things_classes
    heads = model.roi_head.bbox_head
    return (heads[0] if isinstance(heads, list) else heads).num_classes


def shrink(model):
    """Use fewer boxes, which take most of the time, and no batch augmentation."""
    if "rpn_head" in model:
        for proposals in (model.train_cfg.rpn_proposal, model.test_cfg.rpn):
            proposals.max_per_img = 32
        stages = model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 32
    if model.type == "Mask2Former":
        model.data_preprocessor.batch_augments = None


def learn_and_predict(path, images):
    """Assert that the loss reaches each backbone weight, and that predictions have the size of the image."""
    cfg = load_config(path)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    shrink(cfg.model)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    model.init_weights()
    batch = batch_of(cfg, images)
    if cfg.default_scope == "mmseg":  # batch norm needs more than one value per channel
        batch = {key: value * 2 for key, value in batch.items()}
        model.data_preprocessor.size = (128, 128)
    elif cfg.model.type == "Mask2Former" and cfg.model.panoptic_head.num_stuff_classes:
        sample = batch["data_samples"][0]
        sample.gt_sem_seg = PixelData(sem_seg=torch.full((1, *sample.img_shape), 255))
    else:
        assert len(batch["data_samples"][0].gt_instances) > 0
    model.train()
    data = model.data_preprocessor(batch, training=True)
    loss, _ = model.parse_losses(model(**data, mode="loss"))
    loss.backward()
    assert loss.isfinite()
    grads = {name: p.grad for name, p in model.backbone.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert any(grad.abs().sum() > 0 for name, grad in grads.items() if "rpb" in name)
    with torch.no_grad():
        found = model.eval().test_step(batch)[0]
    if cfg.default_scope == "mmseg":
        assert found.pred_sem_seg.data.shape[-2:] == found.ori_shape
    elif "pred_panoptic_seg" in found:
        assert found.pred_panoptic_seg.sem_seg.shape[-2:] == found.ori_shape
    elif "mask_head" in cfg.model.get("roi_head", {}) or cfg.model.type == "Mask2Former":
        assert found.pred_instances.masks.shape[-2:] == found.ori_shape
    else:
        assert "masks" not in found.pred_instances and found.pred_instances.bboxes.shape[-1] == 4


@pytest.mark.parametrize("path", [slow_unless_mini(path) for path in PUBLISHED if not is_large(path)])
def test_learns_and_predicts(path, images):
    learn_and_predict(path, images)


@pytest.mark.parametrize("path", SMALL_CONFIGS, ids=lambda path: path.stem)
def test_small_configs_learn_and_predict(path, images):
    learn_and_predict(path, images)


@pytest.mark.parametrize("path", FASTER_RCNNS, ids=lambda path: path.stem)
def test_faster_rcnn_has_the_recipe_of_mask_rcnn(path):
    cfg, other = load_config(path), load_config(path.with_name(path.name.replace("faster", "mask")))
    assert "mask_head" not in cfg.model.roi_head
    assert cfg.model.backbone == other.model.backbone
    for key in ("optim_wrapper", "param_scheduler", "train_cfg", "auto_scale_lr", "default_hooks"):
        assert cfg[key] == other[key]
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        steps, others = (config[loader].dataset.pipeline for config in (cfg, other))
        assert [{**step, "with_mask": None} for step in steps] == [{**step, "with_mask": None} for step in others]
        assert not any(step.get("with_mask") for step in steps)
    assert cfg.val_evaluator.metric == cfg.test_evaluator.metric == "bbox"


def test_faster_rcnn_learns_and_predicts(images):
    learn_and_predict(CONFIGS / "detection" / "faster_rcnn_nat_mini_3x.py", images)


def test_mask2formers_share_one_backbone():
    first, *others = (load_config(path).model.backbone for path in MASK2FORMERS)
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    "path",
    [path for path in PUBLISHED if is_large(path) and path not in MASK2FORMERS[1:]],
    ids=lambda path: path.stem,
)
def test_large_backbones_have_gradients(path):
    """On the meta device, which computes only shapes."""
    cfg = load_config(path)
    init_default_scope(cfg.default_scope)
    with torch.device("meta"):
        backbone = MODELS.build(cfg.model.backbone)
        maps = backbone(torch.zeros(1, 3, 128, 96))
        sum(x.sum() for x in maps).backward()
    assert [tuple(x.shape) for x in maps] == [(1, 192 * 2**i, 32 // 2**i, 24 // 2**i) for i in range(4)]
    assert all(parameter.grad is not None for parameter in backbone.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "detection/cascade_mask_rcnn_dinat_large_3x.py",
        "detection/cascade_mask_rcnn_dinat_s_large_3x.py",
        "segmentation/upernet_dinat_large_160k.py",
        "segmentation/upernet_dinat_s_large_160k.py",
        "segmentation/mask2former_dinat_large_coco_instance.py",
        "segmentation/mask2former_dinat_large_ade20k_panoptic.py",
        "segmentation/mask2former_dinat_large_cityscapes_semantic.py",
    ],
)
def test_large_models_learn_and_predict(name, images):
    learn_and_predict(CONFIGS / name, images)
