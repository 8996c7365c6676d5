"""Chat messages of several APIs, converted to the messages and content blocks that chat templates render."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict, cast

import numpy as np
import torch

from .ct_volume import CTVolume, to_ct_volume

# Block types and keys of this project, of transformers, and of OpenAI's two APIs.
TEXT_TYPES = ("text", "input_text", "output_text")
VOLUME_TYPES = ("volume", "image", "input_image", "image_url")
VOLUME_KEYS = ("volume", "image", "path", "url", "image_url")
# Keys under which templates, and transformers' collection of a chat's images, expect a volume; other keys stay as they are.
_TEMPLATE_KEYS = {"volume": "image", "image_url": "url"}
_HINT_KEYS = {"type", "detail", "cache_control"}  # how to treat an image: meaningless for a volume
_EXPECTED = (
    'expected {"type": "volume", "path": …} (also named image, input_image or image_url; the volume under volume, image, '
    'path, url or image_url) or {"type": "text", "text": …} (also input_text, output_text)'
)


_Fields: TypeAlias = Mapping[str, Any]  # of a message or block as it was given


class VolumeHandle(str):
    """Opaque holder of a content block's volume: a chat template's clean-up would convert arrays and dataclasses.

    As text, which a template may write, it is the path or address, and for other volumes the name of their type.

    Attributes:
        value: the volume, as the block has it.
    """

    value: Any

    def __new__(cls, value: Any) -> "VolumeHandle":
        """Wrap a volume."""
        named = isinstance(value, (str, os.PathLike))
        self = super().__new__(cls, os.fspath(value) if named else f"<{type(value).__name__}>")
        self.value = value
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "VolumeHandle":
        """Return the handle itself; some versions of transformers copy a conversation before they continue it."""
        return self


class TextBlock(TypedDict):
    """Content block with text."""

    type: Literal["text"]
    text: str


class VolumeBlock(TypedDict):
    """Content block with a volume under at most one of these keys."""

    type: Literal["image"]
    image: NotRequired[VolumeHandle]
    path: NotRequired[VolumeHandle]
    url: NotRequired[VolumeHandle]


class Message(TypedDict):
    """Chat message with plain content blocks; other keys, such as `tool_calls`, are kept."""

    role: str
    content: NotRequired[str | list[TextBlock | VolumeBlock]]


Conversation: TypeAlias = list[Message]


def read_conversations(conversation: Any) -> list[Conversation]:
    """Return a conversation, or each of a list of them, as messages with plain content blocks.

    Args:
        conversation: messages (mappings, dataclasses or pydantic models), an object that has them as `messages`, or a list
            of such conversations. Values that are None count as absent, as in rows of a data set.

    Returns:
        A list of conversations of new messages, whose `content` is a string or a list of `{"type": "text", "text": str}` and
        `{"type": "image", "image": VolumeHandle}`. The volume is under `image`, `path` or `url`, as the block named it, for
        templates that write it, and under no key if the block names none.

    Raises:
        ValueError: a block, role or content that no template renders; the message says where, what was found and what is
            accepted.
        TypeError: not a conversation.
    """
    if is_batch(conversation):
        return [_read_conversation(item, f"Conversation {index}: ") for index, item in enumerate(conversation)]
    return [_read_conversation(conversation, "")]


def is_batch(conversation: Any) -> bool:
    """Return whether this is a list of conversations instead of a conversation."""
    if not isinstance(conversation, (list, tuple)) or not conversation:
        return False
    return isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")


def message_texts(message: Message) -> list[str]:
    """Return the texts of a message that `read_conversations` gave."""
    content = message.get("content") or []
    if isinstance(content, str):
        return [content]
    return [block["text"] for block in content if block["type"] == "text"]


def is_from_chats(images: Any, text: Sequence[str]) -> bool:
    """Return whether the volumes come from a chat template: one list per prompt."""
    nested = isinstance(images, list) and len(images) == len(text) and all(isinstance(item, list) for item in images)
    return nested and any(isinstance(volume, VolumeHandle) for item in images for volume in item)


def flatten_volumes(volumes: Any) -> list[Any] | None:
    """Return one volume or nested lists of them as a flat list, taken out of their handles; None stays None.

    Raises:
        ValueError: a content block holds several volumes.
    """
    if volumes is None:
        return None
    if not isinstance(volumes, (list, tuple)):
        return [_read_one(volumes.value) if isinstance(volumes, VolumeHandle) else volumes]
    return [volume for item in volumes for volume in flatten_volumes(item) or []]


def _read_one(volume: Any) -> Any:
    """Return the volume of one content block; a list holds the files of one series.

    Raises:
        ValueError: the block holds several volumes.
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


