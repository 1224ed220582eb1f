"""Shard the weights and the optimizer of a run over its processes, with PyTorch's FSDP2.

Checkpoints hold whole tensors, so they do not depend on the number of processes, and a run may resume without sharding.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from natzoo.classification.distributed import World

_UNSUPPORTED = {
    "--model-ema": lambda args: args.model_ema,
    "--amp fp16": lambda args: args.amp == "fp16",
    "--clip-mode agc": lambda args: args.clip_mode == "agc",
    "--teacher": lambda args: args.teacher,
}


def check_sharding(args: argparse.Namespace, world: World) -> None:
    """Raise ValueError if --fsdp is used with one process, or with an option that it does not support."""
    if not args.fsdp:
        return
    if world.size == 1:
        raise ValueError("--fsdp requires several processes; start them with dist_train.sh.")
    for option, is_used in _UNSUPPORTED.items():
        if is_used(args):
            raise ValueError(f"--fsdp cannot be combined with {option}; remove one of them.")


def shard(model: nn.Module, world: World, device: torch.device) -> None:
    """Shard each block, then the rest of a model, and move it to the device."""
    mesh = init_device_mesh(device.type, (world.size,))
    for module in list(model.modules()):
        if type(module).__name__.endswith("Block"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to(device)  # buffers


def is_sharded(model: nn.Module) -> bool:
    """Return whether all processes must call the model the same number of times."""
    return isinstance(model, FSDPModule)


def whole(state: Any, keep: bool) -> Any:
    """Return nested data with whole tensors instead of shards. All processes must call it.

    Args:
        state: a state dict.
        keep: copy the tensors to the CPU; if False, drop them, in processes that do not write.
    """

    def gather(value: DTensor) -> torch.Tensor:
        gathered = value.full_tensor()
        return gathered.cpu() if keep else gathered.new_empty(0)

    return tree_map_only(DTensor, gather, state)


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Load whole weights into a model, sharded or not."""
    if is_sharded(model):
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(weights)


def shard_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer with each tensor that has the shape of its parameter sharded like it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def convert(parameter: Any, value: Any) -> Any:
        if not isinstance(parameter, DTensor) or not torch.is_tensor(value) or value.shape != parameter.shape:
            return value
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)

    entries = {
        index: {name: convert(parameters[index], value) for name, value in entry.items()}
        for index, entry in state["state"].items()
    }
    return {**state, "state": entries}
