"""Start the page: address, log-ins, limits, and nothing left behind at the end."""

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from samf.web.logins import Logins

if TYPE_CHECKING:
    from samf.model.pipeline_samf import SamfReportPipeline
    from samf.web.workflow import EvidenceChoice

_THREADS = 64  # of all visitors; each is used for moments only


@dataclass(frozen=True)
class ServeOptions:
    """Where and for whom the page is.

    Attributes:
        host: address to bind to.
        port: 0 takes a free one.
        logins: who may log in; None = everybody who reaches the address.
        max_bytes: of a visitor's upload.
        evidence: how what a sentence rests on is found.
    """

    host: str = "127.0.0.1"
    port: int = 7860
    logins: Logins | None = None
    max_bytes: int = 1_000_000_000
    evidence: "EvidenceChoice" = "fast"


def require_gradio() -> None:
    """Raise ImportError, which says how to install it, if gradio is missing; importing it takes seconds."""
    if find_spec("gradio") is None:
        raise ImportError("The web page needs gradio: pip install 'samf[web]'")


class RunningPage:
    """A page that is being served.

    Args:
        reporter: the pipeline, which all visitors share.
        options: where and for whom.

    Raises:
        ImportError: gradio is not installed; says how to.
        OSError: the port is taken.
    """

    def __init__(self, reporter: "SamfReportPipeline", options: ServeOptions):
        from samf.web.visits import Visits

        self.visits = Visits()
        try:
            self._launch(reporter, options)
        except BaseException:
            self.visits.close()
            raise

    def _launch(self, reporter: "SamfReportPipeline", options: ServeOptions) -> None:
        # Both are read when gradio is imported.
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        os.environ["GRADIO_TEMP_DIR"] = str(self.visits.uploads)
        require_gradio()
        import gradio as gr
        from starlette.middleware import Middleware

        from samf.model.model_card import public_name
        from samf.web import page as layout
        from samf.web.guard import Guard
        from samf.web.workflow import Workflow

        workflow = Workflow(reporter, self.visits, options.max_bytes, options.evidence)
        self.workflow = workflow
        self.blocks: gr.Blocks = layout.make_page(workflow, public_name(reporter.model.config._name_or_path))
        guard = Middleware(Guard, max_bytes=options.max_bytes, folder=self.visits.root)
        auth: Callable[[str, str], bool] | None = None if options.logins is None else options.logins.allow
        self.app, self.address, _ = self.blocks.launch(
            server_name=options.host,
            server_port=options.port or _free_port(options.host),
            auth=auth,
            max_file_size=options.max_bytes,
            allowed_paths=[str(self.visits.studies)],
            max_threads=_THREADS,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=False,
            run_history=False,
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            pwa=False,
            theme=layout.page_theme(),
            head=layout.page_head(),
            app_kwargs={"middleware": [guard], "docs_url": None, "redoc_url": None, "openapi_url": None},
        )

    def wait(self) -> None:
        """Serve until the process is interrupted or terminated."""
        stop = threading.Event()

        def ask(*_: Any) -> None:
            stop.set()

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not stop.wait(1.0):
                pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def close(self) -> None:
        """Stop serving and remove all files."""
        self.blocks.close(verbose=False)
        self.visits.close()


def _free_port(host: str) -> int:
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
