"""Accuracy of a classifier on a dataset whose images are divided among the processes of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from natzoo.classification.data.datasets import check_bad_images
from natzoo.classification.distributed import World
from natzoo.classification.sharding import is_sharded
from natzoo.command_line import counted


def evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    skip_bad_images: bool = False,
    world: World | None = None,
    before_batch: Callable[[], None] = lambda: None,
    normalize: Callable[[Tensor], Tensor] = lambda x_BCHW: x_BCHW,
    confusion_KK: Tensor | None = None,
) -> dict[str, float]:
    """Compute accuracy and loss over the readable images of all processes. All processes must call it.

    Args:
        model: the model, on `device`.
        loader: batches of this process's share of the images.
        device: device of the computation.
        autocast: creates the context of each forward pass.
        skip_bad_images: ignore images that cannot be read instead of raising.
        world: the processes.
        before_batch: called before each batch, the same number of times in all processes; may raise.
        normalize: turns a batch on the device into the input of the model; the default is for normalized batches.
        confusion_KK: receives the number of images of each class (rows) by predicted class (columns), int64 on the CPU.

    Returns:
        top1 and top5 in percent, loss (mean cross entropy) and count (number of images).

    Raises:
        ValueError: if an image cannot be read and `skip_bad_images` is off, or if no image can be read.
    """
    # Sharded weights are gathered into tensors that training uses too.
    with torch.no_grad() if is_sharded(model) else torch.inference_mode():
        return _evaluate(
            model, loader, device, autocast, skip_bad_images, world or World(), before_batch, normalize, confusion_KK
        )


def _evaluate(
    model: nn.Module,
    loader: DataLoader,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    skip_bad_images: bool,
    world: World,
    before_batch: Callable[[], None],
    normalize: Callable[[Tensor], Tensor],
    confusion_KK: Tensor | None,
) -> dict[str, float]:
    dataset: Any = loader.dataset
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # correct in top 1, correct in top 5, loss, images
    total = None if isinstance(dataset, IterableDataset) else len(loader)  # streams have no known length
    bar = tqdm(total=total, desc="Evaluate", leave=False, disable=None if world.is_main_process else True)
    batches = iter(loader)
    with bar:
        while True:
            batch = next(batches, None)
            if world.sum(batch is not None) == [0]:  # shares differ in length
                break
            before_batch()
            if batch is None:
                if is_sharded(model):  # the other processes need its shards
                    with autocast():
                        model(normalize(dataset[0][0][None].to(device)))
                continue
            check_bad_images(dataset, skip_bad_images)
            x_BCHW, target_B = (part.to(device, non_blocking=True) for part in batch)
            target_BT = target_B.reshape(len(target_B), -1)
            is_labeled_B = (target_BT >= 0).any(1)
            if is_labeled_B.any() or is_sharded(model):
                with autocast():
                    logits_BK = model(normalize(x_BCHW[is_labeled_B] if is_labeled_B.any() else x_BCHW))
            if is_labeled_B.any():
                sums += _batch_sums(logits_BK.float(), target_BT[is_labeled_B])
                if confusion_KK is not None:
                    found_B2 = torch.stack([target_BT[is_labeled_B, 0], logits_BK.argmax(1)], 1).cpu()
                    confusion_KK.index_put_(tuple(found_B2.T), torch.tensor(1), accumulate=True)
            bar.update()
    if confusion_KK is not None:
        totals = world.sum(*confusion_KK.flatten().tolist())
        confusion_KK.copy_(torch.tensor(totals).view_as(confusion_KK))
    top1, top5, loss, count = world.sum(*sums.tolist())
    if count == 0:
        raise ValueError(f"{dataset.source} has no readable image.")
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "loss": loss / count, "count": int(count)}


def _batch_sums(logits_BK: Tensor, target_BT: Tensor) -> Tensor:
    """Sum the results of a batch.

    An image may have several targets. Any of them counts as correct, and the loss of the image is the mean over them.

    Args:
        logits_BK: [batch, classes], float32.
        target_BT: [batch, targets], class numbers; negative ones are padding.

    Returns:
        [4], float64: images correct in top 1, images correct in top 5, sum of the losses, number of images.
    """
    best_B5 = logits_BK.topk(min(5, logits_BK.shape[1])).indices
    is_correct_B5 = (best_B5[:, :, None] == target_BT[:, None, :]).any(-1)
    is_target_BT = target_BT >= 0
    loss_BT = -logits_BK.log_softmax(-1).gather(1, target_BT.clamp(min=0)) * is_target_BT
    loss_B = loss_BT.sum(1) / is_target_BT.sum(1)
    sums = (is_correct_B5[:, 0].sum(), is_correct_B5.any(1).sum(), loss_B.double().sum())
    return torch.tensor([*(value.item() for value in sums), len(logits_BK)], dtype=torch.float64)


def check_classes(dataset: Any, num_classes: int, matched_by_name: bool) -> None:
    """Check that the classes of a dataset fit a model.

    Args:
        dataset: the dataset.
        num_classes: number of classes of the model.
        matched_by_name: whether the classes were looked up by name in the model; if not, the numbers must be equal.

    Raises:
        ValueError: if they do not fit.
    """
    found = len(dataset.classes)
    if found > num_classes or (found < num_classes and not matched_by_name):
        raise ValueError(
            f"{dataset.source} has {found} classes but the model has {num_classes}; check the data folder, "
            "--class-map and --num-classes."
        )


def missing_classes_warning(dataset: Any, classes: Sequence[str]) -> str:
    """Return a warning that names the classes without an image in a dataset, or ""; shards do not know theirs."""
    targets = getattr(getattr(dataset, "reader", None), "targets", None)
    missing = sorted(set(range(len(classes))) - set(targets)) if targets is not None else []
    if not missing:
        return ""
    names = ", ".join(classes[number] for number in missing[:5]) + (", ..." if len(missing) > 5 else "")
    return f"Warning: {dataset.source} has no image of {counted(len(missing), 'class', 'classes')}: {names}."


class FlipTTA(nn.Module):
    """Test-time augmentation: average the logits of an image and of its mirror image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (self.model(x_BCHW) + self.model(x_BCHW.flip(-1))) / 2
