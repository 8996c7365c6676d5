"""Phantom chest CTs with reports and questions, written as CT-RATE's v2 is: a set for tests and teaching.

    python -m samf.phantoms.dataset OUT --patients 400 --seed 0

makes OUT/dataset with train_fixed/ and valid_fixed/ (int16 HU NIfTI, varied orientation and spacing),
radiology_text_reports/, metadata/, multi_abnormality_labels/, vqa/ and samf_csv/ (the two CSVs of the SAMF paper).
Everything follows from the seed, the split and the patient's number, whatever the number of workers; volumes that are
there already are kept. See `samf.phantoms.volume` for how a chest is drawn and `samf.phantoms.text` for what
is written about it.
"""

import argparse
import csv
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip
from tqdm import tqdm

from samf.data.ct_rate.loader import CT_RATE_LABELS
from samf.phantoms import text
from samf.phantoms.findings import (
    DEMO_FINDINGS,
    FINDING_NAMES,
    LOBES,
    SIDES,
    Finding,
    sample_findings,
)
from samf.phantoms.volume import Phantom, make_phantom, render_phantom
from samf.utils.files import atomic_path, atomic_write
from samf.utils.parallel import process_pool, usable_cores

__all__ = [
    "DEMO_FINDINGS",
    "FINDING_NAMES",
    "LOBES",
    "SIDES",
    "Finding",
    "Phantom",
    "PhantomSettings",
    "make_phantom",
    "sample_findings",
    "write_dataset",
    "write_nifti",
]

logger = logging.getLogger(__name__)

# CT-RATE's names of a split: its folder and volume stem, its reports and metadata, its VQA and labels.
SPLITS = {"train": ("train_fixed", "train", "train"), "valid": ("valid_fixed", "validation", "valid")}

METADATA_COLUMNS = (
    *("VolumeName", "Manufacturer", "SeriesDescription", "ManufacturerModelName", "PatientSex", "PatientAge"),
    *("ReconstructionDiameter", "PatientPosition", "Rows", "Columns", "XYSpacing", "RescaleIntercept", "RescaleSlope"),
    *("RescaleType", "NumberofSlices", "ZSpacing", "StudyDate"),
)

REPORT_COLUMNS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")

MCQ_COLUMNS = ("Question ID", "Image", "Question", *(f"Choice {c}" for c in "ABCD"), "Answer Choice", "Answer")

README = """Synthetic chest CTs, made by `python -m samf.phantoms.dataset`: a test and teaching set.

The volumes are drawn by a program from simple shapes and show no real person; the reports and questions are generated
from what was drawn. Nothing measured on them says anything about clinical performance. The layout is CT-RATE's v2
(https://huggingface.co/datasets/ibrahimhamamci/CT-RATE), so that code written for CT-RATE reads this folder.

Settings: {settings}
"""


@dataclass(frozen=True)
class PhantomSettings:
    """What a phantom set is made of; two sets with equal settings have equal files.

    Attributes:
        seed: of everything.
        voxel_mm: mean voxel edge.
        reconstructions: share of patients with a second reconstruction (`_a_2`), and, drawn apart, with a second scan
            (`_b_1`: the same anatomy, other findings).
        questions: "demo" asks about DEMO_FINDINGS, "all" about every one of FINDING_NAMES.
        nodule_mm: smallest and largest diameter of a lung nodule.
    """

    seed: int = 0
    voxel_mm: float = 5.0
    reconstructions: float = 0.0
    questions: str = "demo"
    nodule_mm: tuple[int, int] = (16, 30)

    @property
    def asked(self) -> tuple[str, ...]:
        return DEMO_FINDINGS if self.questions == "demo" else FINDING_NAMES


@dataclass(frozen=True)
class Scan:
    """One scan of one patient: CT-RATE's `train_3_b` with all its reconstructions."""

    split: str
    patient: int
    letter: str
    reconstructions: int
    findings: dict[str, Finding]
    statements: dict[str, str]
    questions: list[text.Question]
    seeds: dict[str, int]

    @property
    def scan_id(self) -> str:
        return f"{self.split}_{self.patient}_{self.letter}"

    @property
    def volumes(self) -> list[str]:
        """File names, `train_3_b_1.nii.gz` and so on."""
        return [f"{self.scan_id}_{k + 1}.nii.gz" for k in range(self.reconstructions)]

    def path(self, volume: str) -> str:
        """A volume's path below the dataset's root."""
        return f"{SPLITS[self.split][0]}/{self.split}_{self.patient}/{self.scan_id}/{volume}"


