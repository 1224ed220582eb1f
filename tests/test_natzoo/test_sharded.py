"""Models whose parameters are sharded over processes, as by FSDP."""

import multiprocessing

import pytest
import timm
import torch
import torch.distributed as dist
from small_models import SMALL
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

from natzoo.models._layers import NeighborhoodBlock


def train(model, parameters):
    """Take three steps on random images, the same in each process."""
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        x_BCHW = torch.randn(2, 3, 48, 48, generator=draw)
        optimizer.zero_grad()
        cross_entropy(model(x_BCHW), torch.tensor([1, 2])).backward()
        optimizer.step()


def create(name):
    torch.manual_seed(0)
    return timm.create_model(name, **{**SMALL[name], "drop_path_rate": 0.0})


def train_sharded(rank, store, names):
    """Compare the weights of sharded models with those of whole ones, in one of two processes."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for name in names:
        model, whole = create(name), create(name)
        blocks = [module for module in model.modules() if isinstance(module, NeighborhoodBlock)]
        assert blocks
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, model.parameters())
        train(whole, whole.parameters())
        found = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        for key, value in whole.state_dict().items() if rank == 0 else ():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_sharded_models_train_like_whole_ones(tmp_path):
    context = multiprocessing.get_context("spawn")
    arguments = [(rank, tmp_path / "store", list(SMALL)) for rank in range(2)]
    processes = [context.Process(target=train_sharded, args=words) for words in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
