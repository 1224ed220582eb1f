"""Convert weights between formats.

    python tools/convert.py nat_mini nat_mini.safetensors                  published checkpoint
    python tools/convert.py nat_mini hf/nat_mini                           to a Hugging Face folder
    python tools/convert.py hf/nat_mini nat_mini.pth                       and back
    python tools/convert.py output/nat/best.pth best.safetensors           EMA weights of a training run
    python tools/convert.py work_dirs/x/iter_160000.pth published.pth      detector, without its optimizer
    python tools/convert.py maskrcnn_dinat_mini dinat_mini.pth --backbone  only its backbone

The source is a name from `tools/download.py list`, a file (.pth, .pth.tar, .pt, .bin, .safetensors, or .pkl of
detectron2), a Hugging Face folder, a URL, or hf-hub:OWNER/NAME. The suffix of the target selects its format; a target
without a suffix is a Hugging Face folder. Weights get their published names; those of detectors and segmenters keep
their names.

To write a backbone as a Hugging Face folder, pass --backbone and --model, and the dilations if they differ from those
of the classifier:
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
from natzoo.checkpoints.record import RECORD
from natzoo.classification.factory import create_model
from natzoo.classification.inference import create_from_checkpoint, read_with_record
from natzoo.classification.options import KeyValues

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="name, file, folder, URL or hf-hub:OWNER/NAME")
    parser.add_argument("target", type=Path, help="file or Hugging Face folder to create")
    parser.add_argument("--model", help="registered model name, if the source does not record it")
    parser.add_argument(
        "--model-kwargs", nargs="*", default={}, action=KeyValues, help="KEY=VALUE arguments of --model"
    )
    parser.add_argument("--backbone", action="store_true", help="convert only the backbone of a detector or segmenter")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights (default: unchanged)")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.target.is_file():
        raise ValueError(f"{args.target} already exists; choose another name.")
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
    """Write the backbone of a detector or segmenter."""
    if args.target.suffix:
        write_weights(args.target, weights)
    elif args.model is None:
        raise ValueError(f"{args.source} does not record the model of its backbone; pass --model.")
    else:
        from natzoo.hf import save_backbone_folder

        with torch.device("meta"):
            model = create_model(args.model, args.model_kwargs)
        save_backbone_folder(model, weights, args.target)
    report(args.target, weights)


def convert_detector(args: argparse.Namespace, weights: dict[str, Tensor]) -> None:
    """Write all weights of a detector or segmenter, without optimizer and training state."""
    if args.model or not args.target.suffix:
        raise ValueError(
            f"{args.source} is a detector or segmenter; pass a file as target and omit --model, or pass --backbone."
        )
    write_weights(args.target, weights)
    report(args.target, weights)


def convert_classifier(
    args: argparse.Namespace, checkpoint: dict[str, Any], weights: dict[str, Tensor], source: Path
) -> None:
    """Write a classifier, after checking its weights against its model if that is known."""
    weights = published_names(weights)
    known = zoo_entries().get(args.source)
    name = args.model or (known.name if known and known.task == "classification" else None)
    if name is None and RECORD not in checkpoint:
        if not args.target.suffix:
            raise ValueError(f"{source} does not record its model; pass --model.")
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
    """Print what was written."""
    path = target if target.suffix else target / "model.safetensors"
    millions = sum(x.numel() for x in weights.values()) / 1e6
    dtypes = ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in weights.values()}))
    print(f"{path}: {len(weights)} tensors, {millions:.1f} M parameters, {dtypes}, sha256 {sha256_of(path)}")


if __name__ == "__main__":
    command_line.run(main)