def seeded(*keys: int) -> int:
    """One seed from several whole numbers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


def plan_patient(settings: PhantomSettings, split: str, patient: int) -> list[Scan]:
    """Everything about one patient but the voxels."""
    keys = (settings.seed, list(SPLITS).index(split), patient)
    extra = np.random.default_rng(seeded(*keys, 1)).random(2) < settings.reconstructions
    scans = []
    for number, letter in enumerate("ab" if extra[1] else "a"):
        rng = np.random.default_rng(seeded(*keys, 2, number))
        findings = sample_findings(rng, nodule_mm=settings.nodule_mm)
        scans.append(
            Scan(
                split,
                patient,
                letter,
                reconstructions=2 if extra[0] and letter == "a" else 1,
                findings=findings,
                statements=text.write_statements(rng, findings),
                questions=text.ask_all(rng, findings, settings.asked),
                seeds={"patient": seeded(*keys, 3), "scan": seeded(*keys, 4, number)},
            )
        )
    return scans


# ---- volumes -------------------------------------------------------------------------------------------------------


def write_nifti(phantom: Phantom, path: Path, axis_codes: str = "RAS") -> nib.Nifti1Image:
    """Write a phantom as .nii.gz (complete or not at all), its array stored along `axis_codes`: "LPS", "PIR", ….

    Returns the image as written. Equal phantoms give equal bytes: the gzip header holds neither a time nor a name.
    """
    stored = nib.Nifti1Image(phantom.hu, phantom.affine)
    there = nib.orientations.axcodes2ornt(axis_codes)
    stored = stored.as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.io_orientation(stored.affine), there)
    )
    stored.header.set_xyzt_units("mm")
    stored.set_sform(stored.affine, code=1)
    stored.set_qform(stored.affine, code=1)
    atomic_write(path, igzip.compress(stored.to_bytes(), 1, mtime=0))
    return stored


def random_axis_codes(rng: np.random.Generator) -> str:
    """One of the 48 orders and directions of a volume's axes; half of them the scanners' usual LPS."""
    if rng.random() < 0.5:
        return "LPS"
    return "".join(text.pick(rng, pair) for pair in text.shuffled(rng, ("RL", "AP", "SI")))


def write_patient(job: tuple[str, int], *, root: Path, settings: PhantomSettings) -> int:
    """Write the volumes of one patient that are not there yet. Returns how many were written."""
    written = 0
    for scan in plan_patient(settings, *job):
        for number, volume in enumerate(scan.volumes):
            path = root / scan.path(volume)
            if path.exists():
                continue
            recon = reconstruction_seed(scan, number)
            phantom = render_phantom(scan.findings, **scan.seeds, recon=recon, voxel_mm=settings.voxel_mm)
            write_nifti(phantom, path, random_axis_codes(np.random.default_rng([recon, 2])))
            written += 1
    return written


def reconstruction_seed(scan: Scan, number: int) -> int:
    """Seed of the grid, the noise and the stored orientation of a scan's reconstruction (0-based)."""
    return seeded(scan.seeds["scan"], number)


def write_volumes(
    root: Path, jobs: Sequence[tuple[str, int]], settings: PhantomSettings, workers: int | None, progress: bool
) -> int:
    """All patients' volumes over `workers` processes (None: one a core; 1: in this process)."""
    work = partial(write_patient, root=root, settings=settings)
    show = partial(tqdm, total=len(jobs), desc="phantoms", unit="patient", disable=not progress)
    workers = workers or usable_cores()
    if workers == 1:
        return sum(show(map(work, jobs)))
    with process_pool(workers) as pool:
        return sum(show(pool.map(work, jobs, chunksize=4)))


# ---- tables --------------------------------------------------------------------------------------------------------


