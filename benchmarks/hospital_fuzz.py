"""Malformed input for a DICOM port: bytes, PDUs, messages and data sets. All of it is harmless."""

import contextlib
import random
import socket
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from typing import Any

from samf.benchmarks.hospital_scene import HOST, TITLE, no_delay

_CT = "1.2.840.10008.5.1.4.1.1.2"
_IMPLICIT = "1.2.840.10008.1.2"
_UIDS = ("", "../../../tmp/x", "/etc/x", "1.2.3\x00.4", "9" * 70, "1..2", "ABC", "1.2.3 ", "..", "1.2\\1.3", "é")


def send_malformed(port: int, count: int, seed: int = 0) -> dict[str, int]:
    """Send malformed things to a port, and return how many of each kind.

    Args:
        port: on 127.0.0.1.
        count: how many in all.
        seed: of everything random.
    """
    warnings.simplefilter("ignore")  # pydicom's, of the odd values
    rng = random.Random(seed)
    kinds = [_noise, _changed_request, _false_length, _noise_within, _odd_data_set, _odd_message]
    done: Counter[str] = Counter()
    for number in range(count):
        kind: Callable[[int, random.Random], None] = kinds[number % len(kinds)]
        with contextlib.suppress(OSError):  # the listener may close at any byte
            kind(port, rng)
        done[kind.__name__.strip("_").replace("_", " ")] += 1
    return dict(done)


def _item(kind: int, content: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(content)) + content


def _request() -> bytes:
    """Return a valid A-ASSOCIATE-RQ for CT images."""
    syntaxes = _item(0x30, _CT.encode()) + _item(0x40, _IMPLICIT.encode())
    context = _item(0x20, bytes([1, 0, 0, 0]) + syntaxes)
    user = _item(0x50, _item(0x51, struct.pack(">I", 16384)) + _item(0x52, b"1.2.3"))
    body = struct.pack(">HH", 1, 0) + TITLE.ljust(16).encode() + b"FUZZ".ljust(16) + bytes(32)
    body += _item(0x10, b"1.2.840.10008.3.1.1.1") + context + user
    return struct.pack(">BBI", 1, 0, len(body)) + body


def _exchange(port: int, *parts: bytes) -> None:
    """Send bytes; between them, wait for an answer for a moment."""
    with socket.create_connection((HOST, port), timeout=5) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in parts:
            connection.sendall(part)
            connection.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                connection.recv(4096)


def _noise(port: int, rng: random.Random) -> None:
    _exchange(port, rng.randbytes(rng.choice([1, 6, 7, 74, 1000, 70_000])))


def _changed_request(port: int, rng: random.Random) -> None:
    request = bytearray(_request())
    for _ in range(rng.randint(1, 8)):
        request[rng.randrange(len(request))] = rng.randrange(256)
    _exchange(port, bytes(request))


def _false_length(port: int, rng: random.Random) -> None:
    request = bytearray(_request())
    request[2:6] = struct.pack(">I", rng.choice([0, 1, 67, len(request), 0x7FFFFFFF, 0xFFFFFFFF]))
    _exchange(port, bytes(request[: rng.randint(6, len(request))]))


def _noise_within(port: int, rng: random.Random) -> None:
    """Open an association and send what is no message."""
    kind = rng.choice([0, 1, 2, 3, 4, 4, 4, 4, 5, 6, 7, 9, 255])
    content = rng.randbytes(rng.choice([0, 4, 6, 40, 4000]))
    if kind == 4 and len(content) > 6:  # P-DATA with a plausible header and a command set that is noise
        content = struct.pack(">IBB", len(content) - 4, 1, rng.choice([0, 1, 2, 3])) + content[6:]
    _exchange(port, _request(), struct.pack(">BBI", kind, 0, len(content)) + content)


def _associated(port: int) -> Any:
    from pynetdicom import AE, evt

    entity = AE("FUZZ")
    entity.add_requested_context(_CT, _IMPLICIT)
    entity.dimse_timeout = 0.5
    return entity.associate(HOST, port, ae_title=TITLE, evt_handlers=[(evt.EVT_CONN_OPEN, no_delay)])


def _store(port: int, content: bytes, instance: str, rng: random.Random) -> None:
    """Send a C-STORE with any bytes as its data set, past the library's own checks."""
    from pynetdicom.dimse_primitives import C_STORE

    association = _associated(port)
    if not association.is_established:
        return
    message = C_STORE()
    message.MessageID, message.Priority = rng.randint(1, 65535), 2
    message.AffectedSOPClassUID = _CT
    message.DataSet = BytesIO(content)
    try:
        message.AffectedSOPInstanceUID = instance
    except (TypeError, ValueError):
        message.AffectedSOPInstanceUID = "1.2.3"
    with contextlib.suppress(AttributeError, RuntimeError, ValueError, TypeError, UnicodeError):
        association.dimse.send_msg(message, 1)
        association.dimse.get_msg(block=True)
    if rng.random() < 0.5:
        association.release()
    else:
        association.abort()


def _odd_data_set(port: int, rng: random.Random) -> None:
    """Send data sets with odd UIDs, or cut short, or changed in some bytes."""
    from pydicom.dataset import Dataset
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset

    data, instance, fit = Dataset(), rng.choice([*_UIDS, "1.2.3.4.5", "1.2.3.4.5"]), rng.random() < 0.5
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        value = instance if fit and keyword == "SOPInstanceUID" else rng.choice(["1.2.3.4"] if fit else [*_UIDS, None])
        if value is not None:
            data.add_new(keyword, "LO", value)  # no check of what a UID may be
    data.Modality, data.PixelData = "CT", rng.randbytes(200)
    data["PixelData"].VR = "OW"
    stream = DicomBytesIO()
    stream.is_implicit_VR, stream.is_little_endian = True, True
    write_dataset(stream, data)
    content = bytearray(stream.getvalue())
    if rng.random() < 0.5:
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.3:
        del content[rng.randrange(len(content)) :]
    _store(port, bytes(content), instance, rng)


def _odd_message(port: int, rng: random.Random) -> None:
    """Send noise as a data set."""
    _store(port, rng.randbytes(rng.choice([0, 1, 8, 100, 50_000])), f"1.2.{rng.randint(1, 99)}", rng)
