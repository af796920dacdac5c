"""Auto classes for released encoders of architectures that stock timm cannot build (CIFAR stems, wide ResNets).

Weights on disk carry timm's own keys, as in any timm repository; the `timm_model.` prefix of the wrapper is added on
load and taken off on save. This file travels to the Hub together with ``backbones.py`` as remote code, therefore it
imports torch, timm and transformers only, plus its neighbour.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming
from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperForImageClassification, TimmWrapperModel

from .backbones import register_backbones

__all__ = ["RobustTimmConfig", "RobustTimmForImageClassification", "RobustTimmModel"]


class RobustTimmConfig(TimmWrapperConfig):
    """Configuration of a released encoder; the fields are those of transformers' timm wrapper.

    A model type of its own makes a plain load without this package say that the code is missing, instead of blaming
    the version of timm.
    """

    model_type = "hf_robust_timm"


class RobustTimmModel(TimmWrapperModel):
    """Encoder: images in, `pooler_output` `(N, num_features)` out."""

    config_class = RobustTimmConfig
    config: RobustTimmConfig

    def __init__(self, config: RobustTimmConfig) -> None:
        super().__init__(config)
        self._weight_conversions = _timm_keys()


class RobustTimmForImageClassification(TimmWrapperForImageClassification):
    """Encoder with a linear classifier: images in, `logits` `(N, num_labels)` out."""

    config_class = RobustTimmConfig
    config: RobustTimmConfig

    def __init__(self, config: RobustTimmConfig) -> None:
        super().__init__(config)
        self._weight_conversions = _timm_keys()


def _timm_keys() -> list[WeightConverter | WeightRenaming]:
    # Set on every model, as from_pretrained does: transformers otherwise saves one that was built from a
    # configuration with prefixed keys, which timm cannot read.
    return [PrefixChange(prefix_to_add="timm_model")]


def register_auto_classes() -> None:
    """Makes the Auto classes of transformers load these models; may be called any number of times.

    Only the installed package claims the model type. A copy of this file that came from the Hub as remote code keeps
    to its own classes: otherwise it would replace the installed ones, and later repositories would load without
    anybody having agreed to run remote code.
    """
    register_backbones()
    register_checkpoint_conversion_mapping(RobustTimmConfig.model_type, _timm_keys(), overwrite=True)
    if __name__.partition(".")[0] == "hf_robust":
        AutoConfig.register(RobustTimmConfig.model_type, RobustTimmConfig, exist_ok=True)
    AutoModel.register(RobustTimmConfig, RobustTimmModel, exist_ok=True)
    AutoModelForImageClassification.register(RobustTimmConfig, RobustTimmForImageClassification, exist_ok=True)
    AutoImageProcessor.register(RobustTimmConfig, TimmWrapperImageProcessor, exist_ok=True)


register_auto_classes()
