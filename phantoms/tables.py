"""The tables of a phantom set: reports, labels, metadata and questions as in CT-RATE, and the SAMF paper's CSVs."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NotRequired, TextIO, TypeAlias, TypedDict

import nibabel as nib
import numpy as np

from samf.data.ct_rate.tables import CT_RATE_LABELS
from samf.data.schema import Task
from samf.phantoms import questions, text
from samf.phantoms.draws import pick
from samf.phantoms.plan import SPLITS, PhantomSettings, Scan, seeded
from samf.utils.files import atomic_path

Row: TypeAlias = dict[str, str | int]
VqaTask: TypeAlias = Task | Literal["report_generation"]
VqaTurn = TypedDict("VqaTurn", {"from": str, "type": NotRequired[str], "value": str})


class VqaEntry(TypedDict):
    """An entry of CT-RATE's VQA list."""

    id: str
    image: NotRequired[str]
    conversations: list[VqaTurn]


_METADATA_COLUMNS = (
    *("VolumeName", "Manufacturer", "SeriesDescription", "ManufacturerModelName", "PatientSex", "PatientAge"),
    *("ReconstructionDiameter", "PatientPosition", "Rows", "Columns", "XYSpacing", "RescaleIntercept", "RescaleSlope"),
    *("RescaleType", "NumberofSlices", "ZSpacing", "StudyDate"),
)

_REPORT_COLUMNS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")

_MCQ_COLUMNS = ("Question ID", "Image", "Question", *(f"Choice {c}" for c in "ABCD"), "Answer Choice", "Answer")


def write_text(path: Path, write: Callable[[TextIO], object]) -> None:
    """Call `write` with an open text file that becomes `path` when it is complete."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        write(file)


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, str | int]]) -> None:
    def write(file: TextIO) -> None:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)

    write_text(path, write)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, lambda file: json.dump(content, file, indent=1))


def _report_rows(scans: Iterable[Scan]) -> Iterator[Row]:
    """Yield a row per volume: reconstructions of one scan share its report, as in CT-RATE."""
    for scan in scans:
        rng = np.random.default_rng(seeded(scan.seeds["scan"], 101))
        row: Row = {
            "ClinicalInformation_EN": pick(rng, ("Not given.", "Cough.", "Shortness of breath.", "")),
            "Technique_EN": "Non-contrast images were taken in the axial plane.",
            "Findings_EN": text.join_report(scan.statements),
            "Impressions_EN": text.write_impression(scan.findings),
        }
        for volume in scan.volumes:
            yield {"VolumeName": volume, **row}


def _label_rows(scans: Iterable[Scan]) -> Iterator[Row]:
    for scan in scans:
        labels = {name: int(name in scan.findings) for name in CT_RATE_LABELS}
        for volume in scan.volumes:
            yield {"VolumeName": volume, **labels}


def _metadata_rows(root: Path, scans: Iterable[Scan]) -> Iterator[Row]:
    """Yield CT-RATE's metadata of each volume, with the geometry read from the written file.

    RescaleIntercept is that of the scanner's raw values, as in CT-RATE: v2 files hold HU and must not be rescaled.
    """
    for scan in scans:
        rng = np.random.default_rng(seeded(scan.seeds["scan"], 102))
        person: Row = {
            "Manufacturer": "Phantom",
            "SeriesDescription": "synthetic",
            "PatientSex": pick(rng, "FM"),
            "PatientAge": f"{rng.integers(30, 86):03d}Y",
            "PatientPosition": "HFS",
            "RescaleIntercept": pick(rng, (-1024, -8192)),
            "RescaleSlope": 1,
            "RescaleType": "HU",
            "StudyDate": f"2021{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}",
        }
        for volume in scan.volumes:
            image = nib.Nifti1Image.from_filename(root / scan.path(volume))
            order = nib.orientations.io_orientation(image.affine)[:, 0].astype(int)  # stored axis → x, y or z
            size, zooms = [0] * 3, [0.0] * 3
            for stored, axis in enumerate(order):
                size[axis], zooms[axis] = image.shape[stored], float(image.header.get_zooms()[stored])
            yield {
                **person,
                "VolumeName": volume,
                "Rows": size[1],
                "Columns": size[0],
                "NumberofSlices": size[2],
                "XYSpacing": f"[{zooms[0]:.6f}, {zooms[1]:.6f}]",
                "ZSpacing": f"{zooms[2]:.6f}",
            }


def _vqa_turns(task: VqaTask, question: str, answer: str, image: bool = True) -> list[VqaTurn]:
    """Return an exchange in CT-RATE's form: a tag of the task ends the question, `<image>` begins the first of an image."""
    value = f"{'<image>' + chr(10) if image else ''}{question}<{task}>"
    return [{"from": "human", "type": task, "value": value}, {"from": "gpt", "value": answer}]


