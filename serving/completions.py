"""Answers in the form of OpenAI's chat completions."""

import json
import time
import uuid
from typing import Any

from samf.model.report_samf import DISCLAIMER
from samf.serving.jobs import Answer


class Completion:
    """The objects of one response: they share its id, time and model.

    Args:
        model_id: of the model that answers.
        notes: what of the request was not read.
    """

    def __init__(self, model_id: str, notes: tuple[str, ...] = ()) -> None:
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_id}
        self._notes = notes

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the completion of a request that isn't streamed."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}
        common = {**self._common, "object": "chat.completion", "choices": [choice]}
        return {**common, "usage": _usage(answer), "samf": self._extra(answer)}

    def first(self) -> bytes:
        """Return the event that says who speaks."""
        return self._event({"role": "assistant", "content": ""})

    def piece(self, text: str) -> bytes:
        """Return the event of a further piece of the text."""
        return self._event({"content": text})

    def last(self, answer: Answer, include_usage: bool) -> bytes:
        """Return the events that end a stream.

        Args:
            answer: the finished answer.
            include_usage: with a chunk of its token counts.
        """
        events = self._event({}, answer.finish_reason, samf=self._extra(answer))
        if include_usage:
            events += event({**self._common, "object": "chat.completion.chunk", "choices": [], "usage": _usage(answer)})
        return events + b"data: [DONE]\n\n"

    def _event(self, delta: dict[str, Any], finish_reason: str | None = None, **extra: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**self._common, "object": "chat.completion.chunk", "choices": [choice], **extra})

    def _extra(self, answer: Answer) -> dict[str, Any]:
        extra = {"disclaimer": DISCLAIMER, "warnings": [*answer.warnings, *self._notes], "cached": answer.cached}
        return extra if answer.report is None else {**extra, "report": answer.report.to_dict()}


def event(values: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return f"data: {json.dumps(values, ensure_ascii=False)}\n\n".encode("utf-8", "replace")


def _usage(answer: Answer) -> dict[str, int]:
    counts = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
    return {**counts, "total_tokens": sum(counts.values())}
