"""The C-STORE listener: images to the disk before they are acknowledged, echo, storage commitment."""

import contextlib
import logging
import shutil
import sqlite3
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from samf.reporting.hospital.address import PeerAddress
from samf.reporting.hospital.commitment import answer_commitment
from samf.reporting.hospital.dicom_headers import read_header
from samf.reporting.hospital.extra import require
from samf.reporting.hospital.image_store import ImageStore, is_uid
from samf.reporting.hospital.journal import Journal

logger = logging.getLogger(__name__)

STORED, FULL, UNFIT, UNREADABLE = 0x0000, 0xA700, 0xA900, 0xC000
_MAX_ASSOCIATIONS = 50


@dataclass(frozen=True)
class Listening:
    """How to listen.

    Attributes:
        host, port: of the socket.
        title: own AE title.
        min_free: bytes that stay free on the disk; images that would take them are refused.
        allowed: AE titles that may call; none = all.
        commit_to: where storage commitments of an AE title are reported to; the association of the request by default.
    """

    host: str
    port: int
    title: str
    min_free: int
    allowed: tuple[str, ...] = ()
    commit_to: Mapping[str, PeerAddress] = field(default_factory=dict)


class Receiver:
    """A storage SCP that keeps images in a store.

    Args:
        store: where the images go.
        journal: where refused images are counted.
        listening: how to listen.
        came: called with the key of a series for each image of it.
    """

    def __init__(self, store: ImageStore, journal: Journal, listening: Listening, came: Callable[[str], None]):
        self._store, self._journal, self._listening, self._came = store, journal, listening, came
        self._full = threading.Event()
        self._server: Any = None

    @property
    def port(self) -> int:
        """Return the port, also where 0 let the system choose one."""
        port: int = self._server.server_address[1]
        return port

    def start(self) -> None:
        """Open the port.

        Raises:
            OSError: it can't be opened.
            MissingLibraryError: pynetdicom isn't installed.
        """
        pynetdicom = require("pynetdicom", "Listening for DICOM")
        from pynetdicom import ALL_TRANSFER_SYNTAXES, AllStoragePresentationContexts, evt
        from pynetdicom.sop_class import StorageCommitmentPushModel, Verification  # type: ignore[attr-defined]

        entity = pynetdicom.AE(self._listening.title)
        entity.maximum_associations = _MAX_ASSOCIATIONS
        entity.require_calling_aet = list(self._listening.allowed)
        entity.add_supported_context(Verification)
        entity.add_supported_context(StorageCommitmentPushModel)
        for context in AllStoragePresentationContexts:
            entity.add_supported_context(context.abstract_syntax, ALL_TRANSFER_SYNTAXES)
        handlers = [(evt.EVT_C_STORE, self._on_store), (evt.EVT_N_ACTION, self._on_action)]
        address = (self._listening.host, self._listening.port)
        self._server = entity.start_server(address, block=False, evt_handlers=handlers)

    def stop(self) -> None:
        """Close the port; senders whose images were not acknowledged see their association aborted."""
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            for association in server.active_associations:
                association.abort()

    def _on_store(self, event: Any) -> int:
        """Store one image and return the status of the answer."""
        sender = _title_of(event)
        try:
            content: bytes = event.encoded_dataset()
            if not self._has_room(len(content)):
                return FULL
            name = str(event.request.AffectedSOPInstanceUID or "")
            header = read_header(content)
            if header is None:
                return self._refuse(sender, "an image whose header can't be read", UNREADABLE)
            if problem := _problem(header, name):
                return self._refuse(sender, problem, UNFIT)
            key, changed = self._store.put(str(header.SeriesInstanceUID), name, content)
        except (OSError, sqlite3.Error) as error:
            logger.error("an image from %s could not be stored (%s)", sender, type(error).__name__)
            return FULL
        except Exception as error:  # noqa: BLE001 - any bytes may come; no exception may quote them
            logger.warning("an image from %s can't be read (%s)", sender, type(error).__name__)
            return UNREADABLE
        if changed:
            self._came(key)
        return STORED

    def _refuse(self, sender: str, reason: str, status: int) -> int:
        self._journal.refuse(sender, reason)
        logger.warning("refused from %s: %s", sender, reason)
        return status

    def _has_room(self, size: int) -> bool:
        """Return whether an image may take its bytes of the disk, and log when that changes."""
        enough = shutil.disk_usage(self._store.series).free - size >= self._listening.min_free
        if enough and self._full.is_set():
            self._full.clear()
            logger.warning("the disk has room again; images are taken")
        elif not enough and not self._full.is_set():
            self._full.set()
            logger.error("the disk is nearly full; images are refused until there is room (see --min-free)")
        return enough

    def _on_action(self, event: Any) -> tuple[int, None]:
        """Take a request for storage commitment; the result follows in an N-EVENT-REPORT."""
        try:
            request = event.action_information
        except Exception:  # noqa: BLE001 - pydicom lets through what Python raises on damaged bytes
            return 0x0110, None  # processing failure
        if event.action_type != 1 or not request.get("TransactionUID") or not request.get("ReferencedSOPSequence"):
            return 0x0115, None  # invalid argument value
        peer = self._listening.commit_to.get(_title_of(event))
        threading.Thread(
            target=self._answer, args=(event.assoc, request, peer), name="storage commitment", daemon=True
        ).start()
        return STORED, None

    def _answer(self, association: Any, request: Any, peer: PeerAddress | None) -> None:
        with contextlib.suppress(RuntimeError):  # the sender has released the association: it asks again
            if not answer_commitment(self._store, request, association, peer, self._listening.title):
                logger.warning("the result of a storage commitment could not be delivered")


def _title_of(event: Any) -> str:
    """Return the AE title of the sender, fit for a log line."""
    return "".join(letter for letter in str(event.assoc.requestor.ae_title) if letter.isprintable()).strip()


def _problem(header: Any, name: str) -> str | None:
    """Return why an image can't be kept, without its identifiers; None if it can.

    Args:
        header: its UIDs.
        name: SOPInstanceUID of the request.
    """
    for keyword in ("StudyInstanceUID", "SeriesInstanceUID"):
        value = header.get(keyword)
        if not value:
            return f"an image without {keyword}"
        if not isinstance(value, str) or not is_uid(value):
            return f"an image whose {keyword} is no UID"
    if not is_uid(name):
        return "an image whose SOPInstanceUID is no UID"
    own = header.get("SOPInstanceUID")  # anonymised files may have it in their file meta information only
    if own and str(own) != name:
        return "an image whose SOPInstanceUID differs from that of its request"
    return None
