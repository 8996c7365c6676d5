"""Benchmark of reading slices from a DICOM series, against SimpleITK's series reader and a stack made with pydicom.

The series is the scan of `volume_lines` with the header of a real scanner's file, which comes with pydicom. imagecodecs packs
it (JPEG-LS, JPEG 2000, HTJ2K and RLE).
"""

import struct
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from tqdm import tqdm

from samf.benchmarks.measuring import Measurement, ratios, resident
from samf.benchmarks.volume_lines import scan_file
from samf.benchmarks.workloads import LineSkipped, Settings
from samf.model import ct_dicom_pixels
from samf.model.ct_dicom_decoders import LEAST_FRAMES, Decoders
from samf.model.ct_threads import thread_count
from samf.model.ct_volume import read_ct
from samf.model.image_processing_samf import SamfImageProcessor
from samf.training.memory import peak_resident

try:
    import imagecodecs
except ImportError:
    imagecodecs = None

UNCOMPRESSED = "uncompressed"
_INTERCEPT = -1024
_ROUNDS = 5
_START = 2.0  # s, more than a process takes to be ready
_LEAST_OF_PLAIN, _LEAST_OF_PACKED, _MOST_MEMORY, _MOST_ISOLATION = 2.5, 1.8, 1.3, 0.05


def _rle(image: np.ndarray) -> bytes:
    """Pack uint16 (rows, columns) as DICOM's RLE: high bytes, then low bytes, each row by itself."""
    planes = [b"".join(map(imagecodecs.packbits_encode, plane.astype(np.uint8))) for plane in (image >> 8, image & 255)]
    planes = [plane + bytes(len(plane) % 2) for plane in planes]
    return struct.pack("<16I", 2, 64, 64 + len(planes[0]), *[0] * 13) + b"".join(planes)


# Name → UID of the transfer syntax, and what packs an image; all without loss.
PACKERS: dict[str, tuple[str, Callable[[np.ndarray], bytes]]] = {
    "JPEG-LS": ("1.2.840.10008.1.2.4.80", lambda image: imagecodecs.jpegls_encode(image)),
    "JPEG 2000": (
        "1.2.840.10008.1.2.4.90",
        lambda image: imagecodecs.jpeg2k_encode(image, level=0, codecformat="j2k", reversible=True),
    ),
    "HTJ2K": ("1.2.840.10008.1.2.4.201", lambda image: imagecodecs.htj2k_encode(image, reversible=True)),
    "RLE": ("1.2.840.10008.1.2.5", _rle),
}


# --- The series -------------------------------------------------------------------------------------------------------


def series_folder(settings: Settings, syntax: str) -> Path:
    """Return the folder of the series in one transfer syntax; write it if it doesn't exist."""
    folder = settings.folder / syntax.replace(" ", "_")
    if not folder.exists():
        volume = read_ct(scan_file(settings))
        images = volume.hu[::-1, ::-1].transpose(2, 1, 0)  # RAS+ → (slices, rows, columns) of an axial series
        unfinished = folder.with_suffix(".unfinished")
        unfinished.mkdir()
        for k in tqdm(range(len(images)), desc=syntax, leave=False):
            dataset = _slice_dataset(images[k], k, volume.spacing)
            _pack(dataset, syntax)
            dataset.save_as(unfinished / f"{k:04d}.dcm", enforce_file_format=True)
        unfinished.rename(folder)
    return folder


def _slice_dataset(hu: np.ndarray, k: int, spacing: tuple[float, float, float]) -> Any:
    """Return slice k of the series, HU (rows, columns), under a real header of 256 elements."""
    dataset = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False))
    del dataset.DataSetTrailingPadding, dataset.PixelPaddingValue
    dataset.Rows, dataset.Columns = hu.shape
    dataset.PixelSpacing, dataset.SliceThickness = [round(mm, 6) for mm in spacing[1::-1]], round(spacing[2], 6)
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [0, 0, round(k * spacing[2], 6)]
    dataset.InstanceNumber, dataset.SliceLocation = k + 1, round(k * spacing[2], 6)
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k + 1}"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    dataset.RescaleSlope, dataset.RescaleIntercept = 1, _INTERCEPT
    dataset.PixelData = np.maximum(hu.astype(np.int32) - _INTERCEPT, 0).astype(np.uint16).tobytes()
    return dataset


