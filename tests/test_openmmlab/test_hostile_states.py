"""Checkpoints of mmengine's format that are not ours: no code runs, and one sentence names the file."""

import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from natzoo.checkpoints import write_checkpoint
from natzoo.openmmlab.checkpoints import PlainCheckpointHook

CODE = "import pathlib; pathlib.Path('config-ran').touch()"
HISTORY = {"history": torch.zeros(3), "counts": torch.ones(3), "length": 1000}


@pytest.fixture
def state():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return {
        "state_dict": model.state_dict(),
        "meta": {"epoch": 1, "iter": 5, "seed": 3, "cfg": CODE, "config": CODE},
        "message_hub": {
            "log_scalars": {"train/loss": HISTORY},
            "runtime_info": {"iter": 5, "cfg": CODE},
            "resumed_keys": {"iter": True},
        },
        "optimizer": optimizer.state_dict(),
    }


def load(path, is_resumed=True):
    """Read a checkpoint as mmengine's runner does."""
    checkpoint = CheckpointLoader.load_checkpoint(str(path))
    runner = SimpleNamespace(model=nn.Linear(2, 2), cfg={"resume": is_resumed})
    PlainCheckpointHook().after_load_checkpoint(runner, checkpoint)
    return checkpoint


def test_configs_in_checkpoints_are_dropped(state, tmp_path):
    """mmengine executes `meta.config` when a run resumes, and the others to build a model without a config."""
    write_checkpoint(tmp_path / "a.pth", state)
    checkpoint = load(tmp_path / "a.pth")
    assert checkpoint["meta"] == {"epoch": 1, "iter": 5, "seed": 3}
    assert checkpoint["message_hub"]["runtime_info"] == {"iter": 5}
    assert CODE not in str(checkpoint)


@pytest.mark.parametrize("key", ["state_dict", "meta", "message_hub", "optimizer"])
def test_states_that_are_not_of_a_run(state, tmp_path, key):
    path = tmp_path / "a.pth"
    places = [(key,), *((key, name) for name in state[key] if key != "state_dict")]
    places += [("message_hub", "log_scalars", "train/loss", name) for name in HISTORY if key == "message_hub"]
    places = [place for place in places if place[-1] not in ("seed", "cfg", "config")]
    for *outer, name in places:
        for value in (None, 3, -1.5, "x", [], [1], torch.zeros(2, 2), {1: 2}, KeyError):
            damaged = copy.deepcopy(state)
            target = damaged
            for part in outer:
                target = target[part]
            if value is KeyError:
                del target[name]
            else:
                target[name] = value
            write_checkpoint(path, damaged)
            if type(value) is int and name in ("epoch", "iter", "length"):
                load(path)
                continue
            with pytest.raises(ValueError, match=r"a\.pth") as error:
                load(path)
            assert "\n" not in str(error.value), (outer, name, value)


def test_weights_of_another_run_start_a_new_one(state, tmp_path):
    """Only the weights count."""
    write_checkpoint(tmp_path / "a.pth", {**state, "message_hub": {"log_scalars": 3}})
    assert load(tmp_path / "a.pth", is_resumed=False)["state_dict"].keys() == {"weight", "bias"}
