"""SAMF: reports and answers from chest CT volumes.

Importing this package registers its classes with transformers' Auto classes, so that `AutoModel.from_pretrained(folder)`
works without remote code.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .model.configuration_samf import SamfConfig
from .model.ct_volume import CTReadError, CTVolume, read_ct
from .model.image_processing_samf import SamfImageProcessor
from .model.modeling_samf import SamfForConditionalGeneration, SamfModel, SamfPreTrainedModel
from .model.pipeline_samf import SamfReportPipeline
from .model.processing_samf import SamfProcessor
from .model.quantization_samf import SamfQuantizationConfig
from .model.report_samf import Report
from .utils.moved import install as _install_old_names

AutoConfig.register("samf", SamfConfig, exist_ok=True)
# The model that generates, as the library has it for models that give text; features: get_image_features.
AutoModel.register(SamfConfig, SamfForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(SamfConfig, SamfForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(SamfConfig, SamfForConditionalGeneration, exist_ok=True)
# One class for either backend: it reads volumes, with neither PIL nor torchvision.
AutoImageProcessor.register(
    SamfConfig, image_processor_classes={"torchvision": SamfImageProcessor, "pil": SamfImageProcessor}, exist_ok=True
)
AutoProcessor.register(SamfConfig, SamfProcessor, exist_ok=True)

# What save_pretrained must copy beside the weights, so that a saved folder is a complete Hub repository.
SamfConfig.register_for_auto_class()
SamfModel.register_for_auto_class("AutoModel")
SamfForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
SamfImageProcessor.register_for_auto_class()
SamfProcessor.register_for_auto_class()

_install_old_names(__name__)

__all__ = [
    "CTReadError",
    "CTVolume",
    "Report",
    "SamfConfig",
    "SamfForConditionalGeneration",
    "SamfImageProcessor",
    "SamfModel",
    "SamfPreTrainedModel",
    "SamfProcessor",
    "SamfQuantizationConfig",
    "SamfReportPipeline",
    "read_ct",
]
