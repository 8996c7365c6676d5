"""Phantom chest CTs with reports and questions in CT-RATE's v2 layout, for tests and teaching.

    python -m samf.phantoms.dataset OUT --patients 400 --seed 0

writes OUT/dataset with train_fixed/ and valid_fixed/ (NIfTI of int16 HU, varied orientation and spacing),
radiology_text_reports/, metadata/, multi_abnormality_labels/, vqa/ and samf_csv/ (the two CSVs of the SAMF paper).
Everything follows from the seed, the split and the patient's number, whatever the number of workers; existing volumes are
kept. See `samf.phantoms.volume` for how a chest is drawn, `samf.phantoms.text` and `samf.phantoms.questions` for the texts.
"""

import argparse
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from samf.phantoms.draws import pick, shuffled
from samf.phantoms.findings import (
    DEMO_FINDINGS,
    FINDING_NAMES,
    LOBES,
    SIDES,
    Finding,
    sample_findings,
)
from samf.phantoms.nifti import write_nifti
from samf.phantoms.plan import PhantomSettings, plan_patient, reconstruction_seed
from samf.phantoms.tables import text_vqa_entries, write_json, write_tables, write_text
from samf.phantoms.volume import Phantom, make_phantom, render_phantom
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
    "plan_patient",
    "sample_findings",
    "write_dataset",
    "write_nifti",
]

logger = logging.getLogger(__name__)

_README = """Synthetic chest CTs, made by `python -m samf.phantoms.dataset`: a test and teaching set.

The volumes are drawn by a program from simple shapes and show no real person; the reports and questions are generated
from what was drawn. Nothing measured on them says anything about clinical performance. The layout is CT-RATE's v2
(https://huggingface.co/datasets/ibrahimhamamci/CT-RATE), so that code written for CT-RATE reads this folder.

Settings: {settings}
"""


def _random_axis_codes(rng: np.random.Generator) -> str:
    """Draw one of the 48 orders and directions of a volume's axes; half of the time the usual LPS."""
    if rng.random() < 0.5:
        return "LPS"
    return "".join(pick(rng, pair) for pair in shuffled(rng, ("RL", "AP", "SI")))


def _write_patient(job: tuple[str, int], *, root: Path, settings: PhantomSettings) -> int:
    """Write the volumes of one patient, (split, number), that don't exist; return how many were written."""
    written = 0
    for scan in plan_patient(settings, *job):
        for number, volume in enumerate(scan.volumes):
            path = root / scan.path(volume)
            if path.exists():
                continue
            recon = reconstruction_seed(scan, number)
            phantom = render_phantom(scan.findings, **scan.seeds, recon=recon, voxel_mm=settings.voxel_mm)
            write_nifti(phantom, path, _random_axis_codes(np.random.default_rng([recon, 2])))
            written += 1
    return written


def _write_volumes(
    root: Path, jobs: Sequence[tuple[str, int]], settings: PhantomSettings, workers: int | None, progress: bool
) -> int:
    """Write the volumes of all patients in `workers` processes (None: one per core; 1: this one); return how many."""
    work = partial(_write_patient, root=root, settings=settings)
    show = partial(tqdm, total=len(jobs), desc="phantoms", unit="patient", disable=not progress)
    workers = workers or usable_cores()
    if workers == 1:
        return sum(show(map(work, jobs)))
    with process_pool(workers) as pool:
        return sum(show(pool.map(work, jobs, chunksize=4)))


def _claim_folder(out: Path, settings: PhantomSettings) -> None:
    """Write the settings into a folder. Raises ValueError if it has volumes that were made with other settings."""
    path, content = out / "phantom.json", json.loads(json.dumps(asdict(settings)))
    if path.exists() and (found := json.loads(path.read_text(encoding="utf-8"))) != content:
        raise ValueError(
            f"{out} holds phantoms made with {found}, not {content}. Choose another folder, or remove this one."
        )
    write_json(path, content)
    write_text(out / "README.txt", lambda file: file.write(_README.format(settings=json.dumps(content))))


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
    """Write a phantom data set.

    Patients of the two splits are different people, since the split is part of every seed. Existing volumes are kept, so
    an interrupted run can be continued.

    Args:
        out: the folder to write.
        train_patients: number of patients for training.
        valid_patients: number of patients for validation.
        settings: of the set; None takes the defaults.
        text_questions: number of multiple-choice questions without an image.
        workers: processes; None takes one per core.
        progress: show a progress bar.

    Returns:
        The root of the data set, `out`/dataset, which `load_ct_rate` reads.

    Raises:
        ValueError: `out` has volumes that were made with other settings.
    """
    settings = settings or PhantomSettings()
    out = Path(out)
    root = out / "dataset"
    _claim_folder(out, settings)
    patients = {"train": range(1, train_patients + 1), "valid": range(1, valid_patients + 1)}
    jobs = [(split, patient) for split, numbers in patients.items() for patient in numbers]
    written = _write_volumes(root, jobs, settings, workers, progress)
    for split, numbers in patients.items():
        scans = [scan for patient in numbers for scan in plan_patient(settings, split, patient)]
        write_tables(root, split, scans, settings)
        counts = Counter(name for scan in scans for name in scan.findings)
        logger.info(
            "%s: %d patients, %d scans, %d questions; findings: %s",
            *(split, len(numbers), len(scans), sum(len(scan.questions) for scan in scans), dict(counts)),
        )
    write_json(root / "vqa/train_text_vqa.json", list(text_vqa_entries(settings, text_questions)))
    logger.info("%d volumes written, %d patients in all: %s", written, len(jobs), root)
    return root


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
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
    parser.add_argument(
        "--questions", choices=("demo", "all"), default="demo", help="findings that questions ask about"
    )
    parser.add_argument("--nodule_mm", type=int, nargs=2, default=(16, 30), metavar=("MIN", "MAX"))
    parser.add_argument("--text_questions", type=int, default=4000, help="multiple-choice questions without an image")
    parser.add_argument("--workers", type=int, help="processes; default: one per core")
    args = parser.parse_args(argv)
    if args.valid_patients is None:
        args.valid_patients = args.patients // 4
    if not 0 <= args.valid_patients <= args.patients:
        parser.error(f"--valid_patients {args.valid_patients} must be between 0 and --patients {args.patients}")
    if args.voxel_mm <= 0 or not 0 <= args.reconstructions <= 1 or not 0 < args.nodule_mm[0] <= args.nodule_mm[1]:
        parser.error(
            "--voxel_mm must be positive, --reconstructions between 0 and 1, --nodule_mm two increasing diameters"
        )
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Write a data set of phantoms by the options of the command line."""
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
