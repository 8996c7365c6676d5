"""CT-RATE's names: `valid_53_a_1.nii.gz` is reconstruction 1 of scan a of patient 53, and lies where its name says."""

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

LAYOUTS = ("v1", "v2")

VOLUME_NAME = re.compile(
    r"(?P<split>[a-z]+)_(?P<patient>\d+)_(?P<scan>[a-z]+)_(?P<reconstruction>\d+)(?:\.nii(?:\.gz)?)?"
)


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
        """Read a name with or without folders and suffix. Raises ValueError for anything else."""
        match = VOLUME_NAME.fullmatch(name.strip().replace("\\", "/").rsplit("/", 1)[-1])
        if match is None:
            raise ValueError(f"{name!r} is not a CT-RATE volume name; expected one like valid_53_a_1.nii.gz.")
        return cls(match["split"], int(match["patient"]), match["scan"], int(match["reconstruction"]))

    @classmethod
    def find(cls, name: str) -> "VolumeName | None":
        """As `parse`, None for any other name."""
        try:
            return cls.parse(name)
        except ValueError:
            return None

    @property
    def patient_id(self) -> str:
        return f"{self.split}_{self.patient}"

    @property
    def scan_id(self) -> str:
        return f"{self.split}_{self.patient}_{self.scan}"

    def __str__(self) -> str:
        return f"{self.scan_id}_{self.reconstruction}.nii.gz"


def volume_location(name: str, layout: str = "v2") -> str:
    """Where a volume lies below the data set's root: v2 `valid_fixed/valid_53/valid_53_a/valid_53_a_1.nii.gz`, v1 the
    same below `valid`. `name` may be flat or with folders, which are ignored."""
    volume = VolumeName.parse(name)
    folder = {"v1": volume.split, "v2": f"{volume.split}_fixed"}[layout]
    return f"{folder}/{volume.patient_id}/{volume.scan_id}/{volume}"


def volume_path(root: str | Path, name: str, layout: str = "v2") -> Path:
    """`volume_location` below the folder `root`."""
    return Path(root) / volume_location(name, layout)


def volume_stem(name: str) -> str:
    """A volume's file name without folders and suffix."""
    return re.sub(r"\.nii(\.gz)?$", "", name.rsplit("/", 1)[-1])