def _pack(dataset: Any, syntax: str) -> None:
    if syntax == UNCOMPRESSED:
        return
    uid, pack = PACKERS[syntax]
    image = np.frombuffer(dataset.PixelData, dtype=np.uint16).reshape(dataset.Rows, dataset.Columns)
    dataset.file_meta.TransferSyntaxUID = uid
    dataset.PixelData = encapsulate([pack(image)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True


# --- Readers ----------------------------------------------------------------------------------------------------------


def read_bytes(folder: Path) -> None:
    """Read every file."""
    for file in folder.iterdir():
        file.read_bytes()


def simpleitk_volume(folder: Path) -> np.ndarray:
    """Return HU (slices, rows, columns) as SimpleITK's series reader gives them."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return sitk.GetArrayFromImage(reader.Execute())


def pydicom_volume(folder: Path) -> np.ndarray:
    """Return HU (slices, rows, columns) of pydicom's images, sorted by their positions."""
    slices = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda piece: piece.ImagePositionPatient[2])
    return np.stack([piece.pixel_array * piece.RescaleSlope + piece.RescaleIntercept for piece in slices])


def _start_decoders() -> None:
    """Start and end as many decoder processes as a series has, without a frame to decode."""
    with Decoders(thread_count() * LEAST_FRAMES, Path("none")) as decoders:
        decoders.decode([])


def _shares_of_starts(settings: Settings, folder: Path) -> list[float]:
    """Return by which share of its time a series is ready earlier where its decoders wait for it, of several pairs of runs."""
    processor, shares = SamfImageProcessor(), []

    def read() -> None:
        processor.extract(read_ct(folder))

    for _ in range(_ROUNDS if settings.size == "full" else 1):
        as_it_is = settings.stopwatch.seconds(read)
        with Decoders(len(list(folder.iterdir())), folder) as started:
            time.sleep(_START)
            with mock.patch.object(ct_dicom_pixels, "Decoders", lambda *_: nullcontext(started)):
                shares.append(1 - settings.stopwatch.seconds(read) / as_it_is)
    return shares


# --- Stages -----------------------------------------------------------------------------------------------------------


def time_uncompressed(settings: Settings) -> list[Measurement]:
    """Time the whole path from an uncompressed series to its slices against SimpleITK and pydicom."""
    folder = series_folder(settings, UNCOMPRESSED)
    tasks = {"pydicom": partial(pydicom_volume, folder), "bytes": partial(read_bytes, folder)}
    times = _time(settings, folder, tasks)
    return [
        *_compared(settings, UNCOMPRESSED, times, _LEAST_OF_PLAIN),
        Measurement(f"{UNCOMPRESSED}: pydicom's stack", "s", times["pydicom"], note="in HU, without slices"),
        Measurement(f"{UNCOMPRESSED}: reading the bytes", "s", times["bytes"]),
        Measurement(
            f"{UNCOMPRESSED}: pydicom / ours",
            "x",
            ratios(times["pydicom"], times["ours"]),
            settings.limit(_LEAST_OF_PLAIN),
        ),
    ]


def time_compressed(settings: Settings, syntax: str) -> list[Measurement]:
    """Time the same for a compressed series, and the share of it that starting the decoders' processes takes.

    Args:
        settings: of the stage.
        syntax: a key of `PACKERS`.

    Raises:
        LineSkipped: imagecodecs isn't installed.
    """
    if imagecodecs is None:
        raise LineSkipped(f"packing {syntax} needs imagecodecs: pip install imagecodecs")
    folder = series_folder(settings, syntax)
    times = _time(settings, folder, {"start": _start_decoders})
    return [
        *_compared(settings, syntax, times, _LEAST_OF_PACKED),
        Measurement(
            f"{syntax}: decoders' start / ours",
            "x",
            ratios(times["start"], times["ours"]),
            note=f"{thread_count()} processes at once, by themselves",
        ),
        Measurement(
            f"{syntax}: time saved by decoders that wait / ours",
            "x",
            _shares_of_starts(settings, folder),
            at_most=settings.limit(_MOST_ISOLATION),
        ),
    ]


def _time(settings: Settings, folder: Path, others: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
    processor = SamfImageProcessor()
    ours = {"ours": lambda: processor.extract(read_ct(folder)), "SimpleITK": lambda: simpleitk_volume(folder)}
    return settings.stopwatch.in_turns({**ours, **others}, folder.name, _ROUNDS)


def _compared(settings: Settings, syntax: str, times: Mapping[str, list[float]], least: float) -> list[Measurement]:
    return [
        Measurement(f"{syntax}: series to slices", "s", times["ours"], note=f"{thread_count()} threads"),
        Measurement(f"{syntax}: SimpleITK's series reader", "s", times["SimpleITK"], note="without slices"),
        Measurement(
            f"{syntax}: SimpleITK / ours", "x", ratios(times["SimpleITK"], times["ours"]), settings.limit(least)
        ),
    ]


def measure_series_memory(settings: Settings, syntax: str) -> list[Measurement]:
    """Measure the memory that the whole path adds to a process that has read one slice.

    Args:
        settings: of the stage.
        syntax: "uncompressed", or a key of `PACKERS`.

    Raises:
        LineSkipped: imagecodecs isn't installed.
    """
    if syntax != UNCOMPRESSED and imagecodecs is None:
        raise LineSkipped(f"packing {syntax} needs imagecodecs: pip install imagecodecs")
    folder = series_folder(settings, syntax)
    files, processor = sorted(folder.iterdir()), SamfImageProcessor()
    processor.extract(read_ct(files[:2]))
    before = resident()
    shape = processor.read(folder).shape
    processor.extract(read_ct(folder))
    grown = (peak_resident() - before) / (np.prod(shape) * np.dtype(np.int16).itemsize)
    return [Measurement(f"{syntax}: memory added / scan", "x", [grown], at_most=settings.limit(_MOST_MEMORY))]


STAGES: dict[str, Callable[[Settings], list[Measurement]]] = {
    "uncompressed": time_uncompressed,
    "uncompressed memory": partial(measure_series_memory, syntax=UNCOMPRESSED),
    **{syntax: partial(time_compressed, syntax=syntax) for syntax in PACKERS},
    "JPEG-LS memory": partial(measure_series_memory, syntax="JPEG-LS"),
}
