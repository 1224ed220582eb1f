"""Several processes started by torchrun: over NCCL on GPUs, over Gloo on a CPU, where mmengine's own start fails."""

from __future__ import annotations

import os

import torch
from mmengine.config import Config, ConfigDict

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def count_processes() -> int:
    """How many processes torchrun started, this one included; 0 if it did not start this one."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _TORCHRUN) else 0


def is_first_process() -> bool:
    """Whether this process speaks for all; known before they have found each other."""
    return count_processes() == 0 or os.environ["RANK"] == "0"


def set_launcher(cfg: Config) -> None:
    """Makes a config run in one process, or where torchrun started this one, together with the others."""
    if count_processes() == 0:
        cfg.launcher = "none"
        return
    cfg.launcher = "pytorch"
    if torch.cuda.is_available():
        return
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    find_unused = cfg.get("find_unused_parameters", False)
    cfg.model_wrapper_cfg = ConfigDict(
        type="MMDistributedDataParallel",
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=find_unused,
    )
    _replace_sync_norms(cfg.model)


def _replace_sync_norms(node) -> None:
    """BatchNorm for SyncBN, which PyTorch has for GPUs alone: each process then normalises by its own images."""
    for value in node.values() if isinstance(node, dict) else node:
        if isinstance(value, dict) and value.get("type") == "SyncBN":
            value["type"] = "BN"
        if isinstance(value, (dict, list, tuple)):
            _replace_sync_norms(value)
