"""Going on in the middle of the data: mmengine would read again all that the run had read, hours late in a long one."""

from __future__ import annotations

from itertools import islice
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import DataLoader


@HOOKS.register_module()
class SkipSeenDataHook(Hook):
    """Lets a resumed run draw the indices of what it has seen, without reading it, where the sampler never ends."""

    def before_run(self, runner: Any) -> None:
        self.first_seed = runner.seed  # before a checkpoint brings the one that the run began with

    def before_train_epoch(self, runner: Any) -> None:
        loop = runner.train_loop
        sampler, size = loop.dataloader.sampler, loop.dataloader.batch_size
        if getattr(sampler, "seed", None) == self.first_seed:  # else it has one of its own
            sampler.seed = runner.seed
        if not isinstance(loop, IterBasedTrainLoop) or loop.iter == 0:
            return
        if isinstance(sampler, InfiniteSampler) and size:
            sampler.indices = sampler._indices_of_rank()  # from the start: the loop has begun to read ahead
            next(islice(sampler.indices, loop.iter * size - 1, None))
            loop.dataloader_iterator = _LateIterator(loop.dataloader, loop.iter)


class _LateIterator:
    """Gives nothing as often as the loop asks for seen batches, then batches."""

    def __init__(self, loader: DataLoader, seen: int):
        self.loader, self.seen, self.batches = loader, seen, None

    def __next__(self) -> Any:
        if self.seen > 0:
            self.seen -= 1
            return None
        if self.batches is None:
            self.batches = iter(self.loader)
        return next(self.batches)
