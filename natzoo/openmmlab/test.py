"""Evaluate detectors and segmenters; the commands are detection/test.py and segmentation/test.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict

from natzoo import command_line
from natzoo.openmmlab.data import check_data
from natzoo.openmmlab.runner import (
    Project,
    add_common_options,
    load_config,
    make_runner,
    report_unknown_keys,
    world_size,
)

# Metric type -> the option that selects its measures, and the measures it supports.
_MEASURES = {
    "CocoMetric": ("metric", ("bbox", "segm", "proposal")),
    "IoUMetric": ("iou_metrics", ("mIoU", "mDice", "mFscore")),
}


def make_parser(project: Project) -> argparse.ArgumentParser:
    """Return the parser of the evaluation script of a subproject."""
    description = f"Evaluate a checkpoint with a config in configs/{project.name}."
    parser = command_line.Parser(description=description)
    parser.add_argument("config", help="config file (.py)")
    parser.add_argument("checkpoint", help="path, URL or name of a published checkpoint")
    add_common_options(parser)
    measures = [measure for _, supported in _MEASURES.values() for measure in supported]
    parser.add_argument(
        "--eval",
        nargs="+",
        choices=measures,
        metavar="METRIC",
        help="bbox, segm or proposal for COCO annotations, mIoU, mDice or mFscore for semantic segmentation (default: "
        "those of the config)",
    )
    parser.add_argument(
        "--show-dir",
        type=Path,
        metavar="DIR",
        help="save the images with predictions drawn on them (one process only)",
    )
    parser.add_argument(
        "--show-score",
        type=float,
        default=0.3,
        metavar="S",
        help="minimum score of drawn boxes (default: 0.3)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="save all predictions to a .pkl file")
    parser.add_argument(
        *("--tta", "--aug-test"),
        action="store_true",
        help="test-time augmentation: several scales and flips, for configs with a tta_pipeline",
    )
    return parser


def main(project: Project, argv: Sequence[str] | None = None) -> dict[str, float]:
    """Evaluate with the given command-line arguments and return the metrics.

    Args:
        project: the subproject.
        argv: the arguments; None for those of the process.

    Raises:
        ValueError, FileNotFoundError: if the config, an option, the checkpoint or the data is unusable.
        DownloadError: if the checkpoint cannot be downloaded.
    """
    args = make_parser(project).parse_args(argv)
    cfg = load_config(args, project)
    check_data(cfg, ("test_dataloader",))
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.eval:
        _set_measures(cfg, args.eval)
    if args.tta:
        _set_tta(cfg)
    if args.show_dir:
        _set_visualization(cfg, args.show_dir, args.show_score)
    if args.out:
        cfg.test_evaluator = [*_metrics(cfg), {"type": "DumpResults", "out_file_path": str(args.out)}]
    with report_unknown_keys(cfg):
        results = make_runner(cfg).test()
    if args.show_dir:
        print(f"Saved images to {args.show_dir}")
    return results


def _metrics(cfg: Config) -> list[ConfigDict]:
    metrics = cfg.test_evaluator
    return list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]


def _set_measures(cfg: Config, measures: Sequence[str]) -> None:
    """Select what the config's metrics measure."""
    supporting = [metric for metric in _metrics(cfg) if set(measures) <= set(_MEASURES.get(metric.type, (None, ()))[1])]
    if not supporting:
        raise ValueError(
            f"--eval {' '.join(measures)} is not supported by the metrics of {cfg.filename}; omit --eval to use those."
        )
    for metric in supporting:
        metric[_MEASURES[metric.type][0]] = list(measures)


def _set_tta(cfg: Config) -> None:
    if "tta_pipeline" not in cfg or "tta_model" not in cfg:
        raise ValueError(f"--tta requires tta_pipeline and tta_model, which {cfg.filename} does not define.")
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model


def _set_visualization(cfg: Config, folder: Path, score: float) -> None:
    """Let the visualization hook draw the predictions of each image.

    Raises:
        ValueError: in a distributed run: mmengine draws only the images of the first process.
    """
    if world_size() > 1:
        raise ValueError(f"--show-dir requires one process, not {world_size()}; use test.py instead of dist_test.sh.")
    if cfg.default_scope == "mmdet":
        hook = {"type": "DetVisualizationHook", "test_out_dir": str(folder.resolve()), "score_thr": score}
    else:
        hook = {"type": "SegVisualizationHook", "interval": 1}
        cfg.visualizer.vis_backends = [ConfigDict(type="LocalVisBackend", img_save_dir=str(folder.resolve()))]
    cfg.default_hooks.visualization = {**hook, "draw": True}
