"""A judge behind an OpenAI-compatible endpoint (vLLM, TGI, Ollama, …).

The client is our own: huggingface_hub.InferenceClient, tried in version 2.4, follows redirects and takes the score of the
server they name, sends the machine's saved Hub token to a server that was given no key, and limits the time of each read but
not of the whole reply.
"""

import http.client
import json
import logging
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any, TypeVar

from samf.evaluation.judging.base import JudgeError, ReplyError
from samf.evaluation.judging.prompts import Messages
from samf.evaluation.schema import JudgeIdentity

__all__ = ["EndpointJudge"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_PROMPT_REFUSED = frozenset({400, 413, 422})  # e.g. longer than the context
_LONGEST_WAIT = 60.0  # seconds
_LONGEST_ANSWER = 1 << 20  # bytes of a server's answer
_SHORTEST_KEY = 4  # characters; a shorter key is no secret, and occurs in many texts by chance
_KEY_PIECE = 8  # characters of the key that are not shown either


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: it would send the key to another address, and turn the POST into a GET."""

    def redirect_request(self, *request: Any) -> None:
        return None


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return what `call` returns.

    Raises:
        TimeoutError: it takes longer than `seconds` in total; a socket's timeout limits each read only.
    """
    outcome: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            outcome.put((call(), None))
        except Exception as error:  # noqa: BLE001 - handed to the caller's thread
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True, name="judge-request").start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no whole answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # None only with an error


class EndpointJudge:
    """A model behind OpenAI's chat completions.

    Args:
        endpoint: base address, e.g. http://localhost:8000/v1.
        model: the model's name there.
        api_key_variable: environment variable that holds the key; a local server needs none.
        max_tokens: limit of a reply; more for models that reason in their replies.
        timeout: seconds to wait for one whole reply.
        total_timeout: seconds for one prompt with all its attempts and the waits between them.
        attempts: how often a prompt is sent before it counts as failed.
        first_wait: seconds before the second attempt; later waits double, with jitter, up to a minute.
        workers: the number of concurrent prompts.

    Raises:
        ValueError: an endpoint that is no address or has a password in it, or a number below 1.
    """

    def __init__(
        self,
        endpoint: str,
        model: str,
        *,
        api_key_variable: str = "OPENAI_API_KEY",
        max_tokens: int = 64,
        timeout: float = 120.0,
        total_timeout: float = 600.0,
        attempts: int = 6,
        first_wait: float = 1.0,
        workers: int = 8,
    ):
        minimum = {"max_tokens": max_tokens, "attempts": attempts, "workers": workers}
        self.address = _chat_address(endpoint, api_key_variable)
        if wrong := [f"{name} is {value}" for name, value in minimum.items() if value < 1]:
            raise ValueError(f"{wrong[0]}; it must be at least 1.")
        self.identity: JudgeIdentity = {"model": model, "temperature": 0, "max_tokens": max_tokens}
        self.api_key_variable = api_key_variable
        self.timeout, self.attempts, self.first_wait, self.workers = timeout, attempts, first_wait, workers
        self.total_timeout = total_timeout
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, messages: Messages) -> str:
        """Return the reply's text.

        Raises:
            ReplyError: this prompt got no reply.
            JudgeError: no prompt can get one: a wrong address, model or key.
        """
        body = json.dumps({**self.identity, "messages": messages}).encode()
        trouble, end = "", time.monotonic() + self.total_timeout
        for attempt in range(self.attempts):
            try:
                seconds = max(0.0, min(self.timeout, end - time.monotonic()))
                return self._hide_key(_reply_text(_within(seconds, lambda: self._send(body))))
            except urllib.error.HTTPError as error:
                trouble, wait = self._check_status(error), error.headers.get("Retry-After")
            except (OSError, http.client.HTTPException, ValueError) as error:
                trouble, wait = self._hide_key(f"{type(error).__name__}: {error}"), None
            pause = self._wait(attempt, wait)
            if attempt + 1 == self.attempts or time.monotonic() + pause >= end:
                break
            logger.info("judge: %s; attempt %d of %d failed", trouble, attempt + 1, self.attempts)
            time.sleep(pause)
        raise ReplyError(f"{self.address}: no reply in {attempt + 1} attempts; the last one: {trouble}")

    def _key(self) -> str:
        return os.environ.get(self.api_key_variable, "").strip()

    def _hide_key(self, text: str) -> str:
        """Return the text, unless it contains the key or a piece of it: servers echo what they were sent."""
        key = self._key()
        if len(key) < _SHORTEST_KEY:
            return text
        pieces = [key[start : start + _KEY_PIECE] for start in range(max(1, len(key) - _KEY_PIECE + 1))]
        return "(a text that repeats the key is not shown)" if any(piece in text for piece in pieces) else text

    def _send(self, body: bytes) -> Any:
        """Return the server's answer, parsed from JSON."""
        headers = {"Content-Type": "application/json"}
        if key := self._key():
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.address, data=body, headers=headers, method="POST")
        with self._opener.open(request, timeout=self.timeout) as response:
            content = response.read(_LONGEST_ANSWER + 1)
        if len(content) > _LONGEST_ANSWER:
            raise ValueError(f"an answer of more than {_LONGEST_ANSWER} bytes")
        return json.loads(content)

    def _check_status(self, error: urllib.error.HTTPError) -> str:
        """Return what an HTTP error says, if a retry may help; raise JudgeError or ReplyError if not."""
        with error:
            said = f"HTTP {error.code} {self._hide_key(error.read(500).decode(errors='replace').strip())}"
        if 300 <= error.code < 400:
            host = urllib.parse.urlsplit(error.headers.get("Location") or "").netloc or "another path"
            raise JudgeError(
                f"{self.address}: HTTP {error.code}, a redirect to {self._hide_key(host)}, which is not followed: it would "
                "send the key there. Give the final address as the endpoint."
            ) from None
        if error.code in _RETRIED:
            return said
        if error.code in _PROMPT_REFUSED:
            raise ReplyError(f"{self.address}: {said}") from None
        raise JudgeError(
            f"{self.address}: {said}. Check the address, the model's name ({self.identity['model']!r}) and the key in "
            f"${self.api_key_variable}."
        ) from None

    def _wait(self, attempt: int, requested: str | None) -> float:
        """Return the seconds until the next attempt: what the server requests, else a doubling time with jitter."""
        if requested is not None and requested.strip().isdigit():
            return min(float(requested), _LONGEST_WAIT)
        return min(self.first_wait * 2**attempt, _LONGEST_WAIT) * random.uniform(0.75, 1.25)


def _chat_address(endpoint: str, api_key_variable: str) -> str:
    """Return the address of the chat completions below a base address."""
    address = urllib.parse.urlsplit(endpoint)
    if address.scheme not in ("http", "https") or not address.netloc:
        raise ValueError(f"endpoint is {endpoint!r}; expected an address like http://localhost:8000/v1.")
    if address.username is not None or address.password is not None:
        raise ValueError(
            f"endpoint: leave name and password out of the address; the key is read from ${api_key_variable}."
        )
    base = endpoint.rstrip("/") if address.path.strip("/") else endpoint.rstrip("/") + "/v1"
    return base if base.endswith("/chat/completions") else f"{base}/chat/completions"


def _reply_text(answer: Any) -> str:
    """Return the text of the first choice in a server's answer."""
    try:
        return str(answer["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"an answer without choices[0].message.content: {str(answer)[:200]}") from error
