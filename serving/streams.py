"""From the engine's events to HTTP responses, which end a job when their client is gone."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from samf.serving.completions import Completion, event
from samf.serving.jobs import Done, Event, Failed, Job, Piece

_NO_BUFFER = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_CLIENT_GONE = 499  # nginx's status; no client sees it


class JobEvents:
    """The events of a job, which come from the engine's thread, for the event loop; and whether the client is gone.

    Args:
        request: whose body has been read.
    """

    def __init__(self, request: Request) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._gone = asyncio.ensure_future(_disconnected(request))

    def notify(self, found: Event) -> None:
        """Take an event, in any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._events.put_nowait, found)

    async def next(self) -> Event | None:
        """Return the next event; None = the client is gone."""
        waiter = asyncio.ensure_future(self._events.get())
        try:
            await asyncio.wait({waiter, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            return waiter.result() if waiter.done() else None
        finally:
            waiter.cancel()

    def close(self) -> None:
        """Stop waiting for the client."""
        self._gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def whole_response(events: JobEvents, completion: Completion, first: Event | None) -> Response:
    """Return the response of a job that isn't streamed.

    Args:
        events: of the job.
        completion: its objects.
        first: the event that was taken from `events` before; None = the client is gone.

    Raises:
        ApiError: the job failed.
    """
    found = first
    while found is not None:
        if isinstance(found, Done):
            return JSONResponse(completion.whole(found.answer))
        if isinstance(found, Failed):
            raise found.error
        found = await events.next()
    return Response(status_code=_CLIENT_GONE)


class EventStream(StreamingResponse):
    """The server-sent events of a job; when the response ends, in whatever way, so does the job.

    Args:
        job: that has started.
        events: of the job.
        completion: its objects.
        include_usage: end with the token counts.
    """

    def __init__(self, job: Job, events: JobEvents, completion: Completion, include_usage: bool) -> None:
        self._job = job
        self._events = events
        content = _stream(events, completion, include_usage)
        super().__init__(content, media_type="text/event-stream", headers=_NO_BUFFER)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            with contextlib.suppress(ClientDisconnect):
                await super().__call__(scope, receive, send)
        finally:
            self._job.cancelled = True
            self._events.close()


async def _stream(events: JobEvents, completion: Completion, include_usage: bool) -> AsyncIterator[bytes]:
    yield completion.first()
    while (found := await events.next()) is not None:
        if isinstance(found, Piece):
            yield completion.piece(found.text)
        elif isinstance(found, Done):
            yield completion.last(found.answer, include_usage)
            return
        elif isinstance(found, Failed):
            yield event(found.error.body())
            return