def write_text(path: Path, write: Callable) -> None:
    """Call `write` on an open text file that becomes `path` once it is complete."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        write(file)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    def write(file):
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)

    write_text(path, write)


def write_json(path: Path, content: object) -> None:
    write_text(path, lambda file: json.dump(content, file, indent=1))


def report_rows(scans: Iterable[Scan]) -> Iterator[dict]:
    """A row a volume: reconstructions of one scan share its report, as in CT-RATE."""
    for scan in scans:
        rng = np.random.default_rng(seeded(scan.seeds["scan"], 101))
        row = {
            "ClinicalInformation_EN": text.pick(rng, ("Not given.", "Cough.", "Shortness of breath.", "")),
            "Technique_EN": "Non-contrast images were taken in the axial plane.",
            "Findings_EN": text.join_report(scan.statements),
            "Impressions_EN": text.write_impression(scan.findings),
        }
        for volume in scan.volumes:
            yield {"VolumeName": volume, **row}


def label_rows(scans: Iterable[Scan]) -> Iterator[dict]:
    for scan in scans:
        labels = {name: int(name in scan.findings) for name in CT_RATE_LABELS}
        for volume in scan.volumes:
            yield {"VolumeName": volume, **labels}


def metadata_rows(root: Path, scans: Iterable[Scan]) -> Iterator[dict]:
    """What CT-RATE's metadata say of each volume, its geometry read from the written file.

    RescaleIntercept is that of the scanner's raw values, as in CT-RATE: v2 files hold HU and must not be rescaled.
    """
    for scan in scans:
        rng = np.random.default_rng(seeded(scan.seeds["scan"], 102))
        person = {
            "Manufacturer": "Phantom",
            "SeriesDescription": "synthetic",
            "PatientSex": text.pick(rng, "FM"),
            "PatientAge": f"{rng.integers(30, 86):03d}Y",
            "PatientPosition": "HFS",
            "RescaleIntercept": text.pick(rng, (-1024, -8192)),
            "RescaleSlope": 1,
            "RescaleType": "HU",
            "StudyDate": f"2021{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}",
        }
        for volume in scan.volumes:
            image = nib.load(root / scan.path(volume))
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


def vqa_turn(task: str, question: str, answer: str, image: bool = True) -> list[dict]:
    """One exchange in CT-RATE's form: the task's tag ends the question, `<image>` opens the first of an image."""
    value = f"{'<image>' + chr(10) if image else ''}{question}<{task}>"
    return [{"from": "human", "type": task, "value": value}, {"from": "gpt", "value": answer}]


def vqa_records(scans: Iterable[Scan], settings: PhantomSettings) -> Iterator[dict]:
    """CT-RATE's VQA list. Ids repeat within a scan, and a scan's yes-or-no questions are one conversation, as there."""
    for number, scan in enumerate(scans):
        rng = np.random.default_rng(seeded(scan.seeds["scan"], 103))

        def record(task, *turns, number=number, image=scan.volumes[0]):
            return {
                "id": f"{task}_{number}",
                "image": image,
                "conversations": [side for turn in turns for side in turn],
            }

        report = text.join_report(scan.statements)
        yield record("report_generation", vqa_turn("report_generation", text.pick(rng, text.REPORT_REQUESTS), report))
        for question in scan.questions:
            asked = f"{question.text} {question.options_text}"
            yield record("multiple_choice", vqa_turn("multiple_choice", asked, question.answer_text))
        yes_or_no = dict(text.short_question(rng, scan.findings, settings.asked) for _ in range(3))
        yield record(
            "short_answer",
            *(vqa_turn("short_answer", q, a, image=k == 0) for k, (q, a) in enumerate(yes_or_no.items())),
        )
        yield record("long_answer", vqa_turn("long_answer", *text.long_question(rng, scan.statements, settings.asked)))


def text_vqa_records(settings: PhantomSettings, count: int) -> Iterator[dict]:
    """Multiple choice without an image: statements of an invented report, then the question they answer."""
    for number in range(count):
        rng = np.random.default_rng(seeded(settings.seed, 1000, number))
        context, question = text.ask_about_text(rng, settings.asked)
        asked = f"{context} {question.text} {question.options_text}"
        turns = vqa_turn("multiple_choice", asked, question.answer_text, image=False)
        yield {"id": f"text_multiple_choice_{number}", "conversations": turns}


def mrg_rows(scans: Iterable[Scan]) -> Iterator[dict]:
    """The paper's report CSV."""
    for scan in scans:
        for volume in scan.volumes:
            yield {"image": scan.path(volume), "caption": text.join_report(scan.statements)}


def mcq_rows(scans: Iterable[Scan]) -> Iterator[dict]:
    """The paper's multiple-choice CSV. Question ids repeat within a scan, as in the paper's sample."""
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
    """Everything of one split that is not a volume."""
    _, long_name, short_name = SPLITS[split]
    write_csv(root / f"radiology_text_reports/{long_name}_reports.csv", REPORT_COLUMNS, report_rows(scans))
    write_csv(root / f"metadata/{long_name}_metadata.csv", METADATA_COLUMNS, metadata_rows(root, scans))
    labels = root / f"multi_abnormality_labels/{short_name}_predicted_labels.csv"
    write_csv(labels, ("VolumeName", *CT_RATE_LABELS), label_rows(scans))
    write_json(root / f"vqa/{short_name}_vqa.json", list(vqa_records(scans, settings)))
    write_csv(root / f"samf_csv/{short_name}_mrg_data.csv", ("image", "caption"), mrg_rows(scans))
    write_csv(root / f"samf_csv/{short_name}_mcq_data.csv", MCQ_COLUMNS, mcq_rows(scans))


