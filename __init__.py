"""SAMF: reports and answers from chest CT volumes.

Importing this package registers its classes with transformers' Auto classes, so that `AutoModel.from_pretrained(folder)`
works without remote code; other names are imported when they are first used. Only the `samf` command and scoring wait with
the classes, too: help and completions would otherwise take seconds, and scores half a gigabyte.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .utils.auto_classes import command_needs_classes, register_classes
from .utils.moved import install as _install_old_names

if TYPE_CHECKING:
    from .model.configuration_samf import SamfConfig
    from .model.ct_volume import CTReadError, CTVolume, read_ct
    from .model.image_processing_samf import SamfImageProcessor
    from .model.modeling_samf import SamfForConditionalGeneration, SamfModel, SamfPreTrainedModel
    from .model.pipeline_samf import SamfReportPipeline
    from .model.processing_samf import SamfProcessor
    from .model.quantization_samf import SamfQuantizationConfig
    from .model.report_samf import Report

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

_MODULES = {
    "configuration_samf": ("SamfConfig",),
    "ct_volume": ("CTReadError", "CTVolume", "read_ct"),
    "image_processing_samf": ("SamfImageProcessor",),
    "modeling_samf": ("SamfForConditionalGeneration", "SamfModel", "SamfPreTrainedModel"),
    "pipeline_samf": ("SamfReportPipeline",),
    "processing_samf": ("SamfProcessor",),
    "quantization_samf": ("SamfQuantizationConfig",),
    "report_samf": ("Report",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    register_classes()
    value = getattr(importlib.import_module(f".model.{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_install_old_names(__name__)
if command_needs_classes():
    register_classes()
