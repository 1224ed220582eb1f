"""Detect or segment in pictures; the commands are detection/predict.py and segmentation/predict.py.

mmdet's and mmseg's inferencers predict, and their visualizers draw. This module reads pictures, folders, videos and
URLs, and writes the results.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.apis import DetInferencer
from mmdet.evaluation import INSTANCE_OFFSET
from mmdet.structures.mask import encode_mask_results
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.structures import BaseDataElement
from mmseg.apis import MMSegInferencer
from panopticapi.utils import id2rgb
from PIL import Image, ImageOps
from torch import nn
from tqdm import tqdm

from natzoo import command_line
from natzoo.checkpoints import fit_detector, write_atomically
from natzoo.classification.data.pictures import Picture, Pictures
from natzoo.classification.options import batch_size, fraction, positive
from natzoo.command_line import printable
from natzoo.device import explain_memory_errors, pick_device
from natzoo.openmmlab.checkpoints import PATH_KEY
from natzoo.openmmlab.runner import Project, add_config_options, load_config


def make_parser(project: Project) -> argparse.ArgumentParser:
    """Return the parser of the prediction script of a subproject."""
    parser = command_line.Parser(description=f"Predict with a model from a config in configs/{project.name}.")
    parser.add_argument("config", help="config file (.py)")
    parser.add_argument("checkpoint", help="path, URL or name of a published checkpoint")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders, videos or URLs")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the results (default: output/<config name>/predictions)"
    )
    parser.add_argument("--every", type=positive, default=1, metavar="N", help="use every N-th frame of a video")
    parser.add_argument(
        "--score", type=fraction, default=0.3, metavar="S", help="minimum score of objects (default: 0.3)"
    )
    parser.add_argument("--batch-size", type=batch_size, default=1, metavar="N", help="batch size (default: 1)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto uses the GPU if there is one")
    add_config_options(parser)
    parser.set_defaults(data=None, work_dir=None)  # which `load_config` reads
    return parser


def main(project: Project, argv: Sequence[str] | None = None) -> None:
    """Predict with the given command-line arguments.

    Each picture is drawn as OUT/NAME.jpg. OUT/NAME.json holds the objects of a detector, OUT/NAME.png the class of each
    pixel of a semantic segmenter, or the segments of a panoptic one in COCO's encoding.

    Args:
        project: the subproject.
        argv: the arguments; None for those of the process.

    Raises:
        ValueError: after all pictures, if some could not be read; or if the config, an option or the checkpoint is
            unusable.
        FileNotFoundError: if the config or the checkpoint does not exist.
        DownloadError: if the checkpoint cannot be downloaded.
    """
    args = make_parser(project).parse_args(argv)
    cfg = load_config(args, project)
    folder = args.out or Path(cfg.work_dir) / "predictions"
    pictures = Pictures(args.images, args.every)
    predictor = make_inferencer(cfg, args.checkpoint, str(pick_device(args.device)))
    count = 0
    for batch in pictures.batches(args.batch_size):
        pixels = [_pixels(picture) for picture in batch]
        with explain_memory_errors("lower --batch-size"):
            samples = [
                sample for data in predictor.preprocess(pixels, len(pixels)) for sample in _forward(predictor, data)
            ]
        for picture, image, sample in zip(batch, pixels, samples, strict=True):
            path = folder / f"{picture.stem}.jpg"
            command_line.create_folder(path.parent, "--out")
            content = _draw(predictor, image, sample, args.score)
            write_atomically(path, lambda file, content=content: file.write(content))
            summary = write_prediction(path, sample, predictor.model.dataset_meta["classes"], args.score)
            tqdm.write(printable(f"{picture.name}: {summary}").replace("\n", "\\n"))
            count += 1
    print(f"Saved {count} pictures and their predictions to {folder}")
    pictures.raise_errors()


class _CheckedWeights:
    """Inferencer that loads weights strictly, and takes the classes and colors of the config's test dataset."""

    def _load_weights_to_model(self, model: nn.Module, checkpoint: dict[str, Any], cfg: Config) -> None:
        weights, _ = fit_detector(checkpoint["state_dict"], model, checkpoint[PATH_KEY])
        model.load_state_dict(weights)
        model.dataset_meta = DATASETS.build({**cfg.test_dataloader.dataset, "lazy_init": True}).metainfo


class _Detector(_CheckedWeights, DetInferencer):
    pass


class _Segmenter(_CheckedWeights, MMSegInferencer):
    pass


def make_inferencer(cfg: Config, checkpoint: str, device: str) -> DetInferencer | MMSegInferencer:
    """Create the inferencer of mmdet or mmseg for a config.

    Args:
        cfg: a config from `load_config`.
        checkpoint: path, URL or published name.
        device: device of the model.

    Raises:
        ValueError: if the checkpoint belongs to another model.
        FileNotFoundError, DownloadError: if it cannot be found or downloaded.
    """
    init_default_scope(cfg.default_scope)
    pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.test_dataloader.dataset.pipeline = [step for step in pipeline if not _loads_annotations(step["type"])]
    cfg.visualizer.vis_backends = None  # it only draws; nothing is logged
    kind = _Detector if cfg.default_scope == "mmdet" else _Segmenter
    predictor = kind(cfg, checkpoint, device=device, scope=cfg.default_scope)
    predictor.visualizer.dataset_meta = predictor.model.dataset_meta
    return predictor


