"""How each command of the pages is run small: the first rule whose pattern is the whole command."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple


class Rule(NamedTuple):
    """What is done with the commands that a pattern matches.

    Attributes:
        pattern: a regular expression for the whole command.
        add: options put behind those that are printed, to make it small.
        replace: words that stand for what a reader fills in, or for more machines than there are, and what they become.
        quick: it takes a second, and is run in every test run.
        elsewhere: why it is only read here: which test runs it, or what it needs.
    """

    pattern: str
    add: str = ""
    replace: Mapping[str, str] = MappingProxyType({})
    quick: bool = False
    elsewhere: str = ""


_SMALL = "--device cpu --img-size 32 --crop-pct 1.0 --threads 1 --workers 0 --batch-size 4"
_SHORT = f"{_SMALL} --epochs 1 --warmup-epochs 0 --cooldown-epochs 0 --grad-accum 1 --amp none"
_ELSEWHERE = '--output "$(mktemp -d)"'  # where recipes of one name do not find each other's runs
_CLASSES = "--class-map classes.txt"  # a thousand, of which the drawn data has a few
_IMAGENET = f"{_SHORT} {_ELSEWHERE} {_CLASSES}"
_TINY = '--model-kwargs "depths=(1,1)" "num_heads=(1,2)" embed_dim=16 kernel_size=3'
_DILATED = f'{_TINY} "dilations=[[2],[1]]"'
_LOADERS = " ".join(
    f"{split}_dataloader.num_workers=0 {split}_dataloader.persistent_workers=False"
    for split in ("train", "val", "test")
)
_TEST = "--cfg-options test_dataloader.num_workers=0 test_dataloader.persistent_workers=False"
_ITERATIONS = "train_cfg.max_iters=2 train_cfg.val_interval=2 default_hooks.checkpoint.interval=2"
_QUICKSTART = f"--cfg-options {_ITERATIONS} train_dataloader.batch_size=2 {_LOADERS}"
_AGAIN = f'{_QUICKSTART} --work-dir "$(mktemp -d)"'  # the quickstart's folder holds its run
# The published recipes on pictures of a tenth of their side.
_RESIZED = {split: f"{split}_dataloader.dataset.pipeline" for split in ("train", "val", "test")}
_TEST_DETECTION = f'{_TEST} "{_RESIZED["test"]}.1.scale=(160,96)"'
_TEST_SEGMENTATION = f'{_TEST} "{_RESIZED["test"]}.1.scale=(256,64)"'
_CHOICE = f"{_RESIZED['train']}.3.transforms"
_RECIPE_DETECTION = (
    f"--cfg-options train_cfg.max_epochs=1 train_dataloader.batch_size=1 {_LOADERS} "
    f'"{_CHOICE}.0.0.scales=[(160,96)]" "{_CHOICE}.1.0.scales=[(160,96)]" "{_CHOICE}.1.1.crop_size=(48,64)" '
    f'"{_CHOICE}.1.2.scales=[(160,96)]" "{_RESIZED["val"]}.1.scale=(160,96)"'
)
_RECIPE_SEGMENTATION = (
    f"--cfg-options train_cfg.max_iters=1 train_cfg.val_interval=1 {_LOADERS} "
    '"model.data_preprocessor.size=(64,64)" '
    f'"{_RESIZED["train"]}.2.scale=(256,64)" "{_RESIZED["train"]}.3.crop_size=(64,64)" '
    f'"{_RESIZED["val"]}.1.scale=(256,64)"'
)

RULES = (
    # Setting up.
    Rule(
        r"bash tools/setup\.sh.*",
        elsewhere="tests/test_tools/test_setup.py, and test_quickstart.py for the whole of it",
    ),
    Rule(r"bash tools/quickstart\.sh", elsewhere="tests/test_tools/test_quickstart.py"),
    Rule(r"bash tools/test\.sh.*", elsewhere="it runs these tests"),
    Rule(r"bash tools/build_wheel\.sh dist", elsewhere="tests/test_tools/test_build_wheel.py"),
    Rule(r"bash tools/gpu_check\.sh|python tools/gpu_check\.py .*", elsewhere="tests/test_tools/test_gpu_check.py"),
    Rule(r"python -m (pytest|unittest) .*|python tests/.*", elsewhere="it runs tests"),
    Rule(r"(\.venv/bin/)?pip install .*|apt install .*", elsewhere="it needs the network"),
    Rule(r"python3 -m venv \.venv", elsewhere="tests/test_tools/test_quickstart.py"),
    Rule(r"\. \.venv/bin/activate", elsewhere="tests/test_tools/test_quickstart.py"),
    # Data.
    Rule(r"python tools/make_data\.py \w+ \S+", quick=True),
    # Classification.
    Rule(
        r"python classification/train\.py data/digits --config configs/quickstart/nat\.yml",
        "--epochs 1 --warmup-epochs 0 --workers 0",
    ),
    Rule(r"python classification/train\.py (DATA|SIGN_DIGITS) .*", _SHORT),
    Rule(r"python classification/train\.py --config \S+ --synthetic 64 .*", f"{_SHORT} {_TINY} {_ELSEWHERE}"),
    Rule(r"python classification/validate\.py data/digits .*"),
    Rule(r"python classification/validate\.py DATA --checkpoint .*", "--device cpu"),
    Rule(
        r"python classification/validate\.py \w+ --model \w+ --pretrained",
        f"--device cpu --img-size 32 --workers 0 {_CLASSES}",
    ),
    Rule(
        r"python classification/validate\.py \w+ --models .*",
        f"--models nat_mini --device cpu --img-size 32 --workers 0 {_CLASSES}",
    ),
    Rule(r"python classification/predict\.py .*"),
    Rule(
        r"torchrun .* classification/validate\.py \.\.\.",
        "--device cpu",
        {"8": "2", "...": "data/digits --checkpoint output/nat/best.pth"},
    ),
    Rule(
        r"bash classification/dist_train\.sh 8 configs/classification/nat_\S+ .*",
        f"{_IMAGENET} {_TINY}",
        {" 8 ": " 2 "},
    ),
    Rule(
        r"bash classification/dist_train\.sh 8 configs/classification/dinat_\S+ .*",
        f"{_IMAGENET} {_DILATED}",
        {" 8 ": " 1 "},
    ),
    Rule(r"NNODES=4 RDZV_ENDPOINT=\S+ bash classification/dist_train\.sh .*", elsewhere="it needs four machines"),
    Rule(r"(?s)#!/bin/bash\n#SBATCH .*", elsewhere="it needs Slurm, which made-up programs stand for where it is read"),
    # Detection and segmentation.
    Rule(r"python (detection|segmentation)/train\.py configs/quickstart/\S+", _QUICKSTART),
    Rule(
        r"python (detection|segmentation)/test\.py configs/quickstart/\S+ output/.*",
        _TEST,
        {"iter_400": "iter_2", "iter_500": "iter_2"},
    ),
    Rule(
        r"python (detection|segmentation)/train\.py configs/\w+/mine\.py .*",
        elsewhere="tests/test_openmmlab/test_configs.py, which takes the config from the page",
    ),
    Rule(r"python detection/train\.py CONFIG", _AGAIN, {"CONFIG": "configs/quickstart/mask_rcnn.py"}),
    Rule(r"python segmentation/train\.py CONFIG", _AGAIN, {"CONFIG": "configs/quickstart/upernet.py"}),
    Rule(
        r"bash detection/dist_train\.sh CONFIG 8",
        _AGAIN,
        {"CONFIG": "configs/quickstart/mask_rcnn.py", " 8": " 2"},
    ),
    Rule(
        r"bash segmentation/dist_train\.sh CONFIG 8",
        _AGAIN,
        {"CONFIG": "configs/quickstart/upernet.py", " 8": " 2"},
    ),
    Rule(
        r"\S+ detection/(test\.py|dist_test\.sh) CONFIG CHECKPOINT.*",
        _TEST,
        {"CONFIG": "configs/quickstart/mask_rcnn.py", "CHECKPOINT": "output/mask_rcnn/iter_2.pth", " 8": " 2"},
    ),
    Rule(
        r"\S+ segmentation/(test\.py|dist_test\.sh) CONFIG CHECKPOINT.*",
        _TEST,
        {"CONFIG": "configs/quickstart/upernet.py", "CHECKPOINT": "output/upernet/iter_2.pth", " 8": " 2"},
    ),
    Rule(r"python detection/test\.py configs/\S+ \w+ --show-dir \S+", _TEST_DETECTION),
    Rule(r"python segmentation/test\.py configs/\S+ \w+ --show-dir \S+", _TEST_SEGMENTATION),
    Rule(r"bash detection/dist_train\.sh configs/\S+ 8", _RECIPE_DETECTION, {" 8": " 1"}),
    Rule(r"bash segmentation/dist_train\.sh configs/\S+ 8", _RECIPE_SEGMENTATION, {" 8": " 1"}),
    # Tools.
    Rule(r"python tools/convert\.py", elsewhere="a mention; the commands of its docstring are run"),
    Rule(r"python tools/convert\.py work_dirs/\S+ .*", replace={"work_dirs/x/iter_160000": "output/upernet/iter_2"}),
    Rule(
        r"python tools/convert\.py output/(mask_rcnn|upernet)/.*", replace={"iter_400": "iter_2", "iter_500": "iter_2"}
    ),
    Rule(r"python tools/convert\.py .*"),
    Rule(r"python tools/download\.py (list.*|verify)", quick=True),
    Rule(r"python tools/download\.py get .*", replace={"NAME": "nat_mini"}),
    Rule(
        r"python tools/flops\.py (CONFIG|NAME)", replace={"CONFIG": "configs/quickstart/upernet.py", "NAME": "nat_mini"}
    ),
    Rule(r"python tools/flops\.py .*\.py", replace={"upernet_nat_*": "upernet_nat_mini_160k"}),
    Rule(r"python tools/flops\.py nat_mini --per-layer .*", quick=True),
    Rule(r"python tools/flops\.py .*"),
    Rule(r"python tools/plot\.py.*"),
    Rule(r"python tools/visualize\.py attention picture\.png \.\.\. .*", replace={" ...": ""}),
    Rule(r"python tools/visualize\.py attention PICTURE .*", replace={"PICTURE": "picture.png"}),
    Rule(
        r"python tools/visualize\.py salient .*",
        "--samples 1",
        {"*.jpg": "picture.png", "vit_base_patch16_224 nat_base --pretrained": "output/nat/best.pth"},
    ),
    Rule(
        r"python tools/visualize\.py receptive-field .*", "--inputs 1", {"nat_mini dinat_mini": "output/nat/best.pth"}
    ),
    Rule(r"python tools/visualize\.py neighborhood .*", "--size 6 --kernel-size 3"),
    Rule(r"python tools/visualize\.py .*", replace={"output/dinat": "output/nat"}),
    Rule(
        r"python tools/demo\.py .*",
        elsewhere="tests/test_tools/test_demo.py; it needs gradio, and serves until stopped",
    ),
    Rule(
        r"python tools/compare\.py SIGN_DIGITS .*",
        f"--output output/compare_small -- {_SHORT}",
        {"digits_*.yml --seeds 1 2 3": "digits_nat.yml configs/classification/sign_digits_dinat.yml --seeds 1"},
    ),
    Rule(r"python tools/compare\.py DATA .*", _SHORT, {"a.yml b.yml --seeds 1 2 3": "a.yml --seeds 1"}),
    Rule(r"python tools/benchmark_training\.py --help", quick=True),
    Rule(
        r"python tools/benchmark_training\.py .*",
        f"{_SHORT} {_TINY} --updates 1 --rounds 1",
        {"--synthetic 4096": "--synthetic 8"},
    ),
    Rule(r"python tools/benchmark\.py ops --list", quick=True),
    Rule(
        r"python tools/benchmark\.py (ops|layers).*", "--case b1_8x8_h2_d8_k3 --provider natten-reference --repeats 1"
    ),
    Rule(r"python tools/benchmark\.py models.*", "--case inference_b1_32 --provider nat_mini --repeats 1"),
    Rule(r"python -m natten\.profiler .* --dry-run .*", quick=True),
    Rule(r"python -m natten\.profiler .*", "--device cpu --repeats 1"),
    Rule(r"python tools/gpu_tiles\.py .*", "--dry-run"),
    Rule(r"python -m natten\.build( --list)?"),
    Rule(r"python -m natten\.geometry --.*", quick=True),
    Rule(r"python -m natten\.build --cpu .*", replace={"--cpu x86-64-v4 ": ""}),
)


def find(text: str) -> Rule | None:
    """The rule for a command."""
    return next((rule for rule in RULES if re.fullmatch(rule.pattern, text)), None)


def made_small(text: str, rule: Rule) -> str:
    """A command as it is run."""
    for old, new in rule.replace.items():
        text = text.replace(old, new)
    return f"{text} {rule.add}".strip()
