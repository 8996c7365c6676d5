"""Registration of SAMF's classes with transformers' Auto classes."""

import functools
import sys
from pathlib import Path

# Commands that read no model and start without torch.
_WITHOUT_MODELS = ("samf.evaluation.scoring", "samf.cache.pool_process", "samf.benchmarks.remote_process")
# Programs that import this package and hand all work to processes of their own: the `samf` command, and those of a cluster,
# which take half a gigabyte less each.
_PROGRAMS = ("samf", "dask-scheduler", "dask-worker", "dask_scheduler", "dask_worker")
_DASK_COMMANDS = ("scheduler", "worker")


def command_needs_classes() -> bool:
    """Return whether this process's command may load a model: not the `samf` command by itself, nor those above."""
    program = Path(sys.argv[0] if sys.argv else "").stem
    if program in _PROGRAMS or (program == "dask" and sys.argv[1:2] in ([name] for name in _DASK_COMMANDS)):
        return False
    command = sys.orig_argv[1:]
    return not any(
        pair in zip(command, command[1:], strict=False) for pair in (("-m", name) for name in _WITHOUT_MODELS)
    )


@functools.cache
def register_classes() -> None:
    """Make the Auto classes load SAMF's folders without remote code; a second call does nothing."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    from samf.model.configuration_samf import SamfConfig
    from samf.model.image_processing_samf import SamfImageProcessor
    from samf.model.modeling_samf import SamfForConditionalGeneration, SamfModel
    from samf.model.processing_samf import SamfProcessor

    AutoConfig.register("samf", SamfConfig, exist_ok=True)
    # The model that generates, as the library has it for models that give text; features: get_image_features.
    AutoModel.register(SamfConfig, SamfForConditionalGeneration, exist_ok=True)
    AutoModelForImageTextToText.register(SamfConfig, SamfForConditionalGeneration, exist_ok=True)
    AutoModelForCausalLM.register(SamfConfig, SamfForConditionalGeneration, exist_ok=True)
    # One class for either backend: it reads volumes, with neither PIL nor torchvision.
    AutoImageProcessor.register(
        SamfConfig,
        image_processor_classes={"torchvision": SamfImageProcessor, "pil": SamfImageProcessor},
        exist_ok=True,
    )
    AutoProcessor.register(SamfConfig, SamfProcessor, exist_ok=True)

    # What save_pretrained must copy beside the weights, so that a saved folder is a complete Hub repository.
    SamfConfig.register_for_auto_class()
    SamfModel.register_for_auto_class("AutoModel")
    SamfForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    SamfImageProcessor.register_for_auto_class()
    SamfProcessor.register_for_auto_class()
