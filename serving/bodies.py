"""Bodies of requests, read within limits."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from samf.serving.errors import ApiError
from samf.serving.settings import ApiSettings
from samf.serving.uploads import Budget, too_large


@asynccontextmanager
async def read_body(request: Request, settings: ApiSettings, budget: Budget) -> AsyncIterator[bytearray]:
    """Yield the body of a request; its bytes are taken from the budget until the block ends.

    Args:
        request: whose body has not been read.
        settings: largest body, and the time in which it must arrive.
        budget: of all bodies together.

    Raises:
        ApiError: 413, too large; 429, no room now; 408, too slow; 400, the client stopped sending.
    """
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and len(declared) < 20 and int(declared) > settings.max_body:
        raise too_large(settings.max_upload)
    body, taken = bytearray(), 0
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > settings.max_body:
                    raise too_large(settings.max_upload)
                budget.take(len(chunk))
                taken += len(chunk)
                body += chunk
        yield body
    except TimeoutError as error:
        raise ApiError(408, "The request took too long to arrive.", "timeout") from error
    except ClientDisconnect as error:
        raise ApiError(400, "The request ended early.", "disconnected") from error
    finally:
        budget.give_back(taken)
