"""Processor: volumes and conversations to model inputs."""

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import AddedToken, BatchFeature
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.utils import logging

from .chat_template_samf import (
    CHAT_TEMPLATE,
    IMAGE_TOKEN,
    choose_chat_template,
    has_generation_marks,
    missing_phi3_tokens,
    render,
)
from .configuration_samf import AUTO_MAP
from .conversation_samf import (
    Conversation,
    Message,
    flatten_volumes,
    is_batch,
    is_from_chats,
    message_texts,
    read_conversations,
)
from .hub_samf import PushToHubWithCard
from .image_processing_samf import SliceFeatures
from .prompt_masks import (
    PLACEHOLDER,
    RenderedConversation,
    TokenizedText,
    find_answers,
    find_marked_answers,
    mask_prompt,
)

logger = logging.get_logger(__name__)

# Keyword of `__call__` that `apply_chat_template` uses: a list that collects the texts which transformers rendered.
_TOKENIZED = "_tokenized"
# Arguments of other packages' functions.
_Options: TypeAlias = dict[str, Any]


class SamfProcessorKwargs(ProcessingKwargs, total=False):
    """Keyword arguments of the processor's tokenizer and image processor, with their defaults."""

    _defaults = {"text_kwargs": {"padding": False}}  # type: ignore[misc]  # where transformers looks for defaults


