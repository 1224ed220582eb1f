"""Accuracy of a classifier over all images of a loader, shared among the processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from natzoo.classification.data.datasets import check_bad_images
from natzoo.classification.distributed import World


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    skip_bad_images: bool = False,
    world: World | None = None,
    between_batches: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent and the mean cross entropy over all readable images of all processes.

    Args:
        model: the model, on the device.
        loader: this process's share of the images.
        device: where to compute.
        autocast: the precision.
        skip_bad_images: whether to leave out images that cannot be read.
        world: the processes, all of which must call this.
        between_batches: called before each batch, by all processes as many times; may raise.

    Returns:
        top1, top5, loss, and `count`, the number of images.

    Raises:
        ValueError: if an image cannot be read and they are not to be skipped, or if none can.
    """
    world = world or World()
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # right, right among five, loss, images
    total = None if isinstance(loader.dataset, IterableDataset) else len(loader)  # of streams nobody knows
    bar = tqdm(total=total, desc="evaluate", leave=False, disable=None if world.is_main_process else True)
    batches = iter(loader)
    with bar:
        while True:
            batch = next(batches, None)
            if world.sum(batch is not None) == [0]:  # shares differ in length
                break
            between_batches()
            if batch is None:
                continue
            check_bad_images(loader.dataset, skip_bad_images)
            x_BCHW, target_B = (part.to(device, non_blocking=True) for part in batch)
            target_BT = target_B.reshape(len(target_B), -1)
            counts = (target_BT >= 0).any(1)
            if counts.any():
                with autocast():
                    logits_BK = model(x_BCHW[counts])
                sums += _sums(logits_BK.float(), target_BT[counts])
            bar.update()
    top1, top5, loss, count = world.sum(*sums.tolist())
    if count == 0:
        raise ValueError(f"none of the images in {loader.dataset.where} can be read.")
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count, "count": int(count)}


def _sums(logits_BK: Tensor, target_BT: Tensor) -> Tensor:
    """How many images are right, right among five, the sum of their losses, and their number.

    Any of an image's targets will do, of which those below 0 are none; its loss is the mean over them.
    """
    best_B5 = logits_BK.topk(min(5, logits_BK.shape[1])).indices
    is_right_B5 = (best_B5[:, :, None] == target_BT[:, None, :]).any(-1)
    is_target_BT = target_BT >= 0
    loss_BT = -logits_BK.log_softmax(-1).gather(1, target_BT.clamp(min=0)) * is_target_BT
    loss_B = loss_BT.sum(1) / is_target_BT.sum(1)
    sums = (is_right_B5[:, 0].sum(), is_right_B5.any(1).sum(), loss_B.double().sum())
    return torch.tensor([*(value.item() for value in sums), len(logits_BK)], dtype=torch.float64)


def check_classes(images: Any, num_classes: int, are_named: bool) -> None:
    """Raises ValueError if a data set's classes cannot be those of the model.

    Args:
        images: the data set.
        num_classes: classes of the model.
        are_named: whether the data set's classes were found by name among the model's; else the numbers must agree.
    """
    found = len(images.classes)
    if found > num_classes or (found < num_classes and not are_named):
        raise ValueError(
            f"{images.where} has {found} classes, but the model has {num_classes}: check the data "
            "folder, --class-map and --num-classes."
        )


class FlipTTA(nn.Module):
    """A model that sees each image and its mirror image, and averages the two logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (self.model(x_BCHW) + self.model(x_BCHW.flip(-1))) / 2
