"""Entry points of torch.hub: every registered model, and `checkpoint` for any weight file.

torch.hub.load("FOLDER OF THIS CHECKOUT", "nat_mini", source="local", pretrained=True)
torch.hub.load("FOLDER OF THIS CHECKOUT", "checkpoint", "output/nat/best.pth", source="local")
"""

import timm as _timm

from natzoo.checkpoints import zoo_entries as _zoo_entries
from natzoo.classification.inference import restore as _restore

dependencies = ["timm", "torch", "tqdm", "yaml"]


def checkpoint(path: str):
    """Load a checkpoint of train.py, or a folder or hf-hub:OWNER/NAME in the form of timm or transformers."""
    return _restore(path)[0]


globals().update(
    {
        name: _timm.models.model_entrypoint(name)
        for name, entry in _zoo_entries().items()
        if entry.task == "classification"
    }
)
