"""Import the package in a process that has torch and the classes of transformers that it builds on."""

from typing import Any

import torch  # noqa: F401
from transformers import (  # noqa: F401
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationMixin,
    Phi3ForCausalLM,
    PreTrainedModel,
    ProcessorMixin,
    ViTModel,
)


def run(task: dict[str, Any], recorder: Any) -> None:
    """Import `samf`.

    Args:
        task: not used.
        recorder: takes the figures.
    """
    with recorder.measure("import samf"):
        import samf  # noqa: F401
