"""How a record's question and answer are written out: once, for training, evaluation and the demo."""

from collections.abc import Mapping
from typing import Any

LETTERS = "abcdefghij"
REPORT_QUESTION = "Write the radiology report of this chest CT."


def record_prompt(record: Mapping[str, Any]) -> str:
    """The user's text of a record: its question, then its choices as "(a) … (b) …" when it has any."""
    question = (record["question"] or "").strip() or REPORT_QUESTION
    choices = record.get("choices") or []
    if len(choices) > len(LETTERS):
        raise ValueError(
            f"Record {record.get('id')!r} has {len(choices)} choices; at most {len(LETTERS)} get a letter."
        )
    options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    return f"{question} {options}".strip()


def record_conversation(record: Mapping[str, Any], volume: Any = None, *, answer: bool = False) -> list[dict[str, Any]]:
    """A record as chat messages: the user's turn, with `volume` in front unless None, and with `answer` the reply."""
    content: list[dict[str, Any]] = [{"type": "text", "text": record_prompt(record)}]
    if volume is not None:
        content.insert(0, {"type": "volume", "volume": volume})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": record["answer"].strip()}]})
    return messages
