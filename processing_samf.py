"""Volume and conversation become model inputs."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import AddedToken

from .configuration_samf import AUTO_MAP
from .hub_samf import PushToHubWithCard

IMAGE_TOKEN = "<image>"
# `sanitize_control_tokens=True` sets this character before a token that a user wrote: plain text, no placeholder.
_PLACEHOLDER = re.compile(f"(?<!\U000f0000){IMAGE_TOKEN}")

# Phi-3's format, walking content lists; the marked part is what training puts its loss on, `<|end|>` included.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\n' }}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}{%- for block in message['content'] -%}{{ block['text'] }}{%- endfor -%}{%- endif -%}
{{ '<|end|>' }}
{%- endgeneration -%}
{{ '\n' }}
{%- else -%}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for block in message['content'] -%}
{%- if block['type'] in ('volume', 'image') -%}{{ '<image>\n' }}
{%- elif block['type'] == 'text' -%}{{ block['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\n' }}{%- endif -%}
"""


class SamfProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": False}}


class _Opaque:
    """Carries a volume through the chat template's clean-up, which would take arrays and dataclasses apart."""

    def __init__(self, value: Any):
        self.value = value


class SamfProcessor(ProcessorMixin, PushToHubWithCard):
    """A [`SamfImageProcessor`] and a tokenizer in one.

    Args:
        image_processor (`SamfImageProcessor`): volumes to slice stacks.
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer. `<image>` is added when it lacks it; for Phi-3 it takes
            the spare embedding row 32011, so the embeddings need no resize.
        chat_template (`str`, *optional*): Phi-3's format with volumes by default.
        num_image_tokens (`int`, *optional*, defaults to 256): placeholders a volume takes in the prompt;
            `None` = as many as it has slices (`fusion_type="slice_tokens"`).
    """

    valid_processor_kwargs = SamfProcessorKwargs
    push_to_hub = PushToHubWithCard.push_to_hub  # the library's class is the first base, as its tools expect

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int | None = 256,
    ):
        if num_image_tokens is not None and num_image_tokens < 1:
            raise ValueError(f"num_image_tokens is {num_image_tokens}; it must be at least 1, or None for one a slice.")
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.num_image_tokens = num_image_tokens
        # Saving enters it, and loading would lose it again.
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)

    @property
    def unused_input_names(self) -> list[str]:
        """What the image processor knows of each slice and the model doesn't read."""
        return ["slice_indices", "slice_mm"]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """The library's, and the model's code where the folder holds a model without it.

        Trainer's pushes during training copy the weights and config.json but not the code, and save the processor anew:
        so the repository loads from the first push on.
        """
        files = super().save_pretrained(os.fspath(save_directory), push_to_hub=push_to_hub, **kwargs)
        folder, model = Path(save_directory), Path(__file__).with_name("modeling_samf.py")
        if (folder / "config.json").is_file() and not (folder / model.name).exists() and model.is_file():
            for code in (model, *map(Path, get_relative_import_files(model))):
                shutil.copyfile(code, folder / code.name)
        return files

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        *,
        volumes: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            volumes (or `images`): one volume or a list: paths, `CTVolume`s, HU arrays (X, Y, Z) in RAS+, extracted slice
                stacks, or mappings with `slice_embeddings` (S, D), `slice_planes` and `slice_positions` (S,).
            text: one prompt or a list; each with one `<image>`, or none for a prompt without a volume.
            kwargs: of the tokenizer and the image processor.

        Returns:
            `input_ids`, `attention_mask` (B, T) and the image processor's tensors, one row a prompt. A prompt without
            a volume has an all-False row of `slice_mask`.

        Raises:
            ValueError: more than one `<image>` in a prompt, or numbers of placeholders and volumes that differ.
        """
        if volumes is not None and images is not None:
            raise ValueError("`volumes` and `images` are two names of one argument; pass one of them.")
        if any(kwargs.get(name) is not None for name in ("videos", "audio")):
            raise ValueError("SamfProcessor reads CT volumes and text; it has no videos or audio.")
        return super().__call__(images=images if volumes is None else volumes, text=text, **kwargs)

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple:
        """Texts as a list, and volumes as a list with one entry a text (None where the text has no placeholder)."""
        text = [text] if isinstance(text, str) else text
        text = list(text) if text is not None else None
        volumes = _flatten(images)
        if text is None or not all(isinstance(prompt, str) for prompt in text):
            return volumes, text, None, None
        counts = [len(_PLACEHOLDER.findall(prompt)) for prompt in text]
        if max(counts, default=0) > 1:
            raise ValueError(
                f"Prompt {counts.index(max(counts))} holds {max(counts)} {self.image_token} placeholders; a prompt takes "
                "one volume. Ask about each volume in a prompt of its own."
            )
        if sum(counts) != len(volumes or []):
            raise ValueError(
                f"The prompts hold {sum(counts)} {self.image_token} placeholders, but {len(volumes or [])} volumes were "
                "passed. Each volume needs one placeholder: use apply_chat_template, or write it into the prompt."
            )
        if volumes:
            remaining = iter(volumes)
            volumes = [next(remaining) if count else None for count in counts]
        return volumes or None, text, None, None

    def validate_inputs(self, images: Any = None, text: Any = None, **kwargs: Any) -> None:
        if images is None and text is None:
            raise ValueError(f"You need to provide at least one input to call {self.__class__.__name__}")
        if text is not None and not all(isinstance(prompt, str) for prompt in text):
            raise ValueError("`text` must be a string or list of strings.")

    def _process_images(self, images: list[Any], **kwargs: Any) -> tuple[dict[str, Any], list[str]]:
        """Tensors with one row an entry (None = an empty row), and the expanded placeholder of each volume."""
        present = [volume for volume in images if volume is not None]
        if isinstance(present[0], Mapping) and "slice_embeddings" in present[0]:
            features = _stack_embeddings(present)
        else:
            features = dict(self.image_processor(present, **{**kwargs, "return_tensors": "pt"}))
        counts = features["slice_mask"].sum(dim=1).tolist()
        replacements = [self.image_token * (self.num_image_tokens or count) for count in counts]
        if len(present) < len(images):
            rows = torch.tensor([index for index, volume in enumerate(images) if volume is not None])
            features = {key: _spread(value, rows, len(images)) for key, value in features.items()}
        return features, replacements

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation, or turn it into model inputs (`tokenize=True, return_dict=True`).

        A volume is a content block: `{"type": "volume", "path": "scan.nii.gz"}`, or under `"volume"` anything that
        `__call__` takes. With `return_dict=True` the result also holds `prompt_mask` (B, T), True on the prompt's text:
        what stands before the first assistant token and is neither image nor padding. The model's fusion reads these
        tokens alone, so an answer in the conversation can't leak into the image tokens.
        """
        conversation = _wrap_volumes(conversation)
        # A template without generation marks can't tell the answer from the prompt: better no mask than one that leaks.
        marked = "generation" in str(chat_template or self.chat_template).replace("add_generation_prompt", "")
        # The library finds no assistant's tokens with either of these.
        unmarkable = kwargs.get("continue_final_message") or kwargs.get("sanitize_control_tokens")
        want_mask = tokenize and return_dict and marked and not unmarkable
        output = super().apply_chat_template(
            conversation,
            chat_template=chat_template,
            tokenize=tokenize,
            return_dict=return_dict,
            return_assistant_tokens_mask=return_assistant_tokens_mask or want_mask,
            **kwargs,
        )
        if want_mask:
            output["prompt_mask"] = self._prompt_mask(output)
            if not return_assistant_tokens_mask:
                output.pop("assistant_masks")
        return output

    def _prompt_mask(self, output: BatchFeature) -> Any:
        """In the form of `input_ids`: a tensor (B, T), or lists."""
        ids, assistant = output["input_ids"], output["assistant_masks"]
        rows = []
        for row, (tokens, answer) in enumerate(zip(ids, assistant, strict=True)):
            tokens, answer = torch.as_tensor(tokens), torch.as_tensor(answer)
            attended = torch.as_tensor(output["attention_mask"][row]) if "attention_mask" in output else 1
            mask = (answer.cumsum(0) == 0) & (tokens != self.image_token_id) & (attended == 1)
            rows.append(mask)
        if isinstance(ids, torch.Tensor):
            return torch.stack(rows)
        return [row.tolist() for row in rows]