class SamfProcessor(ProcessorMixin, PushToHubWithCard):
    """A [`SamfImageProcessor`] and a tokenizer in one.

    Args:
        image_processor (`SamfImageProcessor`): converts volumes to slice stacks.
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer. `<image>` is added if it is missing; for Phi-3 it takes the
            unused embedding row 32011, so the embeddings need no resize.
        chat_template (`str`, *optional*): by default Phi-3's format with volumes for a tokenizer with Phi-3's control
            tokens, and for others their own chat template, extended by volumes and answer marks.
        num_image_tokens (`int`, *optional*, defaults to 256): image tokens per volume in the prompt;
            `None` = as many as the volume has slices (`fusion_type="slice_tokens"`).

    Raises:
        ValueError: no chat template is given, and the tokenizer has none that can be adapted.
    """

    valid_processor_kwargs = SamfProcessorKwargs
    # ProcessorMixin is the first base, as transformers' tools expect, and has a push_to_hub of its own.
    push_to_hub = PushToHubWithCard.push_to_hub

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int | None = 256,
    ):
        if num_image_tokens is not None and num_image_tokens < 1:
            raise ValueError(
                f"num_image_tokens is {num_image_tokens}; it must be at least 1, or None for one per slice."
            )
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
        if tokenizer.pad_token is None:
            # Llama and Mistral have none, but batches need one; the attention mask tells it from the end of an answer.
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.num_image_tokens = num_image_tokens
        # Saving adds it, and loading would drop it again.
        self.auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        if chat_template is None:
            chat_template = choose_chat_template(tokenizer)
        elif chat_template == CHAT_TEMPLATE and (missing := missing_phi3_tokens(tokenizer)):
            logger.warning(
                "The chat template is Phi-3's, but the tokenizer lacks %s and reads them as plain text. Leave chat_template "
                "out to use the tokenizer's own.",
                ", ".join(missing),
            )
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @property
    def unused_input_names(self) -> list[str]:
        """Return the image processor's outputs that the model doesn't take."""
        return ["slice_indices", "slice_mm"]

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save as the base class does, and add the model's code to a folder with a model but without its code.

        During training, Trainer pushes the weights and config.json without the code, and saves the processor each time: so
        the repository can be loaded from the first push on.

        Args:
            save_directory: the folder.
            push_to_hub: whether to push the folder to the Hub.
            kwargs: further arguments of `ProcessorMixin.save_pretrained`.

        Returns:
            The files that were saved.
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
        """Return model inputs for prompts and their volumes.

        Args:
            images: another name of `volumes`, which transformers' tools use.
            text: one prompt or a list; each has one `<image>`, or none for a prompt without a volume.
            volumes: one volume or a list: paths, `CTVolume`s, HU arrays (X, Y, Z) in RAS+, extracted slice stacks, or
                mappings with `slice_embeddings` (S, D), `slice_planes` and `slice_positions` (S,).
            kwargs: options of the tokenizer and the image processor.

        Returns:
            `input_ids`, `attention_mask` (B, T) and the image processor's tensors, one row per prompt. The `slice_mask` row
            of a prompt without a volume is False everywhere. Texts in the chat template's format that hold an answer also
            get `prompt_mask` (B, T), as from `apply_chat_template`. `.to(device, dtype)` keeps slice positions in float32.

        Raises:
            ValueError: more than one `<image>` in a prompt, or different numbers of placeholders and volumes.
        """
        if volumes is not None and images is not None:
            raise ValueError("`volumes` and `images` are two names of one argument; pass one of them.")
        if any(kwargs.get(name) is not None for name in ("videos", "audio")):
            raise ValueError("SamfProcessor reads CT volumes and text; it has no videos or audio.")
        texts = [text] if isinstance(text, str) else list(text or [])
        tokenized: list[TokenizedText] | None = kwargs.pop(_TOKENIZED, None)
        if tokenized is not None:
            tokenized.extend(TokenizedText(prompt, kwargs.get("add_special_tokens", True)) for prompt in texts)
        images = images if volumes is None else volumes
        output = SliceFeatures(super().__call__(images=images, text=text, **kwargs).data)
        output.skip_tensor_conversion = self.skip_tensor_conversion
        if texts and images is not None and not is_from_chats(images, texts):
            pad = self.tokenizer.pad_token_id
            answers = find_answers(
                output["input_ids"], self._answer_header(), self.answer_end(), pad, self.image_token_id
            )
            self._add_prompt_mask(output, answers)
        return output

    def prepare_inputs_layout(  # type: ignore[override]  # no videos, no audio
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> tuple[list[Any] | None, list[Any] | None, None, None]:
        """Return volumes and texts as lists with one volume per text (None for a text without a placeholder).

        Args:
            images: one volume, a list, or one list per conversation.
            text: one prompt or a list.
            kwargs: ignored; options of the call.

        Returns:
            Volumes, texts, and None for the base class's videos and audio.

        Raises:
            ValueError: no prompt, more than one placeholder in a prompt, or volumes that don't match the placeholders.
        """
        text = [text] if isinstance(text, str) else text
        text = list(text) if text is not None else None
        volumes = flatten_volumes(images)
        if text is None or not all(isinstance(prompt, str) for prompt in text):
            return volumes, text, None, None
        if not text:
            raise ValueError("`text` is an empty list; expected at least one prompt.")
        counts = [len(PLACEHOLDER.findall(prompt)) for prompt in text]
        if max(counts) > 1:
            raise ValueError(
                f"Prompt {counts.index(max(counts))} holds {max(counts)} {self.image_token} placeholders; a prompt takes "
                "one volume. Ask about each volume in a prompt of its own."
            )
        # A chat's volumes are given as one list per conversation, so that none takes another conversation's placeholder.
        given = [len(item) for item in images] if is_from_chats(images, text) else counts
        if sum(counts) != len(volumes or []) or given != counts:
            where = "" if given == counts else f" Prompt by prompt: {counts} placeholders, {given} volumes."
            raise ValueError(
                f"The prompts hold {sum(counts)} {self.image_token} placeholders, but {len(volumes or [])} volumes were "
                f"passed.{where} Each volume needs one placeholder: use apply_chat_template, or write it into the prompt."
            )
        if volumes:
            remaining = iter(volumes)
            volumes = [next(remaining) if count else None for count in counts]
        return volumes or None, text, None, None

    def validate_inputs(  # type: ignore[override]  # no videos, no audio
        self, images: Any = None, text: Any = None, **kwargs: Any
    ) -> None:
        """Raise ValueError if there is neither a volume nor a text, or a text is not a string.

        Args:
            images: the volumes.
            text: the prompts.
            kwargs: ignored; options of the call.
        """
        if images is None and text is None:
            raise ValueError(f"You need to provide at least one input to call {self.__class__.__name__}")
        if text is not None and not all(isinstance(prompt, str) for prompt in text):
            raise ValueError("`text` must be a string or list of strings.")

    def _process_images(  # type: ignore[override]  # volumes are no images
        self, images: Sequence[Any], **kwargs: Any
    ) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Return tensors with one row per entry (None = an empty row), and the image tokens of each volume."""
        present = [volume for volume in images if volume is not None]
        if isinstance(present[0], Mapping) and "slice_embeddings" in present[0]:
            features = _stack_embeddings(present)
        else:
            features = dict(self.image_processor(present, **{**kwargs, "return_tensors": "pt"}))
        counts = features["slice_mask"].sum(dim=1).tolist()
        replacements = [self.image_token * (self.num_image_tokens or count) for count in counts]
        if len(present) < len(images):
            rows = torch.tensor([index for index, volume in enumerate(images) if volume is not None])
            features = {key: _scatter_rows(value, rows, len(images)) for key, value in features.items()}
        return features, replacements

    def apply_chat_template(  # type: ignore[override]  # returns texts or inputs; transformers' versions differ
        self,
        conversation: Any,
        chat_template: str | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: _Options | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation, or convert it to model inputs (`tokenize=True, return_dict=True`).

        A volume is a content block: `{"type": "volume", "path": "scan.nii.gz"}`, or under `"volume"` anything that
        `__call__` takes, or the files of one DICOM series. OpenAI's names (`input_image`, `image_url`, `input_text`) work too.

        Args:
            conversation: a list of messages, or a list of conversations; see `read_conversations`.
            chat_template: a Jinja template, or the name of one of the processor's. Default: the processor's.
            tokenize: whether to return model inputs instead of texts.
            return_dict: whether to return all model inputs instead of `input_ids`.
            return_assistant_tokens_mask: whether to return `assistant_masks` too.
            processor_kwargs: options of `__call__`.
            kwargs: further options of `ProcessorMixin.apply_chat_template`, and variables of the template.

        Returns:
            The text or texts, the `input_ids`, or with `return_dict=True` the model inputs with `prompt_mask` (B, T), True
            for the prompt's text: the tokens of system and user turns before the first assistant token after the volume,
            without image tokens and padding. The fusion reads only these, so that no answer leaks into the image tokens.
            A conversation with an answer gets no `prompt_mask` if the template has no `{% generation %}` to mark answers.

        Raises:
            ValueError: a content block, role or `tools` that the template doesn't render; the message says which.
        """
        conversations = read_conversations(conversation)
        template = self._resolve_chat_template(chat_template)
        rendered = [self._render(messages, template, **kwargs) for messages in conversations]
        tokenized: list[TokenizedText] = []
        want_mask = tokenize and return_dict
        # With either of these transformers marks no answers.
        unmarked = bool(kwargs.get("continue_final_message") or kwargs.get("sanitize_control_tokens"))
        library_marks = want_mask and has_generation_marks(template) and not unmarked
        if tokenize and unmarked:
            processor_kwargs = {**(processor_kwargs or {}), _TOKENIZED: tokenized}
        messages: Any = conversations if is_batch(conversation) else conversations[0]
        output: Any = super().apply_chat_template(
            messages,
            chat_template=chat_template,
            tokenize=tokenize,
            return_dict=return_dict,
            return_assistant_tokens_mask=return_assistant_tokens_mask or library_marks,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )
        if library_marks:
            answers = output["assistant_masks"] if return_assistant_tokens_mask else output.pop("assistant_masks")
            self._add_prompt_mask(output, answers)
        elif want_mask:
            found = find_marked_answers(output, rendered, tokenized, self.tokenizer, self.image_token_id)
            self._add_prompt_mask(output, found)
        return output

    def _add_prompt_mask(self, inputs: BatchFeature, answers: Iterable[Any] | None) -> None:
        """Add `prompt_mask` to the inputs, unless it is unknown where the answers are."""
        if answers is not None:
            inputs["prompt_mask"] = mask_prompt(inputs, answers, self.image_token_id)

    def answer_end(self) -> int | None:
        """Return the id of the token that ends an answer, the last one that the chat template marks; None if it marks none."""
        probe: Conversation = [
            {"role": "user", "content": "Question"},
            {"role": "assistant", "content": "Answer"},
        ]
        text, spans = render(self.tokenizer, self._resolve_chat_template(None), probe)
        if not spans or "Answer" not in text[slice(*spans[-1])]:
            return None
        return self.tokenizer(text[slice(*spans[-1])], add_special_tokens=False)["input_ids"][-1]

    def _answer_header(self) -> list[int]:
        """Return the ids of the tokens that the chat template writes before an answer; empty if it writes none."""
        template = self._resolve_chat_template(None)
        probe: Conversation = [{"role": "user", "content": "Question"}]
        without = render(self.tokenizer, template, probe)[0]
        header = render(self.tokenizer, template, probe, add_generation_prompt=True)[0].removeprefix(without)
        return self.tokenizer(header, add_special_tokens=False)["input_ids"] if header else []

    def _resolve_chat_template(self, chat_template: str | None) -> str:
        """Return the template of this name, the template itself, or for None the default template."""
        templates: Any = self.chat_template
        if isinstance(templates, dict):
            named: Any = templates.get("default" if chat_template is None else chat_template, chat_template)
            return named
        return templates if chat_template is None else chat_template

    def _render(self, messages: Conversation, template: str, **kwargs: Any) -> RenderedConversation:
        """Return a conversation's text and answers.

        Raises:
            ValueError: the template leaves out the text of a message, the tools or the documents.
        """
        names = ("add_generation_prompt", "tools", "documents")
        options = {name: value for name, value in kwargs.items() if name in names and value}
        options |= {name: value for name, value in kwargs.items() if re.search(rf"\b{re.escape(name)}\b", template)}
        text, answers = render(self.tokenizer, template, messages, **options)
        for index, message in enumerate(messages):
            # Templates of reasoning models drop the reasoning of earlier turns.
            if any(part.strip() not in text and "</think>" not in part for part in message_texts(message)):
                raise ValueError(
                    f"Message {index} has the role {message['role']!r}, whose text the chat template leaves out or "
                    "changes. Use roles that it renders, such as user and assistant."
                )
        for name in ("tools", "documents"):
            without = {key: value for key, value in options.items() if key != name}
            if name in options and text == render(self.tokenizer, template, messages, **without)[0]:
                raise ValueError(f"The chat template doesn't render {name}; leave them out, or use one that does.")
        is_marked = has_generation_marks(template) or not _has_answer(messages)
        return RenderedConversation(text, answers if is_marked else None)


def _has_answer(messages: Sequence[Message]) -> bool:
    return any(message["role"] not in ("system", "user") for message in messages)


def _stack_embeddings(volumes: Sequence[Mapping[str, np.ndarray | torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pad volumes to the same slice count: slice_embeddings (B, S, D), slice_mask, slice_planes, slice_positions (B, S)."""
    columns = {
        key: [torch.tensor(volume[key]) for volume in volumes]  # copies: cached arrays are read-only
        for key in ("slice_embeddings", "slice_planes", "slice_positions")
    }
    columns["slice_mask"] = [torch.ones(len(rows), dtype=torch.bool) for rows in columns["slice_embeddings"]]
    return {key: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for key, rows in columns.items()}


def _scatter_rows(tensor: torch.Tensor, rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Return a zero tensor (batch, …) with `tensor` (N, …) at `rows` (N,)."""
    scattered = tensor.new_zeros((batch, *tensor.shape[1:]))
    scattered[rows] = tensor
    return scattered


__all__ = ["IMAGE_TOKEN", "SamfProcessor"]
