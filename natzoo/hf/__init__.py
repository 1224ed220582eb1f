"""Nat and Dinat for transformers: `import natzoo.hf`, and its Auto classes and pipelines know them.

transformers 5 has no Nat, and its own Dinat passes its tensors in the wrong layout: after this import, AutoConfig,
AutoModel, AutoModelForImageClassification, AutoBackbone and AutoImageProcessor give the classes of this package for
both. Take DinatConfig from here as well: `transformers.DinatConfig` still leads to the class that does not work. The
checkpoints of the hub's shi-labs/* repositories load as they are, and what is saved has their layout.
"""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    text = "natzoo.hf needs transformers 5: install the extra hf, `bash tools/setup.sh train hf`."
    raise ModuleNotFoundError(text, name="transformers") from error

from natzoo.hf.configuration import DinatConfig, NatConfig
from natzoo.hf.export import from_timm, image_processor
from natzoo.hf.folders import save_backbone_folder, save_folder
from natzoo.hf.modeling import (
    DinatBackbone,
    DinatForImageClassification,
    DinatModel,
    DinatPreTrainedModel,
    NatBackbone,
    NatForImageClassification,
    NatModel,
    NatPreTrainedModel,
)
from natzoo.hf.registration import register

register()

__all__ = [
    "DinatBackbone",
    "DinatConfig",
    "DinatForImageClassification",
    "DinatModel",
    "DinatPreTrainedModel",
    "NatBackbone",
    "NatConfig",
    "NatForImageClassification",
    "NatModel",
    "NatPreTrainedModel",
    "from_timm",
    "image_processor",
    "save_backbone_folder",
    "save_folder",
]
