"""Bodies of requests to the API, which several test files share."""

import base64
from pathlib import Path
from typing import Any

CHAT = "/v1/chat/completions"
QUESTION = "Is there a pleural effusion?"


def encoded(content: bytes) -> dict[str, Any]:
    """Return the content block of a file."""
    return {"type": "volume", "volume": {"data": base64.b64encode(content).decode(), "name": "JANE DOE.nii"}}


def volume_block(path: Path) -> dict[str, Any]:
    """Return the content block of a file on disk."""
    return encoded(path.read_bytes())


def asked(*blocks: Any, **fields: Any) -> dict[str, Any]:
    """Return the body of a request with one message."""
    texts = [{"type": "text", "text": block} if isinstance(block, str) else block for block in blocks]
    return {"messages": [{"role": "user", "content": texts}], **fields}
