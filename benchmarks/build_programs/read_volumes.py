"""Read volumes and extract their slices, as a processor does for a model."""

import hashlib
from typing import Any

from samf.model.ct_volume import read_ct
from samf.model.image_processing_samf import SamfImageProcessor


def run(task: dict[str, Any], recorder: Any) -> dict[str, str]:
    """Read each volume after a small one of its kind, which brings the imports; return digests of the slices.

    Args:
        task: `volumes` and `small` (name → path), `memory` (whether to record it, for a single volume).
        recorder: takes the figures.
    """
    processor, digests = SamfImageProcessor(), {}
    for name, path in task["volumes"].items():
        processor.extract(read_ct(task["small"][name]))
        with recorder.measure(name, memory=task["memory"]):
            extracted = processor.extract(read_ct(path))
        digests[name] = hashlib.sha256(extracted["slices"].tobytes()).hexdigest()
    return digests
