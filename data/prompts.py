"""Prompts and conversations of records: the same for training, evaluation and the demo."""

from collections.abc import Mapping
from typing import Any

from samf.data.schema import ChatMessage, ContentBlock
from samf.model.constants_samf import REPORT_QUESTION

__all__ = ["LETTERS", "REPORT_QUESTION", "record_conversation", "record_prompt"]

LETTERS = "abcdefghij"


def record_prompt(record: Mapping[str, Any]) -> str:
    """Return the user's text of a record: its question, followed by its choices as "(a) … (b) …".

    Args:
        record: a `Record`, or a mapping with its `question` and optionally `choices`.

    Raises:
        ValueError: more choices than there are letters.
    """
    question = (record["question"] or "").strip() or REPORT_QUESTION
    choices = record.get("choices") or []
    if len(choices) > len(LETTERS):
        raise ValueError(
            f"Record {record.get('id')!r} has {len(choices)} choices; at most {len(LETTERS)} get a letter."
        )
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{question} {options}".strip()


def record_conversation(record: Mapping[str, Any], volume: object = None, *, answer: bool = False) -> list[ChatMessage]:
    """Return a record as chat messages, for `apply_chat_template`.

    Args:
        record: a `Record`, or a mapping with its `question`, `choices` and `answer`.
        volume: precedes the text, if it isn't None: a path, a `CTVolume`, slice tensors or embeddings.
        answer: add the answer as the assistant's message.
    """
    content: list[ContentBlock] = [{"type": "text", "text": record_prompt(record)}]
    if volume is not None:
        content.insert(0, {"type": "volume", "volume": volume})
    messages: list[ChatMessage] = [{"role": "user", "content": content}]
    if answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": record["answer"].strip()}]})
    return messages