def _read_conversation(conversation: Any, place: str) -> Conversation:
    messages = getattr(conversation, "messages", conversation)
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"{place}a conversation is a list of messages; got {_kind(messages)}.")
    if not messages:
        raise ValueError(f"{place}the conversation is empty; expected at least one message.")
    return [_read_message(message, f"{place}message {index}") for index, message in enumerate(messages)]


def _read_message(item: Any, place: str) -> Message:
    message = {key: value for key, value in _as_mapping(item, place).items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{place} has the role {message.get('role')!r}; expected system, user or assistant.")
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return cast(Message, message)
    if not isinstance(content, (list, tuple)):
        found = "no content" if content is None else f"a {_kind(content)} as content"
        raise ValueError(f"{place} ({message['role']}) has {found}; expected a string or a list of content blocks.")
    blocks = [_read_block(block, f"{place}, block {index}") for index, block in enumerate(content)]
    if message["role"] == "assistant" and any(block["type"] != "text" for block in blocks):
        raise ValueError(f"{place} is the assistant's and holds a volume; put volumes in the user's messages.")
    return cast(Message, {**message, "content": blocks})


def _read_block(item: Any, place: str) -> TextBlock | VolumeBlock:
    if not isinstance(item, Mapping) and not dataclasses.is_dataclass(item) and not hasattr(item, "model_dump"):
        raise ValueError(f"{place} is a {_kind(item)}; {_EXPECTED}.")
    block = {key: value for key, value in _as_mapping(item, place).items() if value is not None}
    kind = block.get("type")
    if kind in TEXT_TYPES:
        return _read_text_block(block, place)
    if kind in VOLUME_TYPES:
        return _read_volume_block(block, place)
    found = "has no type" if kind is None else f"is of type {kind!r}"
    raise ValueError(f"{place} {found} (keys {sorted(map(str, block))}); {_EXPECTED}.")


def _read_text_block(block: _Fields, place: str) -> TextBlock:
    text, volumes = block.get("text"), [key for key in VOLUME_KEYS if key in block]
    if not isinstance(text, str) or volumes:
        found = f"a volume under {volumes[0]!r}" if volumes else f"as its text {_kind(text)}"
        raise ValueError(f"{place} is of type {block['type']!r} and has {found}; {_EXPECTED}.")
    return {"type": "text", "text": text}


def _read_volume_block(block: _Fields, place: str) -> VolumeBlock:
    given = [key for key in VOLUME_KEYS if key in block]
    unknown = sorted(str(key) for key in block if key not in VOLUME_KEYS and key not in _HINT_KEYS)
    if unknown or len(given) > 1:
        raise ValueError(
            f"{place} is of type {block['type']!r} and holds {', '.join(map(repr, given + unknown))}; a block takes one "
            f"volume, under one of {', '.join(VOLUME_KEYS)}, and nothing else. Put texts and other volumes into blocks of "
            "their own."
        )
    volume = {_TEMPLATE_KEYS.get(key, key): VolumeHandle(_source(block[key], place)) for key in given}
    return cast(VolumeBlock, {"type": "image", **volume})


def _source(value: Any, place: str) -> Any:
    """Return the volume that a block names; OpenAI's first API has its address one level deeper."""
    if isinstance(value, Mapping) and set(value) - _HINT_KEYS == {"url"}:
        value = value["url"]
    if isinstance(value, str) and value.startswith("data:"):
        raise ValueError(f"{place} holds a data: URL ({len(value)} characters); save it as a file and give its path.")
    return value


def _as_mapping(item: Any, place: str) -> _Fields:
    if isinstance(item, Mapping):
        return item
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    if callable(getattr(item, "model_dump", None)):  # pydantic models, such as the messages of OpenAI's client
        return item.model_dump()
    raise TypeError(f"{place} is a {_kind(item)}; expected a mapping with role and content.")


def _kind(item: Any) -> str:
    return "None" if item is None else type(item).__name__
