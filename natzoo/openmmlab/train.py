"""Train detectors and segmenters; the commands are detection/train.py and segmentation/train.py."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from torch import nn

from natzoo import command_line
from natzoo.device import has_bfloat16_units
from natzoo.openmmlab.checkpoints import latest_checkpoint
from natzoo.openmmlab.data import check_data
from natzoo.openmmlab.runner import (
    Project,
    add_common_options,
    is_main_process,
    load_config,
    make_runner,
    report_unknown_keys,
)
from natzoo.runs import lock_folder


def make_parser(project: Project) -> argparse.ArgumentParser:
    """Return the parser of the training script of a subproject."""
    description = f"Train a model from a config in configs/{project.name}."
    parser = command_line.Parser(description=description)
    parser.add_argument("config", help="config file (.py)")
    add_common_options(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="continue a run from CHECKPOINT, or from the latest checkpoint in its folder",
    )
    parser.add_argument(
        "--load-from",
        metavar="CHECKPOINT",
        help="fine-tune the weights of a detector or segmenter: a path, URL or published name",
    )
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="mixed precision, float16 on GPUs and bfloat16 on CPUs (default: as in the config, but off on CPUs "
        "without bfloat16 units)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="random seed (default: as in the config, else random)")
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="scale the learning rate from auto_scale_lr.base_batch_size of the config to the total batch size",
    )
    return parser


def main(project: Project, argv: Sequence[str] | None = None) -> None:
    """Train with the given command-line arguments.

    Args:
        project: the subproject.
        argv: the arguments; None for those of the process.

    Raises:
        ValueError, FileNotFoundError: if the config, an option, a checkpoint or the data is unusable.
        DownloadError: if a checkpoint cannot be downloaded.
    """
    args = make_parser(project).parse_args(argv)
    cfg = load_config(args, project)
    check_data(cfg, ("train_dataloader", "val_dataloader"))
    set_precision(cfg, args.amp)
    if args.seed is not None:
        cfg.randomness = {**cfg.get("randomness", {}), "seed": args.seed}
    if args.auto_scale_lr:
        if "auto_scale_lr" not in cfg:
            raise ValueError(
                f"{args.config} has no auto_scale_lr, which --auto-scale-lr requires; add "
                "auto_scale_lr = dict(base_batch_size=N), with the batch size for which the learning rate was chosen."
            )
        cfg.auto_scale_lr.enable = True
    with lock_folder(Path(cfg.work_dir)) if is_main_process() else nullcontext(), report_unknown_keys(cfg):
        _set_start(cfg, args)
        make_runner(cfg, new_classes=not cfg.resume).train()


# ---------------------------------------------------------------------------------------------------------------------
# Initial weights
# ---------------------------------------------------------------------------------------------------------------------


def _set_start(cfg: Config, args: argparse.Namespace) -> None:
    """Set `load_from` and `resume` of a config from the options, or from its own `resume`.

    Without a checkpoint in the run folder, `--resume` starts from scratch.

    Raises:
        ValueError: if the options conflict, or if the run folder contains another run, which would be overwritten.
    """
    if args.resume and args.load_from:
        raise ValueError(
            "--resume and --load-from exclude each other; use --resume to continue a run, --load-from to start one."
        )
    requested = args.resume
    if not requested and not args.load_from and cfg.get("resume"):
        requested = cfg.get("load_from") or "auto"
    latest = latest_checkpoint(cfg.work_dir)
    resumed = latest if requested == "auto" else requested
    if args.resume == "auto" and not latest and is_main_process():
        print(f"no checkpoint found in {cfg.work_dir}; starting from scratch", file=sys.stderr)
    if latest and (not resumed or Path(resumed).resolve().parent != latest.resolve().parent):
        raise ValueError(f"{latest} already exists; continue that run with --resume, or choose another --work-dir.")
    cfg.resume = bool(resumed)
    if resumed or args.load_from:
        cfg.load_from = str(resumed or args.load_from)
    if cfg.get("load_from"):
        _drop_backbone_weights(cfg.model)


def _drop_backbone_weights(model: ConfigDict) -> None:
    """Remove the initial weights of the backbone, which the checkpoint replaces."""
    backbone = model.get("backbone", {})
    for part, key in ((model, "pretrained"), (backbone, "pretrained"), (backbone, "init_cfg")):
        if key in part:
            part[key] = None


# ---------------------------------------------------------------------------------------------------------------------
# Mixed precision
# ---------------------------------------------------------------------------------------------------------------------

_MIXED_WRAPPERS = ("AmpOptimWrapper", "CpuAmpOptimWrapper")
_AMP_OPTIONS = ("loss_scale", "dtype", "use_fsdp")  # accepted by AmpOptimWrapper only


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """Optimizer wrapper for mixed precision on CPUs: bfloat16 autocast, which requires no loss scaling."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        with super().optim_context(model), torch.autocast("cpu", torch.bfloat16):
            yield


def set_precision(cfg: Config, amp: bool | None) -> None:
    """Choose the optimizer wrapper for this device: mmengine's (float16) on GPUs, bfloat16 on CPUs.

    A CPU without instructions for bfloat16 is many times slower with it. There, mixed precision is used only if it is
    requested, not if it is merely the choice of the config; one line says so.

    Args:
        cfg: the config to change.
        amp: use mixed precision; None to keep the choice of the config.
    """
    wrapper = cfg.optim_wrapper
    is_mixed = wrapper.get("type", "OptimWrapper") in _MIXED_WRAPPERS if amp is None else amp
    if is_mixed and not torch.cuda.is_available() and not has_bfloat16_units():
        is_mixed = amp is not None
        if is_main_process():
            choice = "--no-amp is faster" if is_mixed else "training in float32 (--amp for bfloat16)"
            print(f"mixed precision is slow on this CPU, which has no bfloat16 units; {choice}", file=sys.stderr)
    if is_mixed and torch.cuda.is_available():
        wrapper.type = "AmpOptimWrapper"
        return
    wrapper.type = "CpuAmpOptimWrapper" if is_mixed else "OptimWrapper"
    for option in _AMP_OPTIONS:
        wrapper.pop(option, None)