def _vqa_entries(scans: Iterable[Scan], settings: PhantomSettings) -> Iterator[VqaEntry]:
    """Yield CT-RATE's VQA list. As there, ids repeat within a scan, and its yes-or-no questions are one conversation."""
    for number, scan in enumerate(scans):
        rng = np.random.default_rng(seeded(scan.seeds["scan"], 103))

        def entry(
            task: VqaTask, *exchanges: list[VqaTurn], number: int = number, image: str = scan.volumes[0]
        ) -> VqaEntry:
            turns = [turn for exchange in exchanges for turn in exchange]
            return {"id": f"{task}_{number}", "image": image, "conversations": turns}

        report = text.join_report(scan.statements)
        yield entry("report_generation", _vqa_turns("report_generation", pick(rng, questions.REPORT_REQUESTS), report))
        for question in scan.questions:
            asked = f"{question.text} {question.options_text}"
            yield entry("multiple_choice", _vqa_turns("multiple_choice", asked, question.answer_text))
        yes_or_no = dict(questions.short_question(rng, scan.findings, settings.asked) for _ in range(3))
        yield entry(
            "short_answer",
            *(_vqa_turns("short_answer", q, a, image=k == 0) for k, (q, a) in enumerate(yes_or_no.items())),
        )
        yield entry(
            "long_answer", _vqa_turns("long_answer", *questions.long_question(rng, scan.statements, settings.asked))
        )


def text_vqa_entries(settings: PhantomSettings, count: int) -> Iterator[VqaEntry]:
    """Yield `count` multiple-choice questions without an image, each after the impression that answers it."""
    for number in range(count):
        rng = np.random.default_rng(seeded(settings.seed, 1000, number))
        context, question = questions.ask_about_text(rng, settings.asked)
        asked = f"{context} {question.text} {question.options_text}"
        turns = _vqa_turns("multiple_choice", asked, question.answer_text, image=False)
        yield {"id": f"text_multiple_choice_{number}", "conversations": turns}


def _mrg_rows(scans: Iterable[Scan]) -> Iterator[Row]:
    """Yield the rows of the paper's report CSV."""
    for scan in scans:
        for volume in scan.volumes:
            yield {"image": scan.path(volume), "caption": text.join_report(scan.statements)}


def _mcq_rows(scans: Iterable[Scan]) -> Iterator[Row]:
    """Yield the rows of the paper's multiple-choice CSV, where question ids repeat within a scan."""
    for number, scan in enumerate(scans):
        for question in scan.questions:
            yield {
                "Question ID": f"multiple_choice_{number}",
                "Image": scan.path(scan.volumes[0]),
                "Question": question.text,
                **{f"Choice {c}": choice for c, choice in zip("ABCD", question.choices, strict=True)},
                "Answer Choice": question.letter,
                "Answer": question.choices[question.answer],
            }


def write_tables(root: Path, split: str, scans: list[Scan], settings: PhantomSettings) -> None:
    """Write all files of a split except the volumes.

    Args:
        root: the data set's root, which has the volumes.
        split: "train" or "valid".
        scans: of the split.
        settings: of the set.
    """
    _, long_name, short_name = SPLITS[split]
    _write_csv(root / f"radiology_text_reports/{long_name}_reports.csv", _REPORT_COLUMNS, _report_rows(scans))
    _write_csv(root / f"metadata/{long_name}_metadata.csv", _METADATA_COLUMNS, _metadata_rows(root, scans))
    labels = root / f"multi_abnormality_labels/{short_name}_predicted_labels.csv"
    _write_csv(labels, ("VolumeName", *CT_RATE_LABELS), _label_rows(scans))
    write_json(root / f"vqa/{short_name}_vqa.json", list(_vqa_entries(scans, settings)))
    _write_csv(root / f"samf_csv/{short_name}_mrg_data.csv", ("image", "caption"), _mrg_rows(scans))
    _write_csv(root / f"samf_csv/{short_name}_mcq_data.csv", _MCQ_COLUMNS, _mcq_rows(scans))
