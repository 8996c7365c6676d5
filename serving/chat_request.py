"""The body of POST /v1/chat/completions, checked."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from samf.serving.errors import ApiError
from samf.serving.settings import ApiSettings

# What would change the answer, and isn't there: refused rather than ignored. Each with the values that change nothing.
_UNSUPPORTED: dict[str, Sequence[Any]] = {
    "audio": (None,),
    "frequency_penalty": (None, 0, 0.0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "presence_penalty": (None, 0, 0.0),
    "response_format": (None, {"type": "text"}),
    "stop": (None, [], ""),
    "tools": (None, []),
}


class _Strict(BaseModel):
    # Unknown fields are ignored, as OpenAI's client sends more of them with each version.
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)


class Volume(_Strict):
    """A volume in the request: base64 of one file (or of a zip of DICOM files)."""

    data: str
    name: str | None = None  # not used: the format is known by the content, and a name may hold a patient's


class File(_Strict):
    """OpenAI's own block of a file."""

    file_data: str | None = None
    filename: str | None = None
    file_id: str | None = None


class Block(_Strict):
    """A content block: text, a volume or a file."""

    type: str
    text: str | None = None
    volume: Volume | None = None
    path: str | None = None
    file: File | None = None


class Message(_Strict):
    """One turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Block], Field(max_length=64)] | None = None


class StreamOptions(_Strict):
    """OpenAI's options of a stream."""

    include_usage: bool = False


class SamfOptions(BaseModel):
    """What OpenAI's API has no field for."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    report: bool = False
    evidence: Literal["fast", "full"] | None = None
    any_region: bool = False


class ChatRequest(_Strict):
    """A request for the report of a scan, or for the answer to a question about it."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=256)]
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: int | None = 1
    samf: SamfOptions = SamfOptions()


@dataclass(frozen=True)
class Asked:
    """What a request asks of which volume.

    Attributes:
        question: None = the report.
        data: base64 of the volume's file, perhaps as data: URL.
        path: of the volume below the scan folder; one of both is None.
        notes: what of the request was not read.
    """

    question: str | None
    data: str | None
    path: str | None
    notes: tuple[str, ...]


def parse_request(body: bytes | bytearray) -> ChatRequest:
    """Return the request in a body of JSON.

    Raises:
        ApiError: 400; no JSON, or not such a request.
    """
    try:
        values = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ApiError(400, "The body isn't JSON in UTF-8; expected a chat completion request.", "bad_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, "The body isn't a JSON object; expected a chat completion request.", "bad_json")
    for name, harmless in _UNSUPPORTED.items():
        if name in values and values[name] not in harmless:
            raise ApiError(400, f"{name} isn't supported here; leave it out.", "unsupported_parameter", name)
    try:
        request = ChatRequest.model_validate(values)
    except (ValidationError, RecursionError) as error:
        raise _bad_field(error) from error
    if request.n not in (None, 1):
        raise ApiError(400, "n: there is one answer per request; send several requests.", "unsupported_parameter", "n")
    return request


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} isn't JSON")


def _bad_field(error: Exception) -> ApiError:
    """Return what is wrong with the first bad field, without its value."""
    if not isinstance(error, ValidationError):
        return ApiError(400, "The request is nested too deeply.", "bad_json")
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # Names of fields and kinds of the union; an index, but never a key that the client made up.
    place = ".".join(str(part)[:40] for part in first["loc"] if not str(part).startswith(("constrained-", "str")))
    return ApiError(400, f"{place[:120]}: {first['msg'][:200]}.", "invalid_value", place[:120] or None)


def read_messages(messages: Sequence[Message], settings: ApiSettings) -> Asked:
    """Return what a conversation asks: the text of its last message, about its only volume.

    Args:
        messages: in order.
        settings: the limits.

    Raises:
        ApiError: 400; no volume or several, a question that is too long, or a block of another kind.
    """
    if messages[-1].role != "user":
        raise ApiError(400, "The last message must be the user's.", "invalid_value", "messages")
    volumes, texts = [], []
    for message in messages:
        is_last = message is messages[-1]
        blocks = message.content if isinstance(message.content, list) else []
        if isinstance(message.content, str) and is_last:
            texts.append(message.content)
        for block in blocks:
            if block.type == "text":
                texts += [block.text or ""] if is_last else []
            elif message.role == "user":
                volumes.append(_volume_of(block))
    if len(volumes) != 1:
        raise ApiError(
            400,
            f"{len(volumes)} volumes in the conversation; expected one, as a content block of type volume or file.",
            "invalid_value",
            "messages",
        )
    question = "\n".join(text for text in texts if text.strip()).strip()
    if len(question) > settings.max_question:
        raise ApiError(
            400,
            f"A question of {len(question)} characters; expected at most {settings.max_question}.",
            "question_too_long",
            "messages",
        )
    if not question.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in question):
        raise ApiError(400, "The question has half a character (a lone surrogate).", "invalid_value", "messages")
    data, path = volumes[0]
    return Asked(question or None, data, path, tuple(_notes(messages)))


def _volume_of(block: Block) -> tuple[str | None, str | None]:
    """Return the base64 or the path of a block with a volume."""
    if block.type == "volume" and (block.volume is None) != (block.path is None):
        return (None if block.volume is None else block.volume.data), block.path
    if block.type == "file" and block.file is not None and block.file.file_data is not None:
        return block.file.file_data, None
    expected = {
        "volume": "with either volume.data (base64) or path",
        "file": "with file.file_data (a data: URL in base64); uploaded files (file_id) aren't supported",
    }
    found = f"A block of type {block.type}" if block.type in expected else "A block of an unknown type"
    wanted = expected.get(block.type, "of type text, volume or file")
    raise ApiError(400, f"{found}; expected one {wanted}.", "invalid_value", "messages")


def _notes(messages: Sequence[Message]) -> list[str]:
    notes = []
    if any(message.role in ("system", "developer") for message in messages):
        notes.append("System messages were not read.")
    if any(message.role == "assistant" for message in messages):
        notes.append("Earlier turns were not read: each question is answered by itself.")
    return notes
