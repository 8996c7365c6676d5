"""The format of a file, from its first bytes and never from its suffix."""

import re
import struct
from pathlib import Path
from typing import Literal

from .ct_common import CTReadError

FileFormat = Literal["NIfTI", "compressed NIfTI", "NRRD", "MetaImage", "NumPy", "npz", "DICOM", "DICOMDIR", "zip"]

GZIP_MAGIC = b"\x1f\x8b"
DICOMDIR_CLASS = re.compile(rb"(?<![\d.])1\.2\.840\.10008\.1\.3\.10(?![\d.])")  # directory of a disc
_HEAD_BYTES = 512
_SIGNATURES = {
    b"%PDF": "a PDF document",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89HDF": "an HDF5 file",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"version https://git-lfs": "a Git LFS pointer in place of the file (git lfs pull fetches it)",
    b"NRRD": "an NRRD file",
    GZIP_MAGIC: "a gzip file",
}


def file_format(path: Path) -> FileFormat:
    """Return the format of a file.

    Raises:
        CTReadError: of no known format; says what the file looks like.
    """
    head = read_head(path)
    if head[:2] == GZIP_MAGIC:
        return "compressed NIfTI"  # the reader checks what is inside
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return "npz" if path.suffix.lower() == ".npz" or _first_member(head).endswith(b".npy") else "zip"
    if head.startswith(b"\x93NUMPY"):
        return "NumPy"
    if nifti_header_size(head) is not None:
        return "NIfTI"
    if looks_like_dicom(head):
        return "DICOMDIR" if DICOMDIR_CLASS.search(read_head(path, 1024)) else "DICOM"
    if head.startswith(b"NRRD"):
        return "NRRD"
    if b"NDims" in head:
        return "MetaImage"
    raise CTReadError(
        f"{path}: found {describe_bytes(head)}; expected NIfTI, NRRD, MetaImage, NumPy, DICOM or a zip. "
        f"Unpack an archive, convert a scan (e.g. with dcm2niix), or download the file again if it was one of these."
    )


def is_zip(path: Path) -> bool:
    """Return whether a file is a zip archive other than an `.npz`."""
    return read_head(path).startswith(b"PK") and file_format(path) == "zip"


def other_half(path: Path) -> Path | None:
    """Return the `.img` next to a `.hdr`, or the `.hdr` next to an `.img`, either perhaps with `.gz`; None without one."""
    match = re.fullmatch(r"(.+)\.(hdr|img)(\.gz)?", path.name, re.IGNORECASE)
    if match is None:
        return None
    suffix = "img" if match[2].lower() == "hdr" else "hdr"
    suffix = suffix.upper() if match[2].isupper() else suffix
    names = [f"{match[1]}.{suffix}{gz}" for gz in dict.fromkeys((match[3] or "", "", ".gz"))]
    return next((file for name in names if (file := path.with_name(name)).is_file()), None)


def paired_header(path: Path) -> Path | None:
    """Return the `.hdr` of an `.img`, whose own bytes say nothing about its format; None of any other file."""
    header = other_half(path)
    if header is None or ".hdr" not in header.name.lower():
        return None
    head = read_head(header)
    return header if head.startswith(GZIP_MAGIC) or nifti_header_size(head) is not None else None


def read_head(path: Path, size: int = _HEAD_BYTES) -> bytes:
    """Return the first bytes of a file."""
    with open(path, "rb") as stream:
        return stream.read(size)


def nifti_header_size(head: bytes) -> int | None:
    """Return 348 (NIfTI-1) or 540 (NIfTI-2) when the first number, in either byte order, is one of them; else None."""
    if len(head) < 4:
        return None
    return next((n for order in "<>" for n in struct.unpack(f"{order}i", head[:4]) if n in (348, 540)), None)


def looks_like_dicom(head: bytes) -> bool:
    """Return whether a file with these first bytes (132 or more) is DICOM, with or without a preamble."""
    if head[128:132] == b"DICM":
        return True
    if len(head) < 132:
        return False
    group, element = struct.unpack("<HH", head[:4])
    vr, length = head[4:6], struct.unpack("<I", head[4:8])[0]
    return group == 8 and element <= 0x70 and (vr in (b"UL", b"CS", b"UI", b"DA", b"TM", b"LO") or 0 < length <= 256)


def describe_bytes(head: bytes) -> str:
    """Return in words what a file with these first bytes is.

    Text is never quoted, because it may concern a patient.
    """
    if not head:
        return "an empty file"
    if head[257:262] == b"ustar":
        return "a tar archive"
    if head[128:132] == b"DICM":
        return "a DICOM file"
    for signature, name in _SIGNATURES.items():
        if head.startswith(signature):
            return name
    text = head[:64].decode("utf-8", errors="replace").rstrip("\ufffd")  # the last character may be incomplete
    if text and all(character.isprintable() or character in "\t\r\n\ufeff" for character in text):
        return "a web page" if text.lstrip().startswith("<") else "a text file"
    return f"a file that starts with the bytes {head[:4].hex(' ')}"


def _first_member(head: bytes) -> bytes:
    length = int.from_bytes(head[26:28], "little")
    return head[30 : 30 + length]
