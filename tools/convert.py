"""Weights from one form to another.

    python tools/convert.py nat_mini nat_mini.safetensors                  a published checkpoint, by its name
    python tools/convert.py nat_mini hf/nat_mini                           as a folder of Hugging Face
    python tools/convert.py hf/nat_mini nat_mini.pth                       and back
    python tools/convert.py output/nat/best.pth best.safetensors           what train.py wrote, averaged if it is
    python tools/convert.py work_dirs/x/iter_160000.pth published.pth      a detector, without its optimizer
    python tools/convert.py maskrcnn_dinat_mini dinat_mini.pth --backbone  its backbone alone

The source is a name that `tools/download.py list` shows, a file (.pth, .pth.tar, .pt, .bin, .safetensors, detectron2's
.pkl), a folder, a URL, or hf-hub:OWNER/NAME. The target's ending tells its form; without one it is a folder of Hugging
Face. Names of weights become the published ones; of a detector or segmenter all parts keep theirs.

With --backbone, a folder takes --model, and the dilations where the detector has others than that classifier:
    --model dinat_mini --model-kwargs "dilations=[[1,28,1],[1,7,1,14],[1,3,1,5,1,7],[1,3,1,3,1]]"
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from natzoo import command_line
from natzoo.checkpoints import weights_of, write_weights, zoo_entries
from natzoo.checkpoints.adapt import backbone_prefix, published_names, unwrapped
from natzoo.checkpoints.download import sha256_of
from natzoo.checkpoints.write import RECORD
from natzoo.classification.factory import create_model
from natzoo.classification.inference import create_from_checkpoint, read_with_record
from natzoo.classification.options import KeyValues

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="name, file, folder, URL or hf-hub:OWNER/NAME")
    parser.add_argument("target", type=Path, help="new file, or without an ending a new folder of Hugging Face")
    parser.add_argument("--model", help="registered name of the classifier, where the source does not tell")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=KeyValues, help="KEY=VALUE for --model")
    parser.add_argument("--backbone", action="store_true", help="of a detector or segmenter, take the backbone alone")
    parser.add_argument("--dtype", choices=DTYPES, help="of the written weights; the source's own unless given")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.target.is_file():
        raise ValueError(f"{args.target} exists already: choose another name.")
    checkpoint, source = read_with_record(args.source)
    weights = unwrapped(weights_of(checkpoint, source))
    if args.dtype:
        weights = {name: x.to(DTYPES[args.dtype]) if x.is_floating_point() else x for name, x in weights.items()}
    if args.backbone:
        convert_backbone(args, published_names(weights))
    elif backbone_prefix(weights):
        convert_detector(args, weights)
    else:
        convert_classifier(args, checkpoint, weights, source)


def convert_backbone(args: argparse.Namespace, weights: dict[str, Tensor]) -> None:
    """Writes a detector's backbone."""
    if args.target.suffix:
        write_weights(args.target, weights)
    elif args.model is None:
        raise ValueError(f"{args.source} does not say which model its backbone is: name it with --model.")
    else:
        from natzoo.hf import save_backbone_folder

        with torch.device("meta"):
            model = create_model(args.model, args.model_kwargs)
        save_backbone_folder(model, weights, args.target)
    report(args.target, weights)


def convert_detector(args: argparse.Namespace, weights: dict[str, Tensor]) -> None:
    """Writes all of a detector or segmenter, the weights alone."""
    if args.model or not args.target.suffix:
        raise ValueError(
            f"{args.source} is a detector or segmenter: take a file as target and no --model, or --backbone."
        )
    write_weights(args.target, weights)
    report(args.target, weights)


def convert_classifier(
    args: argparse.Namespace, checkpoint: dict[str, Any], weights: dict[str, Tensor], source: Path
) -> None:
    """Writes a classifier; where its model is known, after a check that the weights are its."""
    weights = published_names(weights)
    known = zoo_entries().get(args.source)
    name = args.model or (known.name if known and known.task == "classification" else None)
    if name is None and RECORD not in checkpoint:
        if not args.target.suffix:
            raise ValueError(f"{source} does not say which classifier it is of: name it with --model.")
        write_weights(args.target, weights)
    else:
        classes = len(weights["head.weight"]) if "head.weight" in weights else 0
        model, record = create_from_checkpoint(
            checkpoint, str(source), name, {"num_classes": classes, **args.model_kwargs}
        )
        if args.target.suffix:
            write_weights(args.target, weights, {**record, "num_classes": model.num_classes})
        else:
            from natzoo.hf import save_folder

            model.pretrained_cfg = {**model.pretrained_cfg, **record["preprocessing"]}
            model = model.to(next(iter(weights.values())).dtype).eval()
            save_folder(model, args.target, record["classes"])
    report(args.target, weights)


def report(target: Path, weights: dict[str, Tensor]) -> None:
    path = target if target.suffix else target / "model.safetensors"
    millions = sum(x.numel() for x in weights.values()) / 1e6
    dtypes = ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in weights.values()}))
    print(f"{path}: {len(weights)} weights, {millions:.1f} million numbers, {dtypes}, sha256 {sha256_of(path)}")


if __name__ == "__main__":
    command_line.run(main)