def _loads_annotations(step: str) -> bool:
    return step.startswith("Load") and step.endswith("Annotations")


def _forward(predictor: Any, data: Any) -> list[BaseDataElement]:
    # DetInferencer's batches also hold the images.
    return predictor.forward(data[1] if isinstance(predictor, DetInferencer) else data)


def _pixels(picture: Picture) -> np.ndarray:
    """Return an image [H, W, 3] in BGR, turned as its metadata says, as OpenCV reads it."""
    return np.ascontiguousarray(np.asarray(ImageOps.exif_transpose(picture.image))[..., ::-1])


def _draw(predictor: Any, pixels: np.ndarray, sample: BaseDataElement, score: float) -> bytes:
    """Return an image with the prediction drawn on it, as JPEG."""
    options = {"pred_score_thr": score} if isinstance(predictor, DetInferencer) else {}
    if "pred_panoptic_seg" in sample and not _segments(sample, predictor.model.dataset_meta["classes"]):
        sample = sample.clone()
        del sample.pred_panoptic_seg  # mmdet cannot draw a panoptic map without segments
    predictor.visualizer.add_datasample("picture", pixels[..., ::-1], sample, draw_gt=False, **options)
    content = io.BytesIO()
    Image.fromarray(predictor.visualizer.get_image()).save(content, "JPEG", quality=92)
    return content.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Predictions
# ---------------------------------------------------------------------------------------------------------------------


def write_prediction(path: Path, sample: BaseDataElement, classes: Sequence[str], score: float) -> str:
    """Write a prediction next to the drawn picture, and return a summary of it.

    Args:
        path: path of the drawn picture; the prediction has the suffix .json or .png.
        sample: the prediction.
        classes: class names.
        score: minimum score of objects.
    """
    parts = []
    if "pred_sem_seg" in sample:
        labels = sample.pred_sem_seg.data[0].cpu().numpy().astype(np.uint8)
        _write_png(path.with_suffix(".png"), labels)
        shares = Counter(dict(enumerate(np.bincount(labels.ravel(), minlength=len(classes)) / labels.size)))
        parts += [f"{classes[label]} {share:.0%}" for label, share in shares.most_common(5) if share >= 0.005]
    if "pred_panoptic_seg" in sample:
        segments = _write_panoptic(path.with_suffix(".png"), sample, classes)
        parts += [f"{count} {name}" for name, count in Counter(one["class"] for one in segments).most_common()]
        _write_json(path.with_suffix(".json"), segments)
    elif "pred_instances" in sample:
        objects = _objects(sample.pred_instances, classes, score)
        parts += [f"{count} {name}" for name, count in Counter(one["class"] for one in objects).most_common()]
        _write_json(path.with_suffix(".json"), objects)
    return ", ".join(parts) or "nothing found"


def _objects(found: Any, classes: Sequence[str], score: float) -> list[dict[str, Any]]:
    """Return the objects: class, score, bbox [x, y, width, height] in pixels, and mask as COCO's RLE."""
    found = found[found.scores >= score].cpu()
    masks = encode_mask_results(found.masks) if "masks" in found else [None] * len(found)
    objects = []
    for label, value, box, mask in zip(found.labels, found.scores, found.bboxes, masks, strict=True):
        left, top, right, bottom = box.tolist()
        one = {"class": classes[label], "score": round(value.item(), 4)}
        one["bbox"] = [round(side, 2) for side in (left, top, right - left, bottom - top)]
        if mask is not None:
            one["segmentation"] = {**mask, "counts": mask["counts"].decode()}
        objects.append(one)
    return objects


def _segments(sample: BaseDataElement, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return the segments of a panoptic map: id and class."""
    keys = np.unique(sample.pred_panoptic_seg.sem_seg.cpu().numpy()).tolist()
    return [
        {"id": key + 1, "class": classes[key % INSTANCE_OFFSET]} for key in keys if key % INSTANCE_OFFSET < len(classes)
    ]


def _write_panoptic(path: Path, sample: BaseDataElement, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Write a panoptic map in COCO's encoding, where 0 means no segment, and return its segments."""
    segments = _segments(sample, classes)
    ids = sample.pred_panoptic_seg.sem_seg[0].cpu().numpy().astype(np.int64) + 1
    is_segment = np.isin(ids, [segment["id"] for segment in segments])
    _write_png(path, id2rgb(np.where(is_segment, ids, 0)))
    return segments


def _write_png(path: Path, pixels: np.ndarray) -> None:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    write_atomically(path, lambda file: file.write(content.getvalue()))


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, lambda file: file.write(f"{json.dumps(value, indent=1)}\n".encode()))
