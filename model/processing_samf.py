"""Volume and conversation become model inputs."""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import BatchFeature
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.tokenization_utils_base import AddedToken
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
from .conversation_samf import OneVolume, read_conversation, texts_of
from .ct_volume import CTVolume, to_ct_volume
from .hub_samf import PushToHubWithCard
from .image_processing_samf import SliceFeatures

logger = logging.get_logger(__name__)

# `sanitize_control_tokens=True` sets the first character before a token that a user wrote, and the second behind it.
_MARKERS = re.compile("[\U000f0000\U000f0001]")
_PLACEHOLDER = re.compile(f"(?<!\U000f0000){IMAGE_TOKEN}")
# Of `__call__`, for `apply_chat_template`: a list that takes the prompts which the library made of a conversation.
_RENDERED = "_rendered"


class _Rendered(NamedTuple):
    """A conversation's text, and the (start, end) of each answer in it; None = the template doesn't mark them."""

    text: str
    answers: list[tuple[int, int]] | None


class SamfProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": False}}


class SamfProcessor(ProcessorMixin, PushToHubWithCard):
    """A [`SamfImageProcessor`] and a tokenizer in one.

    Args:
        image_processor (`SamfImageProcessor`): volumes to slice stacks.
        tokenizer (`PreTrainedTokenizerBase`): a fast tokenizer. `<image>` is added when it lacks it; for Phi-3 it takes
            the spare embedding row 32011, so the embeddings need no resize.
        chat_template (`str`, *optional*): by default Phi-3's format with volumes for a tokenizer that has its control
            tokens, and for others their own chat template, adapted to volumes and with the answers marked.
        num_image_tokens (`int`, *optional*, defaults to 256): placeholders a volume takes in the prompt;
            `None` = as many as it has slices (`fusion_type="slice_tokens"`).

    Raises:
        ValueError: no chat template is given, and the tokenizer has none that can be adapted.
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
        if tokenizer.pad_token is None:
            # Llama and Mistral have none, and batches need one; the attention mask tells it from an answer's end.
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.num_image_tokens = num_image_tokens
        # Saving enters it, and loading would lose it again.
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
            a volume has an all-False row of `slice_mask`. Texts in the chat template's format that hold an answer also
            get `prompt_mask` (B, T), as `apply_chat_template` gives it. `.to(device, dtype)` leaves slice positions float32.

        Raises:
            ValueError: more than one `<image>` in a prompt, or numbers of placeholders and volumes that differ.
        """
        if volumes is not None and images is not None:
            raise ValueError("`volumes` and `images` are two names of one argument; pass one of them.")
        if any(kwargs.get(name) is not None for name in ("videos", "audio")):
            raise ValueError("SamfProcessor reads CT volumes and text; it has no videos or audio.")
        rendered = kwargs.pop(_RENDERED, None)
        if rendered is not None:
            prompts = [text] if isinstance(text, str) else text
            rendered.extend((prompt, kwargs.get("add_special_tokens", True)) for prompt in prompts)
        images = images if volumes is None else volumes
        output = SliceFeatures(super().__call__(images=images, text=text, **kwargs).data)
        output.skip_tensor_conversion = self.skip_tensor_conversion
        texts = [text] if isinstance(text, str) else list(text or [])
        if texts and images is not None and not _is_from_chats(images, texts):
            answers = self._find_answers(output["input_ids"])
            if answers is not None:
                output["prompt_mask"] = self._prompt_mask(output, answers)
        return output

    def prepare_inputs_layout(self, images: Any = None, text: Any = None, **kwargs: Any) -> tuple:
        """Texts as a list, and volumes as a list with one entry a text (None where the text has no placeholder)."""
        text = [text] if isinstance(text, str) else text
        text = list(text) if text is not None else None
        volumes = _flatten(images)
        if text is None or not all(isinstance(prompt, str) for prompt in text):
            return volumes, text, None, None
        if not text:
            raise ValueError("`text` is an empty list; expected at least one prompt.")
        counts = [len(_PLACEHOLDER.findall(prompt)) for prompt in text]
        if max(counts) > 1:
            raise ValueError(
                f"Prompt {counts.index(max(counts))} holds {max(counts)} {self.image_token} placeholders; a prompt takes "
                "one volume. Ask about each volume in a prompt of its own."
            )
        # A chat's volumes come with one list a conversation: another's placeholder isn't theirs.
        given = [len(item) for item in images] if _is_from_chats(images, text) else counts
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
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation, or turn it into model inputs (`tokenize=True, return_dict=True`).

        A volume is a content block: `{"type": "volume", "path": "scan.nii.gz"}`, or under `"volume"` anything that
        `__call__` takes, and the list of one DICOM series' files. OpenAI's names (`input_image`, `image_url`,
        `input_text`) are read too. With `return_dict=True` the result also holds `prompt_mask` (B, T), True on the
        prompt's text: the tokens of system and user turns before the first assistant token behind the volume, image
        placeholders and padding aside. The model's fusion reads these tokens alone, so an answer in the conversation
        can't leak into the image tokens. A template without `{% generation %}` can't tell an answer from the prompt: a
        conversation that holds an answer then gets no `prompt_mask`.

        Raises:
            ValueError: a content block, role or `tools` that the template doesn't render; the message says which.
        """
        conversation = read_conversation(conversation)
        template = self._chat_template_named(chat_template)
        texts = self._check_rendering(conversation, template, **kwargs)
        rendered: list[tuple[str, bool]] = []
        want_mask = tokenize and return_dict
        # The library marks no answers with either of these.
        unmarked = bool(kwargs.get("continue_final_message") or kwargs.get("sanitize_control_tokens"))
        library_marks = want_mask and has_generation_marks(template) and not unmarked
        if tokenize and unmarked:
            processor_kwargs = {**(processor_kwargs or {}), _RENDERED: rendered}
        output = super().apply_chat_template(
            conversation,
            chat_template=chat_template,
            tokenize=tokenize,
            return_dict=return_dict,
            return_assistant_tokens_mask=return_assistant_tokens_mask or library_marks,
            processor_kwargs=processor_kwargs,
            **kwargs,
        )
        if not want_mask:
            return output
        if library_marks:
            answers = output["assistant_masks"] if return_assistant_tokens_mask else output.pop("assistant_masks")
        else:
            answers = self._answer_masks(output, texts, rendered)
        if answers is not None:
            output["prompt_mask"] = self._prompt_mask(output, answers)
        return output

    def answer_end(self) -> int | None:
        """Return the token that ends an answer in training: the last one that the chat template marks; None = it marks none."""
        probe = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": "Answer"}]
        text, spans = render(self.tokenizer, self._chat_template_named(None), probe)
        if not spans or "Answer" not in text[slice(*spans[-1])]:
            return None
        return self.tokenizer(text[slice(*spans[-1])], add_special_tokens=False)["input_ids"][-1]

    def _find_answers(self, ids: Any) -> list[torch.Tensor] | None:
        """Where the answers stand in texts that came ready: behind the template's header of an answer, to its end token.

        Args:
            ids: token ids (B, T), or lists of different lengths.

        Returns:
            A mask (T,) a row; None where no text holds an answer, or where one with a volume has no header behind it.
        """
        header, end = self._answer_header(), self.answer_end()
        masks = []
        for row in map(torch.as_tensor, ids):
            starts = [place + len(header) for place in _places(row.tolist(), header)]
            volume = (row == self.image_token_id).nonzero()
            if len(volume) and (not starts or starts[-1] <= int(volume[-1]) or (end is None and len(starts) > 1)):
                return None
            mask = torch.zeros_like(row, dtype=torch.bool)
            for start in starts:
                ends = (row[start:] == end).nonzero() if end is not None else ()
                mask[start : start + int(ends[0]) + 1 if len(ends) else None] = True
            pad = self.tokenizer.pad_token_id
            masks.append(mask & (row != pad) if pad != end else mask)
        return masks if any(mask.any() for mask in masks) else None

    def _answer_header(self) -> list[int]:
        """Token ids that the chat template sets before an answer; none for a template that sets nothing."""
        template, probe = self._chat_template_named(None), [{"role": "user", "content": "Question"}]
        without = render(self.tokenizer, template, probe)[0]
        header = render(self.tokenizer, template, probe, add_generation_prompt=True)[0].removeprefix(without)
        return self.tokenizer(header, add_special_tokens=False)["input_ids"] if header else []

    def _chat_template_named(self, chat_template: str | None) -> str:
        """The template itself, of the name of one or None for the default."""
        templates = self.chat_template
        if isinstance(templates, dict):
            return templates.get("default" if chat_template is None else chat_template, chat_template)
        return templates if chat_template is None else chat_template

    def _check_rendering(self, conversation: list[Any], template: str, **kwargs: Any) -> list["_Rendered"]:
        """Return each conversation's text and answers.

        Raises:
            ValueError: the text of a message, the tools or the documents don't come out of the template.
        """
        conversations = conversation if isinstance(conversation[0], list) else [conversation]
        names = ("add_generation_prompt", "tools", "documents")
        options = {name: value for name, value in kwargs.items() if name in names and value}
        options |= {name: value for name, value in kwargs.items() if re.search(rf"\b{re.escape(name)}\b", template)}
        found = []
        for messages in conversations:
            text, answers = render(self.tokenizer, template, messages, **options)
            known = has_generation_marks(template) or not _holds_answer(messages)
            found.append(_Rendered(text, answers if known else None))
            for index, message in enumerate(messages):
                # Templates of models that think leave a former turn's thoughts out.
                if any(said.strip() not in text and "</think>" not in said for said in texts_of(message)):
                    raise ValueError(
                        f"Message {index} has the role {message['role']!r}, whose text the chat template leaves out or "
                        "changes. Use roles that it renders, such as user and assistant."
                    )
            for name in ("tools", "documents"):
                without = {key: value for key, value in options.items() if key != name}
                if name in options and text == render(self.tokenizer, template, messages, **without)[0]:
                    raise ValueError(f"The chat template doesn't render {name}; leave them out, or use one that does.")
        return found

    def _answer_masks(
        self, output: BatchFeature, texts: list["_Rendered"], rendered: list[tuple[str, bool]]
    ) -> list[torch.Tensor] | None:
        """Where the answers are, by the texts that were tokenized; None where that can't be told.

        Args:
            texts: whole conversations.
            rendered: what was tokenized of them: markers of sanitized tokens included, before placeholders were expanded,
                and only up to the message that shall be continued.
        """
        masks = []
        for row, whole in enumerate(texts):
            if whole.answers is None:
                return None
            ids = torch.as_tensor(output["input_ids"][row])
            mask = torch.zeros_like(ids, dtype=torch.bool)
            attended = torch.as_tensor(output["attention_mask"][row]) == 1 if "attention_mask" in output else ~mask
            if whole.answers and not (rendered and whole.text.startswith(_MARKERS.sub("", rendered[row][0]))):
                return None
            for span in whole.answers:
                places = attended.nonzero()[:, 0]
                first, last = (self._token_at(*rendered[row], place, ids[places].tolist()) for place in span)
                mask[places[first:last]] = True
            masks.append(mask)
        return masks

    def _token_at(self, text: str, special: bool, place: int, ids: list[int]) -> int:
        """Which of a row's tokens is the first that reaches beyond character `place` of its text without markers."""
        characters = [index for index, character in enumerate(text) if not _MARKERS.match(character)]
        if place >= len(characters):
            return len(ids)
        count = ids.count(self.image_token_id)
        before = _PLACEHOLDER.sub(self.image_token * count, text[: characters[place]])
        options = {"sanitize_control_tokens": True} if _MARKERS.search(text) else {}
        prefix = self.tokenizer(before, add_special_tokens=special, **options)["input_ids"]
        differs = (index for index, pair in enumerate(zip(prefix, ids, strict=False)) if pair[0] != pair[1])
        return next(differs, min(len(prefix), len(ids)))

    def _prompt_mask(self, output: BatchFeature, answers: Any) -> Any:
        """In the form of `input_ids`: a tensor or an array (B, T), or lists."""
        ids = output["input_ids"]
        rows = []
        for row, (tokens, answer) in enumerate(zip(ids, answers, strict=True)):
            tokens, answer = torch.as_tensor(tokens), torch.as_tensor(answer).bool()
            image = tokens == self.image_token_id
            behind = image.cumsum(0) == image.sum()  # the volume, its last placeholder included
            attended = torch.as_tensor(output["attention_mask"][row]) if "attention_mask" in output else 1
            rows.append(((behind & answer).cumsum(0) == 0) & ~answer & ~image & (attended == 1))
        if isinstance(ids, torch.Tensor):
            return torch.stack(rows)
        return np.stack(rows) if isinstance(ids, np.ndarray) else [row.tolist() for row in rows]


