"""The routes of the OpenAI-compatible API."""

import contextlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from samf.model.report_samf import DISCLAIMER, REPORT_QUESTION
from samf.serving.bodies import read_body
from samf.serving.chat_request import Asked, ChatRequest, parse_request, read_messages
from samf.serving.completions import Completion
from samf.serving.engine import Engine
from samf.serving.errors import ApiError, internal_error
from samf.serving.jobs import Event, Failed, Job, Sampling, Started
from samf.serving.settings import ApiSettings
from samf.serving.streams import EventStream, JobEvents, whole_response
from samf.serving.uploads import Budget, ScanFile, Spool, decode_upload, scan_below

logger = logging.getLogger(__name__)

Handler: TypeAlias = Callable[[Request], Awaitable[Response]]
_BODIES_AT_ONCE = 4  # of the largest size


def create_app(engine: Engine, settings: ApiSettings) -> FastAPI:
    """Return the application; it closes the engine when it ends.

    Args:
        engine: that answers.
        settings: what is offered, and the limits.
    """
    service = _Service(engine, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(service.close)

    app = FastAPI(title="SAMF", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_api_route("/health", _guarded(service.health), methods=["GET"], response_model=None)
    app.add_api_route("/v1/models", _guarded(service.models), methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", _guarded(service.model), methods=["GET"], response_model=None)
    app.add_api_route("/v1/chat/completions", _guarded(service.complete), methods=["POST"], response_model=None)
    return app


def _error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers())


async def _http_error(request: Request, error: Exception) -> Response:
    """Return the router's errors, such as an unknown address, in OpenAI's form."""
    status = getattr(error, "status_code", 500)
    words = {404: "There is no such address here.", 405: "This address doesn't take this method."}
    return _error_response(ApiError(status, words.get(status, "The request was refused.")))


def _guarded(handler: Handler) -> Handler:
    """Return a handler whose errors become responses; none reaches the server's log with its text."""

    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except ApiError as error:
            return _error_response(error)
        except Exception as error:  # noqa: BLE001 - its text may hold what the client sent
            logger.error("a request failed: %s", type(error).__name__)
            return _error_response(internal_error())

    return guarded


class _Service:
    """What the routes share."""

    def __init__(self, engine: Engine, settings: ApiSettings) -> None:
        self._engine = engine
        self._settings = settings
        self._spool = Spool()
        self._budget = Budget(_BODIES_AT_ONCE * settings.max_body)
        self._started = int(time.time())

    def close(self) -> None:
        """End the engine and remove the uploads."""
        self._engine.close()
        self._spool.close()

    async def health(self, request: Request) -> Response:
        """Return whether requests are taken, and how many wait."""
        engine = self._engine
        try:
            engine.check_room()
        except ApiError as error:
            if error.status != 429:
                raise
        state = {"status": "ok", "model": self._settings.model_id, "waiting": engine.waiting, "running": engine.running}
        return JSONResponse({**state, "answered": engine.answered, "batches": engine.batches})

    async def models(self, request: Request) -> Response:
        """Return the list of the only model."""
        self._check_key(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Return the model, if it has this name."""
        self._check_key(request)
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    async def complete(self, request: Request) -> Response:
        """Answer a conversation about one volume."""
        self._check_key(request)
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(400, "The body's type must be application/json.", "bad_json")
        self._engine.check_room()
        with contextlib.ExitStack() as stored:
            async with read_body(request, self._settings, self._budget) as body:
                wanted, asked, scan = await anyio.to_thread.run_sync(self._understand, body, stored)
            events = JobEvents(request)
            job = self._job(wanted, asked, scan, events)
            try:
                self._engine.submit(job)
                first = await events.next()  # after it, the file isn't needed any more
            except BaseException:
                job.cancelled = True
                events.close()
                raise
        return await self._respond(job, events, first, wanted, asked)

    def _understand(self, body: bytearray, stored: contextlib.ExitStack) -> tuple[ChatRequest, Asked, ScanFile]:
        """Return a request, what it asks, and the scan, whose file is there until `stored` closes."""
        wanted = parse_request(body)
        body.clear()  # `wanted` has a copy
        self._check_model(wanted.model)
        asked = read_messages(wanted.messages, self._settings)
        if asked.data is None:
            return wanted, asked, scan_below(self._settings.scan_folder, asked.path or "")
        content = decode_upload(asked.data, self._settings.max_upload)
        return wanted, asked, stored.enter_context(self._spool.stored(content))

    @staticmethod
    def _job(wanted: ChatRequest, asked: Asked, scan: ScanFile, events: JobEvents) -> Job:
        own = wanted.samf
        return Job(
            question=asked.question or REPORT_QUESTION,
            scan=scan,
            notify=events.notify,
            sampling=Sampling(wanted.temperature or 0.0, wanted.top_p or 1.0) if wanted.temperature else Sampling(),
            max_tokens=wanted.max_completion_tokens or wanted.max_tokens,
            stream=wanted.stream,
            report=own.report or own.evidence is not None,
            evidence=own.evidence,
            any_region=own.any_region,
        )

    async def _respond(
        self, job: Job, events: JobEvents, first: Event | None, wanted: ChatRequest, asked: Asked
    ) -> Response:
        """Return the response of a job whose first event has come: after it the scan is known to be readable."""
        completion = Completion(self._settings.model_id, asked.notes)
        streamed = wanted.stream and isinstance(first, Started)
        try:
            if isinstance(first, Failed):
                raise first.error
            if streamed:
                usage = wanted.stream_options is not None and wanted.stream_options.include_usage
                return EventStream(job, events, completion, usage)
            return await whole_response(events, completion, first)
        finally:
            if not streamed:
                job.cancelled = True
                events.close()

    def _check_key(self, request: Request) -> None:
        """Raise ApiError, 401, unless a key is given or none is needed."""
        if not self._settings.keys:
            return
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        found = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in self._settings.keys]
        if kind.lower() != "bearer" or not any(found):
            raise ApiError(401, "No API key, or a wrong one; send it as Authorization: Bearer KEY.", "invalid_api_key")

    def _check_model(self, name: str | None) -> None:
        """Raise ApiError, 404, for another model."""
        if name not in (None, self._settings.model_id):
            raise ApiError(404, f"There is one model here, {self._settings.model_id}.", "model_not_found", "model")

    def _model(self) -> dict[str, Any]:
        own = {"disclaimer": DISCLAIMER, "caution": self._engine.caution}
        model = {"id": self._settings.model_id, "object": "model", "created": self._started, "owned_by": "samf"}
        return {**model, "samf": own}
