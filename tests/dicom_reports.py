"""Reports on small DICOM series, with evidence whose hot place is known, made without a model.

And what reads the files that are made of them: other tools, loops.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_series import EachSlice, write_series
from pydicom.uid import BasicTextSRStorage, EncapsulatedPDFStorage, SegmentationStorage

from samf.model.agreement_samf import Disagreement
from samf.model.ct_volume import read_ct
from samf.model.evidence_samf import Evidence, SentenceEvidence
from samf.model.explain_samf import ScanImages, place_of, slice_evidence, slice_images
from samf.model.heat_map_samf import HeatGrid, back_project, meet
from samf.model.image_processing_samf import SamfImageProcessor
from samf.model.report_samf import REPORT_QUESTION, Provenance, Report, Sentence, split_sentences

TEXT = "A nodule of ≥ 5 µm, $ a $ b < c & d. No effusion – none. Плевральный выпот."
POSITIONS = [(-60.0, -50.0, -30.0 + 6.0 * k) for k in range(8)]
HU = np.add.outer(np.linspace(-900, 60, 14), np.linspace(-80, 80, 18)).astype(np.int32)
# What a hospital's files say of patient and study, by keyword.
PATIENT: dict[str, Any] = {
    "PatientName": "Doe^Jane",
    "PatientID": "HOSP-4711",
    "PatientBirthDate": "19610203",
    "PatientSex": "F",
    "StudyInstanceUID": "1.2.826.0.1.99.1",
    "StudyDate": "20240506",
    "StudyTime": "070809",
    "AccessionNumber": "ACC42",
    "StudyID": "S1",
    "ReferringPhysicianName": "Grey^Ann",
    "StudyDescription": "CT thorax",
    "FrameOfReferenceUID": "1.2.826.0.1.99.3",
    "PositionReferenceIndicator": "",
}
_OTHERS = dict.fromkeys(
    ("PatientComments", "PatientAddress", "OperatorsName", "InstitutionName", "ProtocolName", "ImageComments")
)


def hospital_series(folder: Path, **tags: Any) -> Path:
    """Write eight axial slices as a hospital has them; `tags` replace those of `PATIENT`."""
    spaced = {"PixelSpacing": [9.0, 7.0], "SliceThickness": 6.0}
    numbers = {"InstanceNumber": EachSlice(range(1, len(POSITIONS) + 1)), "SeriesInstanceUID": "1.2.826.0.1.99.2"}
    values = {**spaced, **numbers, "SeriesDescription": "lung", **_OTHERS, **PATIENT, **tags}
    return write_series(folder, **{"positions": POSITIONS, "hu": HU, **values})


def report_on(
    source: Any, question: str = REPORT_QUESTION, text: str = TEXT, evidence: bool = True, **changes: Any
) -> Report:
    """Return a report on a scan: its first sentence rests on a place of the second coronal slice, its last on nothing."""
    volume = read_ct(source)
    made = Provenance(
        source=volume.source,
        shape=volume.shape,
        spacing=volume.spacing,
        orientation=volume.stored_orientation,
        slice_settings="abc",
        model="someone/samf-model",
        revision="0123456789abcdef",
        versions={"transformers": "5"},
        series=volume.series,
    )
    sentences = tuple(Sentence(text[a:b], a, b, 4, -1.0) for a, b in split_sentences(text))
    found = _evidence(volume, [sentence.text for sentence in sentences]) if evidence else None
    values: dict[str, Any] = {
        "findings": {"Emphysema": 0.25, "Lung nodule": 1.0},
        "warnings": (
            f"{volume.source}: axes 20° off",
            f"{volume.source}/SECRET.dcm: damaged (ValueError, e.g. SECRET)",
        ),
        "disagreements": (Disagreement("Emphysema", "present", 0.25),),
        "evidence": found,
    }
    return Report(text, question, sentences, made, **{**values, **changes})


def _evidence(volume: Any, texts: list[str]) -> Evidence:
    processor = SamfImageProcessor(slices_per_plane=3, size=32)
    images = ScanImages.of(volume, processor.extract(volume), processor)
    grid = HeatGrid.over(images.geometry, min(8.0, *(size / 4 for size in volume.coverage_mm)))
    count = len(images.slices)
    sentences = []
    for number, text in enumerate(texts):
        heat = np.zeros((count, 8, 8), dtype=np.float32)
        if number < len(texts) - 1:
            heat[:, 3, 3] = 0.4
            heat[4, 2 + number, 4] = 1.0
        scores = np.where(np.arange(count) == 4, 0.5, np.where(np.arange(count) == 1, 0.25, -0.1))
        scores = scores * (number < len(texts) - 1)
        together = meet(back_project(images.geometry, heat, grid.voxels()))
        cell = np.array(np.unravel_index(int(together.argmax()), together.shape))
        top = tuple(slice_evidence(images, int(k), float(scores[k]), heat) for k in np.argsort(-scores)[:3])
        hot = together.max() > 0
        sentences.append(
            SentenceEvidence(
                text=text,
                log_probability=-1.0,
                without_volume=None,
                slice_scores=tuple(map(float, scores)),
                top_slices=top,
                peak=place_of(images.geometry, grid.voxel(cell)) if hot else None,
                heat=together,
                slice_heat=slice_images(images, heat, grid.voxel(cell)),
            )
        )
    rows = [tuple(map(tuple, affine.tolist())) for affine in (grid.affine, images.geometry.stored_affine)]
    shape = tuple(images.geometry.stored_shape)
    return Evidence("occlusion", "windows", tuple(sentences), {}, grid.shape, rows[0], shape, rows[1])


DICOM = {"sr": BasicTextSRStorage, "dicom-pdf": EncapsulatedPDFStorage, "seg": SegmentationStorage}


def items_of(dataset, value_type):
    """All content items of a type, in the order of the document."""
    for item in dataset.get("ContentSequence", []):
        if item.ValueType == value_type:
            yield item
        yield from items_of(item, value_type)


def texts_of(dataset, concept):
    return [
        item.TextValue for item in items_of(dataset, "TEXT") if item.ConceptNameCodeSequence[0].CodeValue == concept
    ]


NAMES = {
    "cyrillic": ("ISO_IR 144", "Иванов^Пётр^Алексеевич", b"\xb8\xd2\xd0\xdd\xde\xd2^"),
    "turkish": ("ISO_IR 148", "Öztürk^Şükrü Işık", b"\xd6zt\xfcrk^\xdeu\xfdkr"[:7]),
    "japanese": (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう", b"\x1b$B;3ED"),
    "katakana": (["ISO 2022 IR 13", "ISO 2022 IR 87"], "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう", b"\xd4\xcf\xc0\xde^"),
    "latin": ("ISO_IR 100", "Müller^Jörg", b"M\xfcller^"),
    "korean": (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동", b"\x1b$)C"),
    "chinese": ("GB18030", "Wang^XiaoDong=王^小东", b"=\xcd\xf5^"),
    "utf8": ("ISO_IR 192", "Nguyễn^Thị Ánh", "Nguyễn".encode()),
    "one component": (None, "Anonymous", b"Anonymous"),
}


def run_tool(tool, *arguments) -> str:
    """Return the output of a command of dcmtk or dicom3tools; skip where it is missing, fail where it fails."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([tool, *map(str, arguments)], capture_output=True, check=False, timeout=120)
    text = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode == 0 or tool == "dciodvfy", text
    return text


def heat_at(report: Report, lps: np.ndarray) -> float:
    """The largest heat of any sentence at a point, by weighted sums over the eight cells around it."""
    heat = np.max([sentence.heat for sentence in report.evidence.sentences], axis=0)
    ras = np.array([-lps[0], -lps[1], lps[2], 1.0])
    cell = np.clip((np.linalg.inv(np.array(report.evidence.grid_affine)) @ ras)[:3], 0, np.array(heat.shape) - 1)
    low = np.minimum(cell.astype(int), np.array(heat.shape) - 2)
    share = cell - low
    total = 0.0
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, share, 1 - share))
        total += weight * heat[tuple(low + corner)]
    return float(total)


def assert_points(made, report):
    values = sitk.GetArrayFromImage(made)
    assert values.max() > 128, "the hottest place is in it"
    generator = np.random.default_rng(0)
    for z, y, x in [np.unravel_index(values.argmax(), values.shape), *generator.integers(0, values.shape, (40, 3))]:
        point = np.array(made.TransformIndexToPhysicalPoint((int(x), int(y), int(z))))
        assert abs(values[z, y, x] / 255 - heat_at(report, point)) <= 0.5 / 255 + 1e-4
