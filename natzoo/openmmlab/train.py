"""Training of detectors and segmenters from configs, with mmengine's runner; see detection/ and segmentation/."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict

from natzoo.openmmlab.checkpoints import latest_checkpoint
from natzoo.openmmlab.data import check_data
from natzoo.openmmlab.launch import is_first_process
from natzoo.openmmlab.options import Project, add_common_options, config_mistakes, load_config, make_runner
from natzoo.openmmlab.precision import set_precision


def make_parser(project: Project) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=f"Train from a config of configs/{project.name}.", allow_abbrev=False)
    parser.add_argument("config", help="the config")
    add_common_options(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="go on from the run's last checkpoint, or this one",
    )
    parser.add_argument(
        "--load-from", metavar="CHECKPOINT", help="start from a detector's or segmenter's weights, to fine-tune"
    )
    parser.add_argument(
        "--amp", action=argparse.BooleanOptionalAction, help="mixed precision; as the config says if not given"
    )
    parser.add_argument("--seed", type=int, help="of all random draws")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    return parser


def main(project: Project, argv: Sequence[str] | None = None) -> None:
    args = make_parser(project).parse_args(argv)
    cfg = load_config(args, project)
    check_data(cfg, ("train_dataloader", "val_dataloader"))
    set_precision(cfg, args.amp)
    _set_start(cfg, args)
    if args.seed is not None:
        cfg.randomness = {**cfg.get("randomness", {}), "seed": args.seed}
    if args.auto_scale_lr:
        if "auto_scale_lr" not in cfg:
            raise ValueError(
                f"{args.config} does not say for which batch its learning rate is: leave --auto-scale-lr out, or write "
                "auto_scale_lr = dict(base_batch_size=N) into it."
            )
        cfg.auto_scale_lr.enable = True
    with config_mistakes(cfg):
        make_runner(cfg, new_classes=not cfg.resume).train()


def _set_start(cfg: Config, args: argparse.Namespace) -> None:
    """Where the weights come from; a run to resume that has not begun, begins.

    Raises:
        ValueError: if the run's folder holds a run that is not resumed, which would be overwritten.
    """
    if args.resume and args.load_from:
        raise ValueError("--resume goes on with a run, --load-from starts one: give one of them.")
    wanted = args.resume
    if not wanted and not args.load_from and cfg.get("resume"):
        wanted = cfg.get("load_from") or "auto"
    latest = latest_checkpoint(cfg.work_dir)
    resumed = latest if wanted == "auto" else wanted
    if args.resume == "auto" and not latest and is_first_process():
        print(f"{cfg.work_dir} holds no checkpoint to go on from: this run begins", file=sys.stderr)
    if latest and (not resumed or Path(resumed).resolve().parent != latest.resolve().parent):
        raise ValueError(f"{latest} is there already: go on with it by --resume, or give another --work-dir.")
    cfg.resume = bool(resumed)
    if resumed or args.load_from:
        cfg.load_from = str(resumed or args.load_from)
    if cfg.get("load_from"):
        _leave_out_first_weights(cfg.model)


def _leave_out_first_weights(model: ConfigDict) -> None:
    """The backbone's, which would be fetched to be replaced at once."""
    backbone = model.get("backbone", {})
    for part, key in ((model, "pretrained"), (backbone, "pretrained"), (backbone, "init_cfg")):
        if key in part:
            part[key] = None
