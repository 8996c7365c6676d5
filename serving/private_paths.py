"""Messages without the paths of this machine."""

import re
import tempfile
from pathlib import Path

from samf.serving.uploads import ScanFile

_TAIL = r"[^\s:;,'\")]*"


def without_paths(message: str, scan: ScanFile) -> str:
    """Return a message in which the scan has the name that its client may see, and temporary files have none.

    Args:
        message: of a reader.
        scan: that was read.
    """
    message = message.replace(str(scan.path), scan.label)
    for folder in {tempfile.gettempdir(), str(Path(tempfile.gettempdir()).resolve()), str(scan.path.parent)}:
        message = re.sub(re.escape(folder) + "/" + _TAIL, "the volume", message)
    return message
