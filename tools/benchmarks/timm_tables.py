"""Write measured models in the columns of timm's tables: `results/benchmark-infer-*.csv`, `benchmark-train-*.csv`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from flops import count_model

from benchmarks import models
from benchmarks.report import Row
from natzoo.checkpoints import write_table

INFER_COLUMNS = (
    *("model", "infer_img_size", "infer_samples_per_sec", "infer_step_time", "infer_batch_size"),
    *("param_count", "infer_gmacs", "infer_macts"),
)
TRAIN_COLUMNS = (
    *("model", "train_samples_per_sec", "train_step_time", "train_batch_size", "train_img_size", "param_count"),
)
_PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "tf32": "tf32"}


def write(folder: Path, rows: Iterable[Row]) -> list[Path]:
    """Write a table per pass and precision, fastest model first, and return the files.

    Steps take milliseconds; parameters and activations are in millions. Compiled models are in tables of their own,
    whose names end with -dynamo as timm's do.

    Args:
        folder: folder of the tables.
        rows: rows of report.py for models, measured or read.
    """
    tables: dict[str, list[Row]] = {}
    for row in rows:
        tables.setdefault(file_name(row), []).append(row)
    for name, found in tables.items():
        is_inference = found[0]["pass"] == "inference"
        columns, convert = (INFER_COLUMNS, _infer) if is_inference else (TRAIN_COLUMNS, _train)
        folder.mkdir(parents=True, exist_ok=True)
        ordered = sorted(found, key=lambda row: -float(row["images_per_s"]))
        write_table(folder / name, columns, (dict(zip(columns, convert(row), strict=True)) for row in ordered))
    return [folder / name for name in tables]


def file_name(row: Row) -> str:
    """Return timm's name of the table that a row belongs to."""
    is_gpu = row["device"] != "cpu"
    version = "".join(re.findall(r"\d+", str(row["torch_version"]).split("+")[0])[:3])
    cuda = f"cu{torch.version.cuda.replace('.', '')}" if is_gpu and torch.version.cuda else "cpu"
    machine = re.sub(r"\(.*?\)|processor|cpu", "", row["cpu_model"], flags=re.IGNORECASE)
    machine = re.sub("[^a-z0-9]+", "_", machine.lower()).strip("_")
    parts = [
        *("benchmark", "infer" if row["pass"] == "inference" else "train", _PRECISIONS[row["dtype"]]),
        *("nhwc" if is_gpu else "nchw", f"pt{version}", cuda, machine),
    ]
    return "-".join([*parts, *(["dynamo"] if models.parse(row["case"])[3] else [])]) + ".csv"


def _infer(row: Row) -> tuple[Any, ...]:
    _, batch, side, _ = models.parse(row["case"])
    whole = count_model(row["provider"], (side, side))[0][0]
    figures = (round(whole.parameters / 1e6, 2), round(whole.macs / 1e9, 2), round(whole.activations / 1e6, 2))
    return row["provider"], side, *_speed(row), batch, *figures


def _train(row: Row) -> tuple[Any, ...]:
    _, batch, side, _ = models.parse(row["case"])
    whole = count_model(row["provider"], (side, side))[0][0]
    return row["provider"], *_speed(row), batch, side, round(whole.parameters / 1e6, 2)


def _speed(row: Row) -> tuple[float, float]:
    return round(float(row["images_per_s"]), 2), round(float(row["p50_ms"]), 3)
