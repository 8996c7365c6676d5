"""Custom handler of Hub Inference Endpoints for a SAMF model; `samf push --with-handler` puts it into the repository.

The toolkit executes this file as a lone module and calls `EndpointHandler(path)` once, and the object once per request:

    {"inputs": {"volume": "<base64 of a NIfTI, NRRD, MHA or zipped DICOM>", "question": "…"}, "parameters": {…}}

or the file's bytes as the body of a request of the type audio/x-audio, the only one that the toolkit hands on as bytes. It
sends an exception's text to the client, so none here quotes a path or a scan.
"""

import base64
import binascii
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline

# What a request may set of `generate`; anything else is refused rather than ignored.
GENERATION = ("do_sample", "max_new_tokens", "num_beams", "temperature", "top_p")
OPTIONS = ("question", "evidence", *GENERATION)
MAX_BYTES = 1 << 30


class RequestError(ValueError):
    """A request that can't be answered; its text goes to the client."""


class EndpointHandler:
    """Writes reports of volumes.

    Args:
        path: folder of the model.
    """

    def __init__(self, path: str = "") -> None:
        load: Any = pipeline
        self._reporter = load(model=path, trust_remote_code=True, device=0 if torch.cuda.is_available() else -1)

    def __call__(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the report of a request's volume, or the answer to its question, as plain values.

        Args:
            data: `inputs`, and perhaps `parameters`: question, evidence, and options of `generate`.

        Raises:
            RequestError: the request or the volume can't be read.
        """
        volume, options = _read_request(data)
        with tempfile.TemporaryDirectory(prefix="samf-") as folder:
            scan = Path(folder, "scan")  # the format is known by the content
            scan.write_bytes(volume)
            try:
                report = self._reporter(scan, **options).to_dict()
            except ValueError as error:  # CTReadError is one
                raise RequestError(_without(str(error), folder)) from None
            except Exception as error:  # noqa: BLE001 - its text may hold anything
                raise RequestError(f"The request failed ({type(error).__name__}).") from None
        made = report["provenance"]
        report["provenance"] = {**made, "source": "upload", "model": Path(made["model"]).name}
        report["warnings"] = [_without(text, folder) for text in report["warnings"]]
        return report


def _read_request(data: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of the volume, and the options of the pipeline."""
    inputs = data.get("inputs")
    options = dict(data.get("parameters") or {})
    if isinstance(inputs, Mapping):
        options |= {name: inputs[name] for name in ("question",) if inputs.get(name) is not None}
        inputs = inputs.get("volume")
    unknown = sorted(str(name)[:40] for name in options if name not in OPTIONS)
    if unknown:
        raise RequestError(f"Unknown parameters {', '.join(unknown)}; expected some of {', '.join(OPTIONS)}.")
    if not isinstance(options.get("question", ""), str):
        raise RequestError("The question isn't a text.")
    if isinstance(inputs, str):
        if len(inputs) // 4 * 3 > MAX_BYTES:
            raise RequestError(f"The volume is too large; expected at most {MAX_BYTES} bytes.")
        try:
            inputs = base64.b64decode(inputs.encode("ascii"), validate=True)
        except (binascii.Error, ValueError):
            raise RequestError("The volume isn't base64; send the whole file in it.") from None
    if not isinstance(inputs, bytes) or not inputs:
        raise RequestError('Expected {"inputs": {"volume": "<base64 of the file>"}}, or the file\'s bytes.')
    return inputs, options


def _without(text: str, folder: str) -> str:
    """Return a message that names the upload in place of its temporary file."""
    return text.replace(f"{folder}/scan", "upload").replace(folder, "upload")
