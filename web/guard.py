"""A layer around gradio's application: what it need not answer, how much it takes, and what browsers may keep."""

import logging
import shutil
from pathlib import Path
from urllib.parse import unquote

from starlette.datastructures import MutableHeaders
from starlette.responses import FileResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)

ASSETS = Path(__file__).resolve().parent / "assets"
_SERVED = {"niivue.umd.js": "text/javascript"}
_ASSET_ROUTE, _FILE_ROUTE, _UPLOAD_ROUTE = "/samf/", "/gradio_api/file=", "/gradio_api/upload"
# Of gradio's routes, those that fetch addresses from elsewhere, or that this page does not use.
_CLOSED = ("/proxy=", "/component_server", "/vibe", "/monitoring", "/mcp", "/deep_link", "/upload_progress", "/stream/")
_OVERHEAD = 1 << 20  # bytes of a multipart body beside its files
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'"
)


class Guard:
    """ASGI middleware.

    Args:
        app: the application.
        max_bytes: of one upload.
        folder: on whose disk uploads are written.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, folder: Path):
        self.app, self.max_bytes, self.folder = app, max_bytes, folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse or pass on one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = unquote(scope["path"])
        name = path.rpartition("/")[2]
        if _ASSET_ROUTE in path and name in _SERVED:
            response = FileResponse(ASSETS / name, media_type=_SERVED[name])
            response.headers["Cache-Control"] = "public, max-age=86400"
            await response(scope, receive, send)
            return
        refusal = self._refusal(scope, path)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        await self._pass_on(scope, receive, _with_headers(send, keep=_FILE_ROUTE not in path))

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer; an error in it is one line in the log and an answer without details."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception as error:  # noqa: BLE001 - gradio's, of malformed requests; a traceback could have names in it
            logger.error("A request failed: %s", type(error).__name__)
            if not begun:
                await PlainTextResponse("This request can't be answered.", status_code=500)(scope, receive, send)

    def _refusal(self, scope: Scope, path: str) -> PlainTextResponse | None:
        """Return the answer to a request that isn't passed on; None if it is."""
        if any(closed in path for closed in _CLOSED):
            return PlainTextResponse("Not found", status_code=404)
        if _FILE_ROUTE in path and "://" in path.partition(_FILE_ROUTE)[2].replace(":/", "://", 1):
            return PlainTextResponse("Not found", status_code=404)  # the server would fetch it
        if scope["method"] != "POST" or not path.rstrip("/").endswith(_UPLOAD_ROUTE):
            return None
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit():
            return PlainTextResponse("Content-Length is missing", status_code=411)
        if int(length) > self.max_bytes + _OVERHEAD:
            return PlainTextResponse(f"at most {self.max_bytes} bytes are taken", status_code=413)
        if int(length) > shutil.disk_usage(self.folder).free // 2:
            return PlainTextResponse("no space for this file at the moment", status_code=507)
        return None


def _with_headers(send: Send, keep: bool) -> Send:
    """Return a `send` that adds headers.

    Args:
        send: of the server.
        keep: whether the browser may keep the answer on its disk.
    """

    async def add(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Content-Security-Policy"] = _POLICY
            headers["X-Content-Type-Options"] = "nosniff"
            headers["Referrer-Policy"] = "no-referrer"
            if not keep:
                headers["Cache-Control"] = "no-store"
        await send(message)

    return add
