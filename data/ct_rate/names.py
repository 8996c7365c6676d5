"""CT-RATE's names: `valid_53_a_1.nii.gz` is reconstruction 1 of scan a of patient 53, and its path follows from the name."""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

Layout = Literal["v1", "v2"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_VOLUME_NAME = re.compile(
    r"(?P<split>[a-z]+)_(?P<patient>\d+)_(?P<scan>[a-z]+)_(?P<reconstruction>\d+)(?:\.nii(?:\.gz)?)?"
)
_PATIENT = re.compile(r"(?:^|/)((?:train|valid)_\d+)_")


@dataclass(frozen=True, order=True)
class VolumeName:
    """CT-RATE's name of a volume: `valid_53_a_1.nii.gz` is reconstruction 1 of scan a of patient 53."""

    split: str
    patient: int
    scan: str
    reconstruction: int

    @classmethod
    @lru_cache(maxsize=1 << 16)
    def parse(cls, name: str) -> "VolumeName":
        """Parse a name with or without folders and suffix. Raises ValueError for any other name."""
        match = _VOLUME_NAME.fullmatch(name.strip().replace("\\", "/").rsplit("/", 1)[-1])
        if match is None:
            raise ValueError(f"{name!r} is not a CT-RATE volume name; expected one like valid_53_a_1.nii.gz.")
        return cls(match["split"], int(match["patient"]), match["scan"], int(match["reconstruction"]))

    @classmethod
    def find(cls, name: str) -> "VolumeName | None":
        """Parse a name as `parse` does; return None for any other name."""
        try:
            return cls.parse(name)
        except ValueError:
            return None

    @property
    def patient_id(self) -> str:
        """Return the patient's pseudonym, such as valid_53."""
        return f"{self.split}_{self.patient}"

    @property
    def scan_id(self) -> str:
        """Return the scan's name, such as valid_53_a."""
        return f"{self.split}_{self.patient}_{self.scan}"

    def __str__(self) -> str:
        return f"{self.scan_id}_{self.reconstruction}.nii.gz"


def patient_of_id(name: str) -> str | None:
    """Return the patient that the id of a scan, a record or a question begins with; None where it names none.

    Less strict than `VolumeName`, which decides for paths of volumes: other data sets have files like train_1_0001.nii.gz.
    """
    match = _PATIENT.search(name)
    return match[1] if match else None


def volume_location(name: str, layout: Layout = "v2") -> str:
    """Return the path of a volume below the data set's root.

    Args:
        name: a volume's name; its folders, if it has any, are ignored.
        layout: "v2" for `valid_fixed/valid_53/valid_53_a/valid_53_a_1.nii.gz`, "v1" for the same below `valid`.
    """
    volume = VolumeName.parse(name)
    folder = {"v1": volume.split, "v2": f"{volume.split}_fixed"}[layout]
    return f"{folder}/{volume.patient_id}/{volume.scan_id}/{volume}"


def volume_path(root: str | Path, name: str, layout: Layout = "v2") -> Path:
    """Return `volume_location` below a folder.

    Args:
        root: the data set's root.
        name: a volume's name.
        layout: "v1" or "v2".
    """
    return Path(root) / volume_location(name, layout)


def volume_stem(name: str) -> str:
    """Return a volume's file name without folders and suffix."""
    return re.sub(r"\.nii(\.gz)?$", "", name.rsplit("/", 1)[-1])
