"""Whether volumes can be read, from their headers or as a whole, and which are the same.

A header check trusts what it recognises as whole: the size of an uncompressed file, the length at the end of a gzip file,
the directory at the end of an .npz. Whatever it doesn't recognise is read as a whole, so that every reason given for a broken
file is the reader's own. Damage in the middle of a compressed file is found by reading only.
"""

import hashlib
import os
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from samf.cache.screening import mask_by_header
from samf.model.ct_common import VolumeRef, collected_warnings
from samf.model.ct_download import is_address
from samf.model.ct_formats import find_dicom_series
from samf.model.ct_headers import is_plausible
from samf.model.ct_signatures import GZIP_MAGIC, read_head
from samf.model.ct_source import open_source
from samf.model.ct_volume import CTReadError, read_ct

_BLOCKS, _BLOCK_BYTES = 16, 4096  # of a file, from which its digest is made
_WRAP = 1 << 32  # a gzip file's length counts modulo this
MASK = "8-bit values without a scale: a mask or an image, not a CT"
MISSING = "missing"


@dataclass(frozen=True)
class VolumeFacts:
    """What a check found.

    Attributes:
        path: of the volume.
        problem: why it can't be used; None if it can.
        is_read: it was read as a whole.
        shape: voxels along the stored axes.
        spacing: mm along the same axes.
        bytes: size of the file; of a folder, 0.
        digest: equal for equal files (headers), or for equal voxels and positions (read).
        notes: warnings of the reader.
        state: what the file is recognised by when a check is resumed.
    """

    path: str
    problem: str | None = None
    is_read: bool = False
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    bytes: int = 0
    digest: str = ""
    notes: tuple[str, ...] = ()
    state: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the facts as JSON has them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "VolumeFacts":
        """Return the facts of `to_json`."""
        return cls(**{**values, **{name: tuple(values[name]) for name in ("shape", "spacing", "notes")}})


def file_state(path: str, read: bool) -> str:
    """Return size, time and kind of check, by which a result of an earlier run is known to be valid; "" if it is missing."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    return f"{found.st_size} {found.st_mtime_ns} {'read' if read else 'header'}"


def check_volume(volume: VolumeRef, read: bool) -> VolumeFacts:
    """Return what a volume is, or why it can't be read.

    Args:
        volume: a local file or folder.
        read: read the whole file, not only its header.
    """
    state = file_state(volume.path, read)
    if not state:
        return VolumeFacts(volume.path, MISSING)
    size = os.path.getsize(volume.path) if os.path.isfile(volume.path) else 0
    if mask_by_header(volume.path):
        return VolumeFacts(volume.path, MASK, bytes=size, state=state)
    try:
        facts = None if read else _header_facts(volume.path)
        if facts is None:
            facts = _read_facts(volume)
    except (CTReadError, OSError, MemoryError) as error:
        return VolumeFacts(volume.path, _reason(error, volume.path), is_read=True, bytes=size, state=state)
    return VolumeFacts(volume.path, bytes=size, state=state, **facts)


def _reason(error: BaseException, path: str) -> str:
    """Return an error's message without the path at its beginning."""
    return " ".join(str(error).split()).removeprefix(f"{path}: ") or type(error).__name__


def _read_facts(volume: VolumeRef) -> dict[str, Any]:
    with collected_warnings("samf.model") as notes:
        found = read_ct(volume)
    digest = hashlib.sha256(np.ascontiguousarray(found.hu).data)
    digest.update(repr((found.shape, np.round(found.affine, 3).tolist())).encode())
    return {
        "is_read": True,
        "shape": found.shape,
        "spacing": tuple(round(float(mm), 4) for mm in found.spacing),
        "digest": digest.hexdigest()[:32],
        "notes": tuple(" ".join(note.split()).removeprefix(f"{volume.path}: ") for note in notes),
    }


def _header_facts(path: str) -> dict[str, Any] | None:
    """Return the facts of a file that its header shows to be whole; None where it doesn't."""
    if os.path.isdir(path):
        return _series_facts(path)
    name = path.lower()
    try:
        if name.endswith((".nii", ".nii.gz")):
            shape, spacing = _nifti_header(path)
        elif name.endswith((".npy", ".npz")):
            shape, spacing = _numpy_header(path)
        else:
            return None
    except CTReadError:
        raise
    except Exception:  # noqa: BLE001 — whatever damaged bytes cause, reading the file says it in words
        return None
    if len(shape) != 3 or min(shape) < 1 or (spacing and not is_plausible(np.array(spacing))):
        return None
    return {"shape": shape, "spacing": spacing, "digest": _file_digest(path)}


def _series_facts(path: str) -> dict[str, Any] | None:
    with open_source(path) as local:
        found = find_dicom_series(local)
    if found is None:
        return None
    first = found.stack.slices[0].pixels
    sizes = np.linalg.norm(found.stack.affine[:3, :3], axis=0)
    return {
        "shape": (int(first.columns), int(first.rows), len(found.stack.slices)),
        "spacing": tuple(round(float(mm), 4) for mm in sizes),
        "digest": found.fingerprint,
        "notes": tuple(found.notes),
    }


def _nifti_header(path: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return shape and voxel sizes of a NIfTI file. Raises ValueError where its length isn't what the header declares."""
    import nibabel

    image: Any = nibabel.load(path)
    shape = tuple(int(n) for n in image.shape)
    end = int(image.dataobj.offset) + int(np.prod(shape, dtype=np.int64)) * image.get_data_dtype().itemsize
    size = os.path.getsize(path)
    if read_head(Path(path), 2) == GZIP_MAGIC:
        with open(path, "rb") as stream:
            stream.seek(-4, os.SEEK_END)
            (length,) = struct.unpack("<I", stream.read(4))
        if length != end % _WRAP:
            raise ValueError("its end isn't that of a whole gzip file")
    elif size < end:
        raise ValueError("cut short")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape, tuple(round(float(mm), 4) for mm in image.header.get_zooms()[:3])


def _numpy_header(path: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return the shape of the one 3-D array of a NumPy file; its voxel sizes need the whole file."""
    if path.lower().endswith(".npy"):
        return np.load(path, mmap_mode="r", allow_pickle=False).shape, ()
    with zipfile.ZipFile(path) as archive:
        shapes = []
        for info in archive.infolist():
            with archive.open(info) as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(stream)
                if stream.tell() + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize != info.file_size:
                    raise ValueError("cut short")
                shapes.append(shape)
    (shape,) = [shape for shape in shapes if len(shape) >= 3]
    return shape, ()


def _file_digest(path: str) -> str:
    """Return a digest of a file's size and of blocks that are spread over it."""
    size = os.path.getsize(path)
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as stream:
        for place in np.linspace(0, max(0, size - _BLOCK_BYTES), _BLOCKS, dtype=np.int64):
            stream.seek(int(place))
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def equal_files(paths: Sequence[str]) -> list[list[str]]:
    """Return groups of files whose bytes are all equal; folders of one series, which their digests compare, stay a group."""
    if not all(os.path.isfile(path) for path in paths):
        return [list(paths)]
    groups: dict[str, list[str]] = {}
    for path in paths:
        with open(path, "rb") as stream:
            groups.setdefault(hashlib.file_digest(stream, "sha256").hexdigest(), []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def is_local(volume: VolumeRef) -> bool:
    """Return whether a volume is a file or folder on this machine; others are not checked."""
    return not is_address(volume.path)
