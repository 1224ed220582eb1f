"""What transformers' Auto classes know of Nat and Dinat."""

from __future__ import annotations

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ViTImageProcessor,
    ViTImageProcessorPil,
)

from natzoo.hf import modeling
from natzoo.hf.configuration import DinatConfig, NatConfig


def register() -> None:
    """Registers both, in place of what transformers has under these names."""
    for name, config in (("Nat", NatConfig), ("Dinat", DinatConfig)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto, kind in (
            (AutoModel, "Model"),
            (AutoModelForImageClassification, "ForImageClassification"),
            (AutoBackbone, "Backbone"),
        ):
            auto.register(config, getattr(modeling, name + kind), exist_ok=True)
        # For folders that do not say which they need; transformers' own choice for both.
        processors = {"torchvision": ViTImageProcessor, "pil": ViTImageProcessorPil}
        AutoImageProcessor.register(config, image_processor_classes=processors, exist_ok=True)
