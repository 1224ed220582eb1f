"""Run the Nat and Dinat of an old transformers release and print their results as JSON, for test_old_transformers.py.

The only argument is the file of golden results, which contains the configurations.
"""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from deterministic import array, image, value
from torch import nn

MODULES = {"nat": "transformers.models.deprecated.nat", "dinat": "transformers.models.dinat"}


def load(model: str, name: str) -> type:
    """Return a class of transformers, such as DinatBackbone for the model "dinat" and the name "Backbone"."""
    part = "configuration" if name == "Config" else "modeling"
    return getattr(importlib.import_module(f"{MODULES[model]}.{part}_{model}"), model.capitalize() + name)


def shapes(tensors: dict[str, torch.Tensor] | list[torch.Tensor]) -> dict | list:
    """Return the shapes of tensors as JSON values."""
    if isinstance(tensors, dict):
        return {name: list(x.shape) for name, x in tensors.items()}
    return [list(x.shape) for x in tensors]


def fill(model: nn.Module) -> None:
    """Set each parameter from its name, as in the golden results."""
    with torch.no_grad():
        for name, x in model.named_parameters():
            is_layer_scale = name.endswith("layer_scale_parameters")
            numbers = array(name, x.shape, 0.1, 0.5) if is_layer_scale else value(name, x.shape)
            x.copy_(torch.from_numpy(numbers))


def run(name: str, config: dict) -> dict:
    """Compute all golden results of "nat" or "dinat"."""
    make_config = load(name, "Config")
    model = load(name, "ForImageClassification")(make_config(**config)).eval()
    backbone = load(name, "Backbone")(make_config(**config, out_features=["stage1", "stage2", "stage3", "stage4"]))
    fill(model)
    with torch.no_grad():
        out = model(image((128, 128), batch=2), output_hidden_states=True, output_attentions=True)
    return {
        "logits": out.logits.tolist(),
        "hidden_states": shapes(out.hidden_states),
        "reshaped_hidden_states": shapes(out.reshaped_hidden_states),
        "hidden_norms": [x.norm().item() for x in out.hidden_states],
        "attentions": shapes(out.attentions),
        "attention_norms": [x.norm().item() for x in out.attentions],
        "state_dict": shapes(model.state_dict()),
        "backbone-state_dict": shapes(backbone.state_dict()),
    }


if __name__ == "__main__":
    goldens = json.loads(Path(sys.argv[1]).read_text())
    found = {name: run(name, goldens[f"{name}-128x128"]["config"]) for name in MODULES}
    print(json.dumps({"release": version("transformers"), **found}))
