"""nat_tiny against swin_tiny on a GPU: inference, latency of one image, training steps."""

from __future__ import annotations

import timm
import torch
from torch import Tensor

import natzoo  # noqa: F401  registers our models

from .check import Check


def models(check: Check) -> None:
    batch, side = (1, 64) if check.rehearse else (128, 224)
    for what, measure, better in (
        ("inference, compiled, images/s", _inference, "higher"),
        ("batch 1, CUDA graph, ms", _latency, "lower"),
        ("training step, eager, images/s", _training, "higher"),
        ("training step, compiled, images/s", _compiled_training, "higher"),
    ):
        results = {}
        for name in ("nat_tiny", "swin_tiny_patch4_window7_224"):
            with check.guarded("model", f"{what} {name}"):
                if check.has_time("model", f"{what} {name}", 25):
                    results[name] = measure(check, _model(check, name, side), batch, side)
            if not check.rehearse:
                torch.cuda.empty_cache()
        if len(results) < 2:
            continue
        (ours, our_peak), (theirs, their_peak) = results.values()
        text = f"{ours:.4g} against {theirs:.4g} = {ours / theirs:.2f} x ({better} is better)"
        if their_peak:
            text += f", peak memory {our_peak / their_peak:.2f} x"
        check.row("model", what, text)


def _model(check: Check, name: str, side: int):
    torch._dynamo.reset()
    torch.manual_seed(0)
    options = {"img_size": side} if name.startswith("swin") and side != 224 else {}
    model = timm.create_model(name, **options).to(check.device)
    return model if check.rehearse else model.to(memory_format=torch.channels_last)


def _images(check: Check, batch: int, side: int) -> Tensor:
    return torch.randn(batch, 3, side, side, device=check.device)


@torch.inference_mode()
def _inference(check: Check, model, batch: int, side: int) -> tuple[float, float]:
    dtype = torch.float32 if check.rehearse else torch.bfloat16
    model = model.eval().to(dtype)
    run = model if check.rehearse else torch.compile(model)
    x = _images(check, batch, side).to(dtype)
    return batch / check.milliseconds([lambda: run(x)], graph=False) * 1e3, 0.0


@torch.inference_mode()
def _latency(check: Check, model, batch: int, side: int) -> tuple[float, float]:
    dtype = torch.float32 if check.rehearse else torch.bfloat16
    model, x = model.eval().to(dtype), _images(check, 1, side).to(dtype)
    return check.milliseconds([lambda: model(x)]), 0.0


def _training(check: Check, model, batch: int, side: int, compiled: bool = False) -> tuple[float, float]:
    model.train()
    run = torch.compile(model) if compiled and not check.rehearse else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x, target = _images(check, batch, side), torch.arange(batch, device=check.device)

    def step() -> None:
        with torch.autocast(check.device.type, torch.bfloat16, enabled=not check.rehearse):
            loss = torch.nn.functional.cross_entropy(run(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if not check.rehearse:
        torch.cuda.reset_peak_memory_stats()
    rate = batch / check.milliseconds([step], repeats=8, graph=False) * 1e3
    return rate, 0.0 if check.rehearse else float(torch.cuda.max_memory_allocated())


def _compiled_training(check: Check, model, batch: int, side: int) -> tuple[float, float]:
    return _training(check, model, batch, side, compiled=True)
