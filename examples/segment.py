"""Train UPerNet with a NAT backbone on your images, with transformers' Trainer.

    python tools/make_data.py shapes data/shapes
    python examples/segment.py data/shapes --out output/upernet_hf

DATA has the layout that tools/make_data.py writes: images/{training,validation}/ and label maps in
annotations/{training,validation}/NAME.png, where 0 is ignored and 1 is the first class. `--backbone FOLDER|OWNER/NAME`
starts from pretrained weights, for example of shi-labs/nat-mini-in1k-224.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from natzoo import command_line

try:
    from transformers import (
        AutoBackbone,
        EvalPrediction,
        Trainer,
        TrainingArguments,
        UperNetConfig,
        UperNetForSemanticSegmentation,
    )

    from natzoo import hf
except ModuleNotFoundError as error:
    print(f"error: segment.py requires {error.name}; run pip install transformers accelerate.", file=sys.stderr)
    sys.exit(2)

_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_IGNORED = 255
_MEAN, _STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


class Segmentation(Dataset):
    """Images and label maps of one size; images are flipped at random in training."""

    def __init__(self, folder: Path, split: str, size: int, flip: bool):
        self.maps = sorted((folder / "annotations" / split).glob("*.png"))
        if not self.maps:
            raise FileNotFoundError(f"{folder}/annotations/{split} has no label maps; see tools/make_data.py.")
        names = {path.stem: path for path in (folder / "images" / split).iterdir()}
        self.images = [names[path.stem] for path in self.maps]
        self.size, self.flip = (size, size), flip

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = Image.open(self.images[index]).convert("RGB").resize(self.size, Image.Resampling.BILINEAR)
        labels = np.asarray(Image.open(self.maps[index]).resize(self.size, Image.Resampling.NEAREST)).astype(np.int64)
        pixels = torch.from_numpy(((np.asarray(image) / 255 - _MEAN) / _STD).transpose(2, 0, 1)).float()
        target = torch.from_numpy(np.where(labels == 0, _IGNORED, labels - 1))
        for axis in (1, 2) if self.flip else ():
            if torch.rand(()) < 0.5:
                pixels, target = pixels.flip(axis), target.flip(axis - 1)
        return {"pixel_values": pixels, "labels": target}


def make_model(backbone_name: str | None, classes: int) -> UperNetForSemanticSegmentation:
    """Create UPerNet for a number of classes, with a pretrained backbone or a new NAT-Mini."""
    if backbone_name:
        backbone = AutoBackbone.from_pretrained(backbone_name, out_features=_STAGES)
    else:
        backbone = AutoBackbone.from_config(hf.NatConfig(out_features=_STAGES, drop_path_rate=0.1))
    config = UperNetConfig(
        backbone_config=backbone.config,
        hidden_size=128,
        auxiliary_in_channels=backbone.channels[2],
        auxiliary_channels=64,
        num_labels=classes,
        loss_ignore_index=_IGNORED,
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone.load_state_dict(backbone.state_dict())
    return model


def mean_iou(prediction: EvalPrediction) -> dict[str, float]:
    """Return the mean IoU in percent over the classes that occur."""
    labels, found = prediction.label_ids, prediction.predictions
    classes = int(max(labels[labels != _IGNORED].max(), found.max())) + 1
    is_valid = labels != _IGNORED
    counts = np.bincount(labels[is_valid] * classes + found[is_valid], minlength=classes**2).reshape(classes, classes)
    union = counts.sum(0) + counts.sum(1) - counts.diagonal()
    return {"mIoU": float(100 * (counts.diagonal()[union > 0] / union[union > 0]).mean())}


def best_classes(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return the class of each pixel, which takes less memory than the logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(1)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, save and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--out", default="output/upernet_hf", metavar="DIR", help="folder of the model")
    parser.add_argument("--backbone", metavar="NAME", help="pretrained Nat or Dinat of transformers")
    parser.add_argument("--size", type=int, default=128, metavar="PIXELS", help="side of the images")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="number of updates")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images per update")
    parser.add_argument("--lr", type=float, default=5e-4, help="largest learning rate")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="data-loading workers")
    args = parser.parse_args(argv)
    if (Path(args.out) / "config.json").exists():
        raise ValueError(f"--out {args.out} already has a model; choose another folder.")
    train = Segmentation(args.data, "training", args.size, flip=True)
    validation = Segmentation(args.data, "validation", args.size, flip=False)
    classes = max(int(np.asarray(Image.open(path)).max()) for path in train.maps)
    model = make_model(args.backbone, classes)
    options = TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.lr,
        weight_decay=0.05,
        warmup_steps=args.steps // 20,
        lr_scheduler_type="cosine",
        logging_steps=20,
        save_strategy="no",
        dataloader_num_workers=args.workers,
        report_to=[],
    )
    trainer = Trainer(
        model,
        options,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=mean_iou,
        preprocess_logits_for_metrics=best_classes,
    )
    trainer.train()
    trainer.save_model()
    scores = trainer.evaluate()
    print(f"mIoU {scores['eval_mIoU']:.1f} on {len(validation)} images; saved {args.out}")
    return scores


if __name__ == "__main__":
    command_line.run(main)