def _flatten(volumes: Any) -> list[Any] | None:
    """One volume, a list or nested lists of them become a flat list; chat wrappers come off."""
    if volumes is None:
        return None
    if not isinstance(volumes, (list, tuple)):
        return [volumes.value if isinstance(volumes, _Opaque) else volumes]
    return [volume for item in volumes for volume in _flatten(item) or []]


def _wrap_volumes(conversation: Any) -> Any:
    """The conversation with each volume block as an image block whose content the chat template leaves alone."""
    if isinstance(conversation, (list, tuple)):
        return [_wrap_volumes(item) for item in conversation]
    if not isinstance(conversation, Mapping):
        return conversation
    if isinstance(conversation.get("content"), (list, tuple)):
        return {**conversation, "content": [_wrap_volumes(block) for block in conversation["content"]]}
    if conversation.get("type") in ("volume", "image"):
        for key in ("volume", "image", "path", "url"):
            if conversation.get(key) is not None:
                return {"type": "image", "image": _Opaque(conversation[key])}
        return {"type": "image"}
    return conversation


def _stack_embeddings(volumes: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad volumes of different slice counts: slice_embeddings (B, S, D), slice_mask, slice_planes, slice_positions (B, S)."""
    columns = {
        key: [torch.tensor(volume[key]) for volume in volumes]  # copies: cached records are read-only
        for key in ("slice_embeddings", "slice_planes", "slice_positions")
    }
    columns["slice_mask"] = [torch.ones(len(rows), dtype=torch.bool) for rows in columns["slice_embeddings"]]
    return {key: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for key, rows in columns.items()}


def _spread(tensor: torch.Tensor, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """tensor (N, …) as rows `rows` (N,) of a zero tensor (batch, …)."""
    spread = tensor.new_zeros((batch, *tensor.shape[1:]))
    spread[rows] = tensor
    return spread


__all__ = ["SamfProcessor"]