def _places(ids: list[int], part: list[int]) -> list[int]:
    """Where `part` begins within `ids`."""
    return [place for place in range(len(ids)) if part and ids[place : place + len(part)] == part]


def _holds_answer(messages: list[dict[str, Any]]) -> bool:
    return any(message["role"] not in ("system", "user") for message in messages)


def _is_from_chats(images: Any, text: list[str]) -> bool:
    """Whether the volumes are a chat template's: one list a prompt."""
    nested = isinstance(images, list) and len(images) == len(text) and all(isinstance(item, list) for item in images)
    return nested and any(isinstance(volume, OneVolume) for item in images for volume in item)


def _flatten(volumes: Any) -> list[Any] | None:
    """One volume, a list or nested lists of them become a flat list; chat wrappers come off."""
    if volumes is None:
        return None
    if not isinstance(volumes, (list, tuple)):
        return [_read_one(volumes.value) if isinstance(volumes, OneVolume) else volumes]
    return [volume for item in volumes for volume in _flatten(item) or []]


def _read_one(volume: Any) -> Any:
    """What one content block holds: a list is the files of one series.

    Raises:
        ValueError: it holds several volumes.
    """
    if not isinstance(volume, (list, tuple)):
        return volume
    if len(volume) == 1:
        return _read_one(volume[0])
    several = (CTVolume, Mapping, list, tuple, np.ndarray, torch.Tensor)
    if not volume or any(isinstance(item, several) for item in volume):
        raise ValueError(
            f"A content block holds a list of {len(volume)} volumes; it takes one. Ask about each volume in a conversation "
            "of its own. (A list of files is the DICOM files of one series.)"
        )
    return to_ct_volume(volume)


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
