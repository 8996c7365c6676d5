"""Benchmark of reading slices from kinds of volume files, against SimpleITK and against decompression alone."""

import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from samf.benchmarks.measuring import Measurement, ratios, resident
from samf.benchmarks.volume_lines import scan_file
from samf.benchmarks.workloads import Settings
from samf.model.ct_volume import read_ct
from samf.model.image_processing_samf import SamfImageProcessor
from samf.training.memory import peak_resident

try:
    from isal import isal_zlib
except ImportError:
    isal_zlib = zlib

_ROUNDS = 5
_PIECE = 1 << 20
_INTERCEPT, _SLOPE = -1024.0, 0.5
_DEGREES = 15.0
_MOST_OF_UNPACKING, _MOST_MEMORY = 1.5, 1.2
_HEADER_ENDS = {".nrrd": b"\n\n", ".mha": b"LOCAL\n", ".gz": b""}


# --- Files ------------------------------------------------------------------------------------------------------------


def kind_file(settings: Settings, kind: str) -> Path:
    """Return the scan as a file of one kind; write it if it doesn't exist.

    Args:
        settings: of the stage.
        kind: a key of `WRITERS`.
    """
    suffix, write = WRITERS[kind]
    path = settings.folder / f"{kind}{suffix}"
    if not path.exists():
        image = nib.load(scan_file(settings))
        unfinished = path.with_name(f"unfinished{suffix}")
        write(np.asarray(image.dataobj), image.affine, unfinished)
        unfinished.rename(path)
    return path


def _write_nifti(
    hu: np.ndarray, affine: np.ndarray, path: Path, dtype: type = np.int16, slope: float = 1, intercept: float = 0
) -> None:
    stored = hu if (slope, intercept) == (1, 0) else np.rint((hu - np.float32(intercept)) / np.float32(slope))
    image = nib.Nifti1Image(np.clip(stored, 0, None).astype(dtype) if intercept else stored.astype(dtype), affine)
    image.header.set_slope_inter(slope, intercept)
    nib.save(image, path)


def _write_oblique(hu: np.ndarray, affine: np.ndarray, path: Path) -> None:
    cosine, sine = np.cos(np.radians(_DEGREES)), np.sin(np.radians(_DEGREES))
    turned = np.array([[cosine, -sine, 0, 0], [sine, cosine, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]) @ affine
    _write_nifti(hu, turned, path)


def _write_itk(hu: np.ndarray, affine: np.ndarray, path: Path) -> None:
    image = sitk.GetImageFromArray(hu.T)
    image.SetSpacing(np.abs(np.diag(affine)[:3]).tolist())
    sitk.WriteImage(image, str(path), useCompression=True)


# Kind → suffix, and what writes HU (X, Y, Z) with their affine (4, 4) to a path.
WRITERS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray, Path], None]]] = {
    "slope": (".nii.gz", partial(_write_nifti, slope=_SLOPE, intercept=_INTERCEPT)),
    "unsigned": (".nii.gz", partial(_write_nifti, dtype=np.uint16, intercept=_INTERCEPT)),
    "float": (".nii.gz", partial(_write_nifti, dtype=np.float32)),
    "MetaImage": (".mha", _write_itk),
    "NRRD": (".nrrd", _write_itk),
    "oblique": (".nii.gz", _write_oblique),
}


def unpack_any(path: Path) -> None:
    """Decompress the voxels of a `.nii.gz`, `.nrrd` or `.mha` piece by piece and drop them."""
    end = _HEADER_ENDS[path.suffix]
    inflater = isal_zlib.decompressobj(47)  # gzip's or zlib's header
    with open(path, "rb") as stream:
        stream.seek(stream.read(1 << 16).index(end) + len(end))
        while piece := stream.read(_PIECE):
            inflater.decompress(piece)


# --- Stages -----------------------------------------------------------------------------------------------------------


def time_kind(settings: Settings, kind: str) -> list[Measurement]:
    """Time the path from a file of one kind to its slices against SimpleITK and decompression.

    Args:
        settings: of the stage.
        kind: a key of `WRITERS`.
    """
    path, processor = kind_file(settings, kind), SamfImageProcessor()
    tasks = {
        "ours": lambda: processor.extract(read_ct(path)),
        "SimpleITK": lambda: sitk.GetArrayFromImage(sitk.ReadImage(str(path))),
        "unpacking": lambda: unpack_any(path),
    }
    times = settings.stopwatch.in_turns(tasks, kind, _ROUNDS)
    limit = None if kind == "oblique" else settings.limit(_MOST_OF_UNPACKING)  # resampled onto the patient's axes
    return [
        Measurement(f"{kind}: file to slices", "s", times["ours"]),
        Measurement(f"{kind}: unpacking only", "s", times["unpacking"]),
        Measurement(f"{kind}: SimpleITK's read", "s", times["SimpleITK"], note="without slices"),
        Measurement(f"{kind}: ours / unpacking", "x", ratios(times["ours"], times["unpacking"]), at_most=limit),
        Measurement(f"{kind}: SimpleITK / ours", "x", ratios(times["SimpleITK"], times["ours"])),
    ]


def measure_kind_memory(settings: Settings, kind: str) -> list[Measurement]:
    """Measure the memory that the same path adds to a process that has read a small volume.

    Args:
        settings: of the stage.
        kind: a key of `WRITERS`.
    """
    path, processor = kind_file(settings, kind), SamfImageProcessor()
    small = settings.folder / "small.nii.gz"
    nib.save(nib.Nifti1Image(np.full((30, 30, 30), -1000, dtype=np.int16), np.diag([-8.0, -8.0, 8.0, 1.0])), small)
    processor.extract(read_ct(small))
    before = resident()
    processor.extract(read_ct(path))
    scan = np.prod(nib.load(scan_file(settings)).shape) * np.dtype(np.int16).itemsize
    limit = None if kind == "oblique" else settings.limit(_MOST_MEMORY)
    return [Measurement(f"{kind}: memory added / scan", "x", [(peak_resident() - before) / scan], at_most=limit)]


STAGES: dict[str, Callable[[Settings], list[Measurement]]] = {
    **{kind: partial(time_kind, kind=kind) for kind in WRITERS},
    **{f"{kind} memory": partial(measure_kind_memory, kind=kind) for kind in WRITERS},
}
