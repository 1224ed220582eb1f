"""Evaluation of detectors and segmenters from configs, with mmengine's runner; see detection/ and segmentation/."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, ConfigDict

from natzoo.openmmlab.data import check_data
from natzoo.openmmlab.launch import count_processes
from natzoo.openmmlab.options import Project, add_common_options, config_mistakes, load_config, make_runner

# By a metric's type: its option that says what it measures, and what it can.
_MEASURES = {
    "CocoMetric": ("metric", ("bbox", "segm", "proposal")),
    "IoUMetric": ("iou_metrics", ("mIoU", "mDice", "mFscore")),
}


def make_parser(project: Project) -> argparse.ArgumentParser:
    description = f"Evaluate a checkpoint with a config of configs/{project.name}."
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("config", help="the config")
    parser.add_argument("checkpoint", help="path, URL, or name of published weights (tools/download.py list)")
    add_common_options(parser)
    measures = [measure for _, known in _MEASURES.values() for measure in known]
    parser.add_argument("--eval", nargs="+", choices=measures, help="what to measure; as the config says if not given")
    parser.add_argument(
        "--show-dir", type=Path, help="folder for pictures with what was found drawn on them, by one process alone"
    )
    parser.add_argument("--show-score", type=float, default=0.3, help="lowest score of the boxes drawn")
    parser.add_argument("--out", type=Path, help="file of all predictions (.pkl of mmengine)")
    parser.add_argument(
        *("--tta", "--aug-test"),
        action="store_true",
        help="several scales and flips, where the config has tta_pipeline",
    )
    return parser


def main(project: Project, argv: Sequence[str] | None = None) -> dict[str, float]:
    args = make_parser(project).parse_args(argv)
    cfg = load_config(args, project)
    check_data(cfg, ("test_dataloader",))
    cfg.load_from, cfg.resume = args.checkpoint, False
    if args.eval:
        _set_measures(cfg, args.eval)
    if args.tta:
        _set_tta(cfg)
    if args.show_dir:
        _set_pictures(cfg, args.show_dir, args.show_score)
    if args.out:
        cfg.test_evaluator = [*_metrics(cfg), {"type": "DumpResults", "out_file_path": str(args.out)}]
    with config_mistakes(cfg):
        results = make_runner(cfg).test()
    if args.show_dir:
        print(f"pictures are in {args.show_dir}")
    return results


def _metrics(cfg: Config) -> list[ConfigDict]:
    metrics = cfg.test_evaluator
    return list(metrics) if isinstance(metrics, (list, tuple)) else [metrics]


def _set_measures(cfg: Config, measures: Sequence[str]) -> None:
    """Lets the config's metrics measure these."""
    able = [metric for metric in _metrics(cfg) if set(measures) <= set(_MEASURES.get(metric.type, (None, ()))[1])]
    if not able:
        raise ValueError(f"{cfg.filename} has no metric that measures {' '.join(measures)}: leave --eval out.")
    for metric in able:
        metric[_MEASURES[metric.type][0]] = list(measures)


def _set_tta(cfg: Config) -> None:
    if "tta_pipeline" not in cfg or "tta_model" not in cfg:
        raise ValueError(f"{cfg.filename} has no tta_pipeline and tta_model, which --tta needs.")
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model


def _set_pictures(cfg: Config, folder: Path, score: float) -> None:
    """Lets the visualisation hook draw each picture.

    Raises:
        ValueError: in one of several processes, of which mmengine lets the first alone draw, its own share.
    """
    if count_processes() > 1:
        raise ValueError(
            f"--show-dir draws in one process alone, but there are {count_processes()}: use test.py for it."
        )
    if cfg.default_scope == "mmdet":
        hook = {"type": "DetVisualizationHook", "test_out_dir": str(folder.resolve()), "score_thr": score}
    else:
        hook = {"type": "SegVisualizationHook", "interval": 1}
        cfg.visualizer.vis_backends = [ConfigDict(type="LocalVisBackend", img_save_dir=str(folder.resolve()))]
    cfg.default_hooks.visualization = {**hook, "draw": True}
