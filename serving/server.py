"""`samf api`: the API on a port, until it is told to stop."""

import asyncio
import logging
import signal
import socket
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from samf.serving.app import create_app
from samf.serving.engine import Engine
from samf.serving.settings import ApiSettings

if TYPE_CHECKING:
    from samf.model.pipeline_samf import SamfReportPipeline

GRACE_SECONDS = 30
# Longer than clients keep an idle connection (httpx, and so OpenAI's client: 5 s, which is uvicorn's own default): the one
# that closes it should be the client, or a request may meet a connection that is just being closed.
_KEEP_ALIVE_SECONDS = 75


def serve(reporter: "SamfReportPipeline", settings: ApiSettings, listening: socket.socket) -> None:
    """Serve the API until SIGTERM or SIGINT; requests that run then have `GRACE_SECONDS` to end.

    Args:
        reporter: the pipeline.
        settings: what is offered, and the limits.
        listening: from `open_port`.
    """
    app = create_app(Engine(reporter, settings), settings)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
    _log_no_tracebacks()
    _end_quietly()
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    sys.stderr.write(f"Serving {settings.model_id} on http://{shown}:{port}/v1 (Ctrl+C ends it).\n")
    with listening:
        asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))


def _log_no_tracebacks() -> None:
    """Keep what clients sent out of the log: an exception's text may quote it."""

    def without_traceback(record: logging.LogRecord) -> bool:
        if record.exc_info:
            record.msg, record.args = f"{type(record.exc_info[1]).__name__} in a request", ()
            record.exc_info = record.exc_text = None
        return True

    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addFilter(without_traceback)


def _end_quietly() -> None:
    """Let SIGTERM and SIGINT end the process with exit code 0: uvicorn raises them again after it has shut down."""

    def ignore(number: int, frame: FrameType | None) -> Any:
        return None

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ignore)
