"""Chat messages of several APIs as the messages and content blocks that chat templates render."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

# The names of this project, of transformers, and of OpenAI's two APIs.
TEXT_TYPES = ("text", "input_text", "output_text")
VOLUME_TYPES = ("volume", "image", "input_image", "image_url")
VOLUME_KEYS = ("volume", "image", "path", "url", "image_url")
# Under which key templates, and the library's collection of a chat's images, find a block's volume; others keep their name.
_TEMPLATE_KEYS = {"volume": "image", "image_url": "url"}
_HINT_KEYS = {"type", "detail", "cache_control"}  # how to treat a picture: of no meaning for a volume
_EXPECTED = (
    'expected {"type": "volume", "path": …} (also named image, input_image or image_url; the volume under volume, image, '
    'path, url or image_url) or {"type": "text", "text": …} (also input_text, output_text)'
)


class OneVolume(str):
    """Carries a block's volume through the chat template's clean-up, which would take arrays and dataclasses apart.

    As text, which a template may write, it is the path or address, and for anything else the name of its type, as the
    library has it.
    """

    value: Any

    def __new__(cls, value: Any) -> "OneVolume":
        named = isinstance(value, (str, os.PathLike))
        self = super().__new__(cls, os.fspath(value) if named else f"<{type(value).__name__}>")
        self.value = value
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "OneVolume":
        return self  # some releases copy a conversation before they continue it


def read_conversation(conversation: Any, place: str = "") -> list[Any]:
    """Return a conversation, or a list of them, with plain messages and content blocks alone.

    Args:
        conversation: messages (mappings, dataclasses or pydantic models), an object that has them as `messages`, or a list
            of such conversations. What is None counts as absent, as rows of a data set have it.
        place: where the conversation stands in a batch, for messages of errors.

    Returns:
        New messages with `content` a string or a list of `{"type": "text", "text": str}` and
        `{"type": "image", "image": OneVolume}`. The volume stands under `image`, `path` or `url`, as the block named it, for
        templates that write it, and under no key where the block names none.

    Raises:
        ValueError: a block, role or content that no template renders; says where, what was found and what counts.
        TypeError: not a conversation.
    """
    conversation = getattr(conversation, "messages", conversation)
    if not isinstance(conversation, (list, tuple)):
        raise TypeError(f"{place}a conversation is a list of messages; got {_kind(conversation)}.")
    if not conversation:
        raise ValueError(f"{place}the conversation is empty; expected at least one message.")
    if isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages"):
        return [read_conversation(item, f"Conversation {index}: ") for index, item in enumerate(conversation)]
    return [_read_message(message, f"{place}message {index}") for index, message in enumerate(conversation)]


def texts_of(message: Mapping[str, Any]) -> list[str]:
    """Return the texts of a message that `read_conversation` gave."""
    content = message.get("content") or []
    if isinstance(content, str):
        return [content]
    return [block["text"] for block in content if block["type"] == "text"]


def _read_message(message: Any, place: str) -> dict[str, Any]:
    message = {key: value for key, value in _as_mapping(message, place).items() if value is not None}
    if not isinstance(message.get("role"), str):
        raise ValueError(f"{place} has the role {message.get('role')!r}; expected system, user or assistant.")
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return message
    if not isinstance(content, (list, tuple)):
        found = "no content" if content is None else f"a {_kind(content)} as content"
        raise ValueError(f"{place} ({message['role']}) has {found}; expected a string or a list of content blocks.")
    blocks = [_read_block(block, f"{place}, block {index}") for index, block in enumerate(content)]
    if message["role"] == "assistant" and any(block["type"] != "text" for block in blocks):
        raise ValueError(f"{place} is the assistant's and holds a volume; put volumes in the user's messages.")
    return {**message, "content": blocks}


def _read_block(block: Any, place: str) -> dict[str, Any]:
    if not isinstance(block, Mapping) and not dataclasses.is_dataclass(block) and not hasattr(block, "model_dump"):
        raise ValueError(f"{place} is a {_kind(block)}; {_EXPECTED}.")
    block = {key: value for key, value in _as_mapping(block, place).items() if value is not None}
    kind = block.get("type")
    if kind in TEXT_TYPES:
        volumes = [key for key in VOLUME_KEYS if key in block]
        if not isinstance(block.get("text"), str) or volumes:
            found = f"a volume under {volumes[0]!r}" if volumes else f"as its text {_kind(block.get('text'))}"
            raise ValueError(f"{place} is of type {kind!r} and has {found}; {_EXPECTED}.")
        return {"type": "text", "text": block["text"]}
    if kind not in VOLUME_TYPES:
        found = "has no type" if kind is None else f"is of type {kind!r}"
        raise ValueError(f"{place} {found} (keys {sorted(map(str, block))}); {_EXPECTED}.")
    given = [key for key in VOLUME_KEYS if key in block]
    unknown = sorted(str(key) for key in block if key not in VOLUME_KEYS and key not in _HINT_KEYS)
    if unknown or len(given) > 1:
        raise ValueError(
            f"{place} is of type {kind!r} and holds {', '.join(map(repr, given + unknown))}; a block takes one volume, under "
            f"one of {', '.join(VOLUME_KEYS)}, and nothing else. Give a text, or another volume, a block of its own."
        )
    return {"type": "image", **{_TEMPLATE_KEYS.get(key, key): OneVolume(_source(block[key], place)) for key in given}}


def _source(value: Any, place: str) -> Any:
    """A volume as a block names it; OpenAI's first API has its address one level deeper."""
    if isinstance(value, Mapping) and set(value) - _HINT_KEYS == {"url"}:
        value = value["url"]
    if isinstance(value, str) and value.startswith("data:"):
        raise ValueError(f"{place} holds a data: URL ({len(value)} characters); save it as a file and give its path.")
    return value


def _as_mapping(item: Any, place: str) -> Mapping[str, Any]:
    if isinstance(item, Mapping):
        return item
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}
    if callable(getattr(item, "model_dump", None)):  # pydantic's, as the messages of OpenAI's client
        return item.model_dump()
    raise TypeError(f"{place} is a {_kind(item)}; expected a mapping with role and content.")


def _kind(item: Any) -> str:
    return "None" if item is None else type(item).__name__
