"""The scans of folders and tables, split by patient into training and validation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from samf.cache.slice_cache import SliceCache
from samf.data.ct_rate.names import VolumeName
from samf.data.options import check_on_missing
from samf.data.patient_splits import refuse_common_patients, refuse_shared_folders
from samf.data.patients import patient_of, warn_of_unknown
from samf.data.source_arguments import SourceArguments
from samf.data.volume_discovery import FoundVolumes, SourceOptions, find_splits, join_found
from samf.model.ct_volume import VolumeRef
from samf.training.choices import OnErrorOption, check_choices
from samf.training.slice_filling import fill_slice_cache
from samf.utils.distributed import Processes


@dataclass(frozen=True)
class Scan:
    """One scan: its volumes, which are reconstructions of the same anatomy, and its patient."""

    scan_id: str
    patient: str
    volumes: tuple[VolumeRef, ...]


@dataclass
class ScanArguments(SourceArguments):
    """Options of a script that pretrains on scans: which of them, and what to do without them."""

    on_error: OnErrorOption = field(
        default="raise", metadata={"help": "unreadable CTs: raise an error, or skip and count them"}
    )
    on_missing: OnErrorOption = field(
        default="raise",
        metadata={"help": "volumes that a table names but that don't exist: raise an error, or skip and count them"},
    )
    pattern: list[str] = field(
        default_factory=list, metadata={"help": "files to use in folders: names (ct.nii.gz), or paths (*/ct/*)"}
    )
    valid_share: float = field(
        default=0.1, metadata={"help": "share of the patients to hold out where there is no validation split"}
    )

    def __post_init__(self) -> None:
        check_choices(self)
        self.check_source()


def find_scans(
    data: Sequence[str],
    *,
    on_missing: OnErrorOption = "raise",
    valid_share: float = 0.1,
    options: SourceOptions | None = None,
) -> dict[str, list[Scan]]:
    """Return the scans of folders and files as {"train": …, "valid": …}; no patient is in both.

    Args:
        data: Sources as for `search_volumes`. CT-RATE, as a folder or by its name on the Hub, has its own validation split,
            and so do tables with several splits; from other sources patients are held out.
        on_missing: Volumes that a table names but that don't exist: "raise" or "skip". Ignored with `options`.
        valid_share: Share of the patients to hold out where there is no validation split.
        options: How sources are searched, and which patient a volume belongs to.

    Raises:
        FileNotFoundError: There is no volume under one of `data`; says what is looked for.
        ValueError: There are too few patients to hold one out, or a patient is in both splits.
    """
    return _split_scans(
        _find_by_split(data, options or SourceOptions(on_missing=check_on_missing(on_missing))), valid_share
    )


def _find_by_split(data: Sequence[str], options: SourceOptions) -> dict[str, FoundVolumes]:
    """Return the volumes of all sources with their patients as {"train": …, "valid": …}. One process searches for all."""

    def search() -> dict[str, FoundVolumes]:
        parts: dict[str, list[FoundVolumes]] = {"train": [], "valid": []}
        for source in data:
            for split, part in find_splits(source, options).items():
                parts[split].append(part)
        found = {split: join_found(own) for split, own in parts.items()}
        unknown = sum(patient is None for own in found.values() for patient in own.patients.values())
        warn_of_unknown(", ".join(data), unknown, sum(len(own.volumes) for own in found.values()))
        return found

    return Processes().from_first(search)


def _split_scans(found: Mapping[str, FoundVolumes], valid_share: float) -> dict[str, list[Scan]]:
    """Group volumes into scans, and hold patients out where there is no validation split; see `find_scans`."""
    scans = {split: _group(own) for split, own in found.items()}
    if not scans["valid"]:
        paths = [volume.path for volume in found["train"].volumes]
        refuse_shared_folders({path: found["train"].patients.get(path) for path in paths})
        scans["train"], scans["valid"] = hold_out(scans["train"], valid_share)
    refuse_common_patients(*({scan.patient for scan in scans[split]} for split in ("train", "valid")))
    return scans


def readable_scans(
    data: Sequence[str], cache: SliceCache, *, on_error: OnErrorOption, valid_share: float, options: SourceOptions
) -> dict[str, list[Scan]]:
    """Fill a cache by all processes together, and return the scans whose slices it has then.

    Volumes that are no CT are removed before patients are held out, so that none of those held out is a mask.

    Args:
        data: As for `find_scans`.
        cache: Gets the slices.
        on_error: As for `fill_slice_cache`.
        valid_share: As for `find_scans`.
        options: As for `find_scans`.

    Raises:
        ValueError: A split has no readable volume, or as for `find_scans`.
    """
    found = _find_by_split(data, options)
    everything = join_found([found["train"], found["valid"]])
    kept = fill_slice_cache(cache, everything.volumes, on_error, searched=everything.searched)
    readable = {split: own.only(kept) for split, own in found.items()}
    if lost := [split for split, own in found.items() if own.volumes and not readable[split].volumes]:
        raise ValueError(
            f"{', '.join(data)}: no volume of the split {' and '.join(lost)} can be read; see the log above."
        )
    scans = _split_scans(readable, valid_share)
    for split, own in scans.items():
        Processes().check_equal(f"scans ({split})", len(own))
    return scans


def hold_out(scans: Sequence[Scan], share: float) -> tuple[list[Scan], list[Scan]]:
    """Return the scans without and with the held-out patients.

    `share` of the patients are held out, at least one, and the same ones for the same patients.

    Raises:
        ValueError: There is only one patient.
    """
    patients = sorted({scan.patient for scan in scans})
    if len(patients) < 2:
        raise ValueError(f"{len(patients)} patient: none can be held out. Give more than one scan.")
    count = min(max(1, round(share * len(patients))), len(patients) - 1)
    held = {patients[i] for i in np.random.default_rng(0).permutation(len(patients))[:count]}
    return [scan for scan in scans if scan.patient not in held], [scan for scan in scans if scan.patient in held]


def _group(found: FoundVolumes) -> list[Scan]:
    """Return one Scan for all reconstructions of it, by CT-RATE's names.

    With other names, a known patient's volumes are one Scan: they may be reconstructions of one scan or not, and contrast
    must not take two series of one patient for different people. A volume of an unknown patient is a scan of its own.
    """
    by_scan: dict[str, list[VolumeRef]] = {}
    patients: dict[str, str] = {}
    for volume in found.volumes:
        name, known = VolumeName.find(volume.path), found.patients.get(volume.path)
        scan = name.scan_id if name else (known or volume.path)
        by_scan.setdefault(scan, []).append(volume)
        patients.setdefault(scan, known or patient_of(volume.path))
    return [Scan(scan, patients[scan], tuple(volumes)) for scan, volumes in by_scan.items()]
