"""Arguments of convert_published_checkpoint.py."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from samf.scripts.conversion_checks import ConversionError

Part = Literal["model", "slice_encoder"]
Branch = Literal["teacher", "student"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]

_POSITIVE = (
    "lora_alpha",
    "image_size",
    "slice_encoder_heads",
    "layer_norm_eps",
    "aggregator_heads",
    "text_heads",
    "num_image_tokens",
)


@dataclass
class ConvertArguments:
    """What to convert, where to, and what the weights' shapes don't tell.

    Raises:
        ConversionError: an unknown choice, or a number that isn't positive.
    """

    source: str = field(metadata={"help": "Hub id, folder or file of the checkpoint"})
    output_dir: str = field(metadata={"help": "new folder"})
    part: Part = field(
        default="model", metadata={"help": "what the source is: model, or slice_encoder (a DINO backbone)"}
    )
    file: str | None = field(default=None, metadata={"help": "weights file in the source, if it holds several"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub source"})
    tokenizer: str | None = field(default=None, metadata={"help": "folder or Hub id; default: the source's own"})
    dtype: Precision = field(
        default="auto", metadata={"help": "of the weights: auto (unchanged), float32, bfloat16, float16"}
    )
    lora_alpha: float = field(default=32.0, metadata={"help": "alpha of the LoRA adapters; the rank is their shape's"})
    branch: Branch | None = field(default=None, metadata={"help": "of a DINO checkpoint: teacher (default) or student"})
    image_size: int | None = field(default=None, metadata={"help": "side in pixels that the slice encoder must have"})
    slice_encoder_heads: int | None = field(
        default=None, metadata={"help": "attention heads; default: one per 64 units"}
    )
    layer_norm_eps: float | None = field(default=None, metadata={"help": "of the slice encoder; default: DINO's 1e-6"})
    aggregator_heads: int | None = field(default=None, metadata={"help": "attention heads; default: 8"})
    text_heads: int | None = field(
        default=None, metadata={"help": "attention heads of the language model; default: Phi-3-mini's 32"}
    )
    num_image_tokens: int = field(default=256, metadata={"help": "placeholders per volume in the prompt"})
    image_token_id: int | None = field(
        default=None, metadata={"help": "the placeholder's id; default: the tokenizer's"}
    )

    def __post_init__(self) -> None:
        choices = {"part": get_args(Part), "branch": (None, *get_args(Branch)), "dtype": get_args(Precision)}
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ConversionError(f"{name} is {getattr(self, name)!r}; expected one of {values}.")
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConversionError(f"{name} is {value!r}; expected a positive number.")
