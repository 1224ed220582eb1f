"""Train RT-DETR with a NAT backbone on your images, with transformers' Trainer.

    python tools/make_data.py shapes data/shapes
    python examples/detect.py data/shapes --out output/rt_detr

DATA has the layout that tools/make_data.py writes: images/{training,validation}/ and
instances_{training,validation}.json in COCO's format. `--backbone FOLDER|OWNER/NAME` starts from pretrained weights,
for example of shi-labs/nat-mini-in1k-224; without it, the backbone is a NAT-Mini with random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from natzoo import command_line

try:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    from transformers import (
        AutoBackbone,
        RTDetrConfig,
        RTDetrForObjectDetection,
        RTDetrImageProcessor,
        Trainer,
        TrainingArguments,
    )

    from natzoo import hf
except ModuleNotFoundError as error:
    print(
        f"error: detect.py requires {error.name}; run pip install transformers accelerate pycocotools.", file=sys.stderr
    )
    sys.exit(2)

_STAGES = ["stage2", "stage3", "stage4"]  # strides 8, 16, 32


class Detection(Dataset):
    """Images and boxes in COCO's format, as RT-DETR expects them.

    Args:
        folder: the dataset.
        split: "training" or "validation".
        processor: resizes the images.
        flip: flip images at random, in both directions.

    Raises:
        FileNotFoundError: if there are no annotations.
    """

    def __init__(self, folder: Path, split: str, processor: RTDetrImageProcessor, flip: bool):
        self.images, self.processor, self.flip = folder / "images" / split, processor, flip
        annotations = folder / f"instances_{split}.json"
        if not annotations.is_file():
            raise FileNotFoundError(f"{annotations} does not exist; write it with tools/make_data.py.")
        with contextlib.redirect_stdout(io.StringIO()):
            self.coco = COCO(str(annotations))
        self.ids = sorted(self.coco.imgs)
        self.categories = sorted(self.coco.cats)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        key = self.ids[index]
        image = Image.open(self.images / self.coco.imgs[key]["file_name"]).convert("RGB")
        found = self.coco.imgToAnns[key]
        boxes = torch.tensor([one["bbox"] for one in found], dtype=torch.float32).reshape(-1, 4)
        boxes /= torch.tensor([image.width, image.height] * 2)
        boxes[:, :2] += boxes[:, 2:] / 2  # [x, y, width, height] of the center, in fractions of the image
        pixels = self.processor(images=image, return_tensors="pt").pixel_values[0]
        for axis in (0, 1) if self.flip else ():
            if torch.rand(()) < 0.5:
                pixels, boxes[:, axis] = pixels.flip(2 - axis), 1 - boxes[:, axis]
        labels = torch.tensor([self.categories.index(one["category_id"]) for one in found], dtype=torch.int64)
        return {"pixel_values": pixels, "labels": {"class_labels": labels, "boxes": boxes}}


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Batch images; boxes stay a list, because their number differs."""
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    return {"pixel_values": pixels, "labels": [sample["labels"] for sample in samples]}


def make_model(args: argparse.Namespace, names: list[str]) -> RTDetrForObjectDetection:
    """Create RT-DETR for these classes, with the backbone of --backbone or a new NAT-Mini."""
    if args.backbone:
        backbone = AutoBackbone.from_pretrained(args.backbone, out_features=_STAGES)
    else:
        backbone = AutoBackbone.from_config(hf.NatConfig(out_features=_STAGES, drop_path_rate=0.1))
    config = RTDetrConfig(
        backbone_config=backbone.config,
        encoder_in_channels=list(backbone.channels),
        encoder_hidden_dim=128,
        encoder_ffn_dim=256,
        d_model=128,
        decoder_in_channels=[128] * 3,
        decoder_ffn_dim=256,
        decoder_layers=3,
        num_queries=60,
        num_denoising=50,
        id2label=dict(enumerate(names)),
        label2id={name: number for number, name in enumerate(names)},
    )
    model = RTDetrForObjectDetection(config)
    model.model.backbone.model.load_state_dict(backbone.state_dict())
    return model


@torch.inference_mode()
def evaluate(model: RTDetrForObjectDetection, dataset: Detection, batch_size: int) -> dict[str, float]:
    """Return AP and AP50 in percent on a dataset, computed by pycocotools."""
    model.eval()
    found = []
    for start in range(0, len(dataset), batch_size):
        keys = dataset.ids[start : start + batch_size]
        batch = collate([dataset[index] for index in range(start, start + len(keys))])
        sizes = [(dataset.coco.imgs[key]["height"], dataset.coco.imgs[key]["width"]) for key in keys]
        output = model(batch["pixel_values"].to(model.device))
        results = dataset.processor.post_process_object_detection(output, threshold=0.01, target_sizes=sizes)
        for key, result in zip(keys, results, strict=True):
            for score, label, (left, top, right, bottom) in zip(
                result["scores"].tolist(), result["labels"].tolist(), result["boxes"].tolist(), strict=True
            ):
                box = [left, top, right - left, bottom - top]
                one = {"image_id": key, "category_id": dataset.categories[label], "bbox": box, "score": score}
                found.append(one)
    if not found:
        return {"AP": 0.0, "AP50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        metric = COCOeval(dataset.coco, dataset.coco.loadRes(found), "bbox")
        metric.evaluate()
        metric.accumulate()
        metric.summarize()
    return {"AP": 100 * metric.stats[0], "AP50": 100 * metric.stats[1]}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, save and evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_Help)
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--out", default="output/rt_detr", metavar="DIR", help="folder of the model")
    parser.add_argument("--backbone", metavar="NAME", help="pretrained Nat or Dinat of transformers")
    parser.add_argument("--size", type=int, default=96, metavar="PIXELS", help="side of the images")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="number of updates")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="images per update")
    parser.add_argument("--lr", type=float, default=5e-4, help="largest learning rate")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="data-loading workers")
    args = parser.parse_args(argv)
    if (Path(args.out) / "config.json").exists():
        raise ValueError(f"--out {args.out} already has a model; choose another folder.")
    processor = RTDetrImageProcessor(size={"height": args.size, "width": args.size})
    train = Detection(args.data, "training", processor, flip=True)
    validation = Detection(args.data, "validation", processor, flip=False)
    model = make_model(args, [train.coco.cats[key]["name"] for key in train.categories])
    options = TrainingArguments(
        args.out,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr,
        weight_decay=1e-4,
        warmup_steps=args.steps // 20,
        lr_scheduler_type="cosine",
        max_grad_norm=0.1,
        logging_steps=20,
        save_strategy="no",
        dataloader_num_workers=args.workers,
        remove_unused_columns=False,
        report_to=[],
    )
    Trainer(model, options, train_dataset=train, data_collator=collate).train()
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    scores = evaluate(model, validation, args.batch_size)
    (Path(args.out) / "scores.json").write_text(json.dumps(scores) + "\n")
    print(f"AP {scores['AP']:.1f}, AP50 {scores['AP50']:.1f} on {len(validation)} images; saved {args.out}")
    return scores


if __name__ == "__main__":
    command_line.run(main)