def claim_folder(out: Path, settings: PhantomSettings) -> None:
    """Write the settings into OUT; refuse a folder whose volumes were made with others.

    Raises:
        ValueError: OUT holds a set with other settings, so its volumes can't be reused.
    """
    path, content = out / "phantom.json", json.loads(json.dumps(asdict(settings)))
    if path.exists() and (found := json.loads(path.read_text(encoding="utf-8"))) != content:
        raise ValueError(
            f"{out} holds phantoms made with {found}, not {content}. Choose another folder, or remove this one."
        )
    write_json(path, content)
    write_text(out / "README.txt", lambda file: file.write(README.format(settings=json.dumps(content))))


def write_dataset(
    out: str | Path,
    *,
    train_patients: int,
    valid_patients: int,
    settings: PhantomSettings | None = None,
    text_questions: int = 4000,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write a phantom data set and return its root, OUT/dataset, which `load_ct_rate` reads.

    Train and valid patients are different people by construction: the split is part of every seed.
    Volumes that exist are kept, so a broken run goes on where it ended.
    """
    settings = settings or PhantomSettings()
    out = Path(out)
    root = out / "dataset"
    claim_folder(out, settings)
    patients = {"train": range(1, train_patients + 1), "valid": range(1, valid_patients + 1)}
    jobs = [(split, patient) for split, numbers in patients.items() for patient in numbers]
    written = write_volumes(root, jobs, settings, workers, progress)
    for split, numbers in patients.items():
        scans = [scan for patient in numbers for scan in plan_patient(settings, split, patient)]
        write_tables(root, split, scans, settings)
        counts = Counter(name for scan in scans for name in scan.findings)
        logger.info(
            "%s: %d patients, %d scans, %d questions; findings: %s",
            *(split, len(numbers), len(scans), sum(len(scan.questions) for scan in scans), dict(counts)),
        )
    write_json(root / "vqa/train_text_vqa.json", list(text_vqa_records(settings, text_questions)))
    logger.info("%d volumes written, %d patients in all: %s", written, len(jobs), root)
    return root


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m samf.phantoms.dataset",
        description="Write synthetic chest CTs with reports and questions in CT-RATE's v2 layout (test and teaching).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="folder to write; the data set is OUT/dataset")
    parser.add_argument("--patients", type=int, default=400, help="train and valid patients together")
    parser.add_argument("--valid_patients", type=int, help="of these, for validation; default: a quarter")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--voxel_mm", type=float, default=5.0, help="mean voxel edge")
    parser.add_argument("--reconstructions", type=float, default=0.0, help="share with a second one, or a second scan")
    parser.add_argument("--questions", choices=("demo", "all"), default="demo", help="findings that questions ask for")
    parser.add_argument("--nodule_mm", type=int, nargs=2, default=(16, 30), metavar=("MIN", "MAX"))
    parser.add_argument("--text_questions", type=int, default=4000, help="multiple-choice records without an image")
    parser.add_argument("--workers", type=int, help="processes; default: one a core")
    args = parser.parse_args(argv)
    if args.valid_patients is None:
        args.valid_patients = args.patients // 4
    if not 0 <= args.valid_patients <= args.patients:
        parser.error(f"--valid_patients {args.valid_patients} must lie between 0 and --patients {args.patients}")
    if args.voxel_mm <= 0 or not 0 <= args.reconstructions <= 1 or not 0 < args.nodule_mm[0] <= args.nodule_mm[1]:
        parser.error("--voxel_mm must be positive, --reconstructions a share, --nodule_mm two rising diameters")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = PhantomSettings(
        args.seed, args.voxel_mm, args.reconstructions, args.questions, (args.nodule_mm[0], args.nodule_mm[1])
    )
    write_dataset(
        args.out,
        train_patients=args.patients - args.valid_patients,
        valid_patients=args.valid_patients,
        settings=settings,
        text_questions=args.text_questions,
        workers=args.workers,
    )


if __name__ == "__main__":
    main()
