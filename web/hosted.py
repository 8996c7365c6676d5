"""The page as a Space of the Hub: importing this module starts it. Its settings are the Space's variables.

`SAMF_MODEL` (and `SAMF_REVISION`) name the model, default: the demo model; `SAMF_DEVICE`, `SAMF_QUANTIZE`,
`SAMF_MAX_UPLOAD` and the secret `SAMF_AUTH` are as for `samf serve`.
"""

import os

from samf.cli.errors import log_errors_only
from samf.cli.reporting import load_reporter
from samf.utils.servers import parse_size
from samf.web.logins import VARIABLE, Logins
from samf.web.server import RunningPage, ServeOptions


def start() -> RunningPage:
    """Start the page with the settings of the environment."""
    log_errors_only()
    setting = os.environ.get
    login = setting(VARIABLE)
    options = ServeOptions(
        host=setting("GRADIO_SERVER_NAME", "0.0.0.0"),  # the Space's own proxy is in front of it
        port=int(setting("GRADIO_SERVER_PORT", "7860")),
        logins=None if login is None else Logins.parse(login, f"${VARIABLE}"),
        max_bytes=parse_size(setting("SAMF_MAX_UPLOAD", "500mb")),
    )
    model, device = setting("SAMF_MODEL"), setting("SAMF_DEVICE", "auto")
    return RunningPage(load_reporter(model, device, setting("SAMF_REVISION"), setting("SAMF_QUANTIZE")), options)


page = start()
page.wait()
page.close()
