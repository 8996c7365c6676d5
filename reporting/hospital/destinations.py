"""Where reports are sent: C-STORE to a DICOM node, or STOW-RS."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from samf.reporting.hospital.address import PeerAddress
from samf.reporting.hospital.extra import require

AUTHORIZATION = "SAMF_STOW_AUTHORIZATION"  # environment variable: value of the header, such as "Bearer …"
_TIMEOUT = 60.0  # seconds for an answer
_PARTLY = 202  # HTTP: not all was stored, or with a warning; the body says which


class UnreachableError(Exception):
    """The far end can't be reached at all; the message says why, without patient data."""


class RefusedError(Exception):
    """The far end is there and does not take this file; the message says why, without patient data."""


# Sends one file. Raises RefusedError for this file, UnreachableError for all.
Send = Callable[[Path], None]


class Destination(Protocol):
    """A far end. `name` is what the journal calls it."""

    name: str

    def connected(self, files: Sequence[Path]) -> "_Connection":
        """Give what sends files of these kinds.

        Raises:
            UnreachableError: nothing answers there.
        """
        ...


class _Connection(Protocol):
    def __enter__(self) -> Send: ...
    def __exit__(self, *error: Any) -> bool | None: ...


class DicomDestination:
    """A DICOM node that takes files by C-STORE.

    Args:
        peer: the node.
        title: own AE title.
    """

    def __init__(self, peer: PeerAddress, title: str):
        require("pynetdicom", "Sending by DICOM")
        self.name, self._peer, self._title = str(peer), peer, title

    @contextmanager
    def connected(self, files: Sequence[Path]) -> Iterator[Send]:
        """Open an association for files, and release it in the end."""
        from pydicom.filereader import read_file_meta_info
        from pynetdicom import AE

        entity = AE(self._title)
        entity.dimse_timeout = entity.network_timeout = _TIMEOUT
        metas = [read_file_meta_info(file) for file in files]
        for kind, syntax in sorted({(meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID) for meta in metas}):
            entity.add_requested_context(kind, syntax)
        association = entity.associate(self._peer.host, self._peer.port, ae_title=self._peer.title)
        if not association.is_established:
            raise UnreachableError("association rejected" if association.is_rejected else "no answer")
        try:
            yield lambda file: _store(association, file)
        finally:
            if association.is_established:
                association.release()


def _store(association: Any, file: Path) -> None:
    """Send one file by C-STORE."""
    if not association.is_established:
        raise UnreachableError("the association ended")
    try:
        status = association.send_c_store(file)
    except ValueError as error:  # no accepted context for its class
        raise RefusedError("the far end takes no objects of this class") from error
    except RuntimeError as error:
        raise UnreachableError("the association ended") from error
    code = status.get("Status")
    if code is None:
        raise UnreachableError("no answer to C-STORE")
    if code != 0 and code & 0xF000 != 0xB000:  # 0xB…: stored, with a warning
        raise RefusedError(f"status 0x{code:04X}")


class StowDestination:
    """A DICOMweb server that takes files by STOW-RS. A header for authorisation comes from the environment.

    Args:
        url: of the service, above `/studies`.

    Raises:
        ValueError: no such address.
    """

    def __init__(self, url: str):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url}: expected the address of a DICOMweb service, such as https://host/dicom-web.")
        if parts.username or parts.password:
            raise ValueError(f"The address of {parts.hostname} holds a password; set ${AUTHORIZATION} instead.")
        api = require("dicomweb_client.api", "STOW-RS")
        given = os.environ.get(AUTHORIZATION)
        headers = {"Authorization": given} if given else None
        self._client = api.DICOMwebClient(
            url=url.rstrip("/"), headers=headers, timeout=_TIMEOUT, callback=self._note_answer
        )
        self._code = 0
        self._client.set_http_retry_params(retry=False)  # the journal knows better when to try again
        self.name = f"stow:{url.rstrip('/')}"

    @contextmanager
    def connected(self, files: Sequence[Path]) -> Iterator[Send]:
        """Yield what posts one file."""
        yield self._post

    def _post(self, file: Path) -> None:
        import pydicom
        import requests

        try:
            answer = self._client.store_instances([pydicom.dcmread(file)])
        except requests.HTTPError as error:
            code = error.response.status_code if error.response is not None else 0
            if code in (408, 425, 429) or code >= 500 or code in (401, 403, 404):  # not about this file
                raise UnreachableError(f"HTTP {code}") from error
            raise RefusedError(f"HTTP {code}") from error
        except requests.RequestException as error:
            raise UnreachableError(type(error).__name__) from error
        except (KeyError, ValueError) as error:  # of an HTTP success; nothing says what became of the file
            raise RefusedError("its answer can't be read") from error
        if answer.get("FailedSOPSequence"):
            reason = answer.FailedSOPSequence[0].get("FailureReason", 0)
            raise RefusedError(f"status 0x{reason:04X}")
        if self._code == _PARTLY and not answer.get("ReferencedSOPSequence"):
            raise RefusedError(f"HTTP {_PARTLY}, and its answer doesn't say that the file was stored")

    def _note_answer(self, response: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep an answer's code, and bring its media type to the form that dicomweb-client reads.

        dicomweb-client 0.61 drops the body of "application/dicom+json; charset=utf-8", and with it what it says of files
        that were not stored.
        """
        self._code = response.status_code
        if kind := response.headers.get("Content-Type"):
            response.headers["Content-Type"] = kind.partition(";")[0].strip().lower()
        return response
