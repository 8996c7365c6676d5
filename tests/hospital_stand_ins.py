"""Stand-ins for the model, the exporter and the far end, and a sender, for tests of samf.reporting.hospital."""

import dataclasses
import hashlib
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
from dicom_series import slice_dataset, slice_hu, stack_positions
from pydicom.uid import BasicTextSRStorage

from samf.model.report_samf import REPORT_QUESTION, Provenance, Report
from samf.reporting.hospital.image_store import ImageStore
from samf.reporting.hospital.service import Plan


def image(series: str, number: int, **tags) -> tuple[str, bytes]:
    """One small CT slice as SOPInstanceUID and bytes of a file."""
    dataset = slice_dataset(
        slice_hu(stack_positions()[number]),
        stack_positions()[number],
        SOPInstanceUID=f"{series}.{number + 1}",
        SeriesInstanceUID=series,
        **tags,
    )
    stream = pydicom.filebase.DicomBytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return str(dataset.SOPInstanceUID), stream.getvalue()


def report_of(scan: Path) -> Report:
    """A report that follows from the files of a folder; series with the word "broken" in a file are refused."""
    files = sorted(scan.iterdir())
    if any(b"BROKEN" in file.read_bytes() for file in files):
        raise ValueError(f"{scan}: a CT slice that is damaged.")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    made = Provenance(str(scan), (1, 1, 1), (1.0, 1.0, 1.0), "LPS", "settings", "model")
    made = dataclasses.replace(made, series=digest[:16])
    return Report(f"{len(files)} images, {digest[:8]}.", REPORT_QUESTION, (), made)


def export(reports: Sequence[Report], folder: Path, scan: str, formats: Sequence[str], source: Path) -> list[Path]:
    """Write a DICOM object and a record whose UID and content follow from the text."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{scan}.json").write_text(reports[0].to_json())
    digest = hashlib.sha256(reports[0].text.encode()).hexdigest()
    dataset = slice_dataset(np.zeros((1, 1)), (0, 0, 0), SOPInstanceUID=f"2.25.{int(digest[:24], 16)}")
    del dataset.PixelData
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = BasicTextSRStorage
    dataset.save_as(folder / f"{scan}.sr.dcm", enforce_file_format=True)
    return [folder / f"{scan}.sr.dcm", folder / f"{scan}.json"]


class FarEnd:
    """A destination in memory: all that arrived, by SOPInstanceUID."""

    name = "FAR@there:104"

    def __init__(self):
        self.got: dict[str, list[bytes]] = {}
        self.error: Exception | None = None

    @contextmanager
    def connected(self, files: Sequence[Path]) -> Iterator:
        if self.error is not None:
            raise self.error
        yield self.take

    def take(self, file: Path) -> None:
        self.got.setdefault(str(pydicom.dcmread(file).SOPInstanceUID), []).append(file.read_bytes())


def plan_for(out: Path, *destinations, **options) -> Plan:
    values = {"formats": ["sr"], "quiet": 1.0, "keep_images": 3600.0, "make_report": report_of, "export": export}
    return Plan(out=out, destinations=destinations, **{**values, **options})


def stored(store: ImageStore) -> set[str]:
    """SOPInstanceUIDs of all images on disk."""
    return {path.stem for top in (store.series, store.failed) for path in top.glob("*/*.dcm")}


def no_delay(event) -> None:
    """For pynetdicom's EVT_CONN_OPEN: small messages at once."""
    event.assoc.dul.socket.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
