"""The plan of a phantom set: settings, and the findings, texts and seeds of each patient."""

from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np

from samf.phantoms import text
from samf.phantoms.findings import DEMO_FINDINGS, FINDING_NAMES, Finding, sample_findings
from samf.phantoms.questions import Question, ask_all

# CT-RATE's names of a split: of the folder of volumes, of reports and metadata, of VQA and labels.
SPLITS = {"train": ("train_fixed", "train", "train"), "valid": ("valid_fixed", "validation", "valid")}


@dataclass(frozen=True)
class PhantomSettings:
    """Settings of a phantom set; two sets with equal settings have equal files.

    Attributes:
        seed: of everything.
        voxel_mm: mean voxel edge.
        reconstructions: share of patients with a second reconstruction (`_a_2`) and, drawn independently, with a second
            scan (`_b_1`: the same anatomy, other findings).
        questions: "demo" asks about DEMO_FINDINGS, "all" about FINDING_NAMES.
        nodule_mm: smallest and largest diameter of a lung nodule.
    """

    seed: int = 0
    voxel_mm: float = 5.0
    reconstructions: float = 0.0
    questions: Literal["demo", "all"] = "demo"
    nodule_mm: tuple[int, int] = (16, 30)

    @property
    def asked(self) -> tuple[str, ...]:
        """Return the findings that questions ask about."""
        return DEMO_FINDINGS if self.questions == "demo" else FINDING_NAMES


class ScanSeeds(TypedDict):
    """Seeds of `render_phantom`."""

    patient: int
    scan: int


@dataclass(frozen=True)
class Scan:
    """One scan of one patient with all its reconstructions, such as CT-RATE's `train_3_b`.

    Attributes:
        split: "train" or "valid".
        patient: number of the patient, from 1.
        letter: "a" or "b".
        reconstructions: how many.
        findings: {name: Finding}.
        statements: the sentences of the report.
        questions: multiple-choice questions.
        seeds: of `render_phantom`, all but that of the reconstruction.
    """

    split: str
    patient: int
    letter: str
    reconstructions: int
    findings: dict[str, Finding]
    statements: dict[str, str]
    questions: list[Question]
    seeds: ScanSeeds

    @property
    def scan_id(self) -> str:
        """Return the scan's name, such as train_3_b."""
        return f"{self.split}_{self.patient}_{self.letter}"

    @property
    def volumes(self) -> list[str]:
        """Return the file names of the reconstructions, `train_3_b_1.nii.gz` and so on."""
        return [f"{self.scan_id}_{k + 1}.nii.gz" for k in range(self.reconstructions)]

    def path(self, volume: str) -> str:
        """Return the path of a volume below the data set's root."""
        return f"{SPLITS[self.split][0]}/{self.split}_{self.patient}/{self.scan_id}/{volume}"


def seeded(*keys: int) -> int:
    """Return one seed made of several integers."""
    return int(np.random.SeedSequence(keys).generate_state(1, np.uint64)[0] >> 1)


def plan_patient(settings: PhantomSettings, split: str, patient: int) -> list[Scan]:
    """Draw everything about a patient except the voxels.

    Args:
        settings: of the set.
        split: "train" or "valid".
        patient: number of the patient, from 1.
    """
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
                questions=ask_all(rng, findings, settings.asked),
                seeds={"patient": seeded(*keys, 3), "scan": seeded(*keys, 4, number)},
            )
        )
    return scans


def reconstruction_seed(scan: Scan, number: int) -> int:
    """Return the seed of the grid, the noise and the stored orientation of a scan's reconstruction, counted from 0."""
    return seeded(scan.seeds["scan"], number)
