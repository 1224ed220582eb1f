"""Weights from one form to another.

    python tools/convert.py nat_mini nat_mini.safetensors                  a published checkpoint, by its name
    python tools/convert.py nat_mini hf/nat_mini                           as a folder of Hugging Face
    python tools/convert.py hf/nat_mini nat_mini.pth                       and back
    python tools/convert.py output/nat/best.pth best.safetensors           what train.py wrote, averaged if it is
    python tools/convert.py work_dirs/x/iter_160000.pth published.pth      a detector, without its optimizer
    python tools/convert.py maskrcnn_dinat_mini dinat_mini_coco.pth --backbone

The source is a name that `tools/download.py list` shows, a file (.pth, .pth.tar, .pt, .bin, .safetensors, detectron2's
.pkl), a folder, a URL, or hf-hub:OWNER/NAME. The target's ending tells its form; without one it is a folder of Hugging
Face. Names of weights become the published ones; of a detector or segmenter all parts keep theirs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import natzoo  # noqa: F401  registers the models
from natzoo import command_line
from natzoo.checkpoints import load_weights, locate, read_checkpoint, weights_of, write_weights
from natzoo.checkpoints.adapt import published_names
from natzoo.checkpoints.download import sha256_of
from natzoo.checkpoints.zoo import entries

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="name, file, folder, URL or hf-hub:OWNER/NAME")
    parser.add_argument("target", type=Path, help="file to write, or without an ending a new folder of Hugging Face")
    parser.add_argument("--model", help="registered name of the classifier, where the source does not tell")
    parser.add_argument("--backbone", action="store_true", help="of a detector or segmenter, take the backbone alone")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights; the source's own unless given")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    source = locate(args.source)
    checkpoint = read_checkpoint(source)
    weights = weights_of(checkpoint, source)
    record = model_record(args, checkpoint)
    is_detector = any(name.startswith("backbone.") for name in weights)
    if not is_detector or args.backbone:
        weights = published_names(weights)
    if args.dtype:
        weights = {name: x.to(DTYPES[args.dtype]) if x.is_floating_point() else x for name, x in weights.items()}
    if args.target.suffix:
        write_weights(args.target, weights, None if is_detector else complete(record, weights, source))
        report(args.target, weights)
    else:
        write_folder(args.target, weights, record, source)


def model_record(args: argparse.Namespace, checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """Of which model the weights are: what train.py noted, else the one named, else that of the published name."""
    if isinstance(checkpoint.get("record"), dict):
        return checkpoint["record"]
    known = entries().get(args.source)
    name = args.model or (known.name if known and known.task == "classification" else None)
    return None if name is None else {"model": name, "model_kwargs": {}, "classes": None, "preprocessing": {}}


def complete(record: dict[str, Any] | None, weights: dict[str, Tensor], source: Path) -> dict[str, Any] | None:
    """The record, with the number of classes; the weights are checked to fit the model.

    Raises:
        ValueError: if they do not.
    """
    if record is None:
        return None
    return {**record, "num_classes": build(record, weights, source).num_classes}


def build(record: dict[str, Any], weights: dict[str, Tensor], source: Path) -> torch.nn.Module:
    """The recorded model with these weights."""
    if not timm.is_model(record["model"]):
        raise ValueError(f"there is no model {record['model']!r}: `timm.list_models()` shows all.")
    classes = len(weights["head.weight"]) if "head.weight" in weights else 0
    model = timm.create_model(record["model"], **{**record["model_kwargs"], "num_classes": classes})
    for note in load_weights(model, weights, source):
        print(f"{source}: {note}")
    return model.to(next(iter(weights.values())).dtype).eval()


def write_folder(target: Path, weights: dict[str, Tensor], record: dict[str, Any] | None, source: Path) -> None:
    """A folder for transformers, which needs to know the model."""
    if record is None:
        raise ValueError(f"{source} does not say which classifier it is of: name it with --model.")
    try:
        from natzoo.hf import save_folder
    except ModuleNotFoundError as error:
        raise ValueError(f"{target} cannot be written: {error}") from error
    model = build(record, weights, source)
    model.pretrained_cfg = {**model.pretrained_cfg, **record["preprocessing"]}
    save_folder(model, target, record["classes"])
    report(target / "model.safetensors", weights)


def report(path: Path, weights: dict[str, Tensor]) -> None:
    millions = sum(x.numel() for x in weights.values()) / 1e6
    dtypes = ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in weights.values()}))
    print(f"{path}: {len(weights)} weights, {millions:.1f} million numbers, {dtypes}, sha256 {sha256_of(path)}")


if __name__ == "__main__":
    command_line.run(main)
