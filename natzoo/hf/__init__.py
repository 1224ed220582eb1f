"""Nat and Dinat for transformers; `import natzoo.hf` registers both with its Auto classes and pipelines.

transformers 5 no longer has Nat, and its Dinat passes tensors in the wrong layout. After this import, AutoConfig,
AutoModel, AutoModelForImageClassification, AutoBackbone and AutoImageProcessor use the classes of this package. They
also accept `transformers.DinatConfig`; `transformers.DinatModel` and the like are still the broken classes.

Checkpoints of the shi-labs/* repositories load without conversion, and saved models have the same layout.
"""

try:
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    text = "natzoo.hf requires transformers 5; install the extra hf: `bash tools/setup.sh train hf`."
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
