"""Lines that read volumes: DICOM series and kinds of files → slices, and caches of slices."""

import hashlib
import os
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np

from samf.benchmarks import dicom_lines, format_lines
from samf.benchmarks.build_lines.plan import Inputs, Target, Workload
from samf.benchmarks.cache_lines import LISTED, write_volumes
from samf.benchmarks.volume_lines import MOST_MEMORY, scan_file
from samf.benchmarks.workloads import Settings

# What earlier benchmarks aim at: multiples of decompression, and of the scan in int16.
_MOST_OF_UNPACKING, _MOST_OF_SERIES, _MOST_OF_FILE = 1.5, 1.3, 1.2
_PLAIN = "int16"
_KINDS = {
    _PLAIN: None,
    "slope": "slope",
    "float32": "float",
    "oblique": "oblique",
    ".mha": "MetaImage",
    ".nrrd": "NRRD",
}
_SMALL_MM, _SMALL_VOXELS, _SMALL_SLICES = 8.0, 30, 3
_FILLED, _FILL_ROUNDS = 16, 3


def read_series(inputs: Inputs) -> list[Workload]:
    """Read a DICOM series of 300 files, uncompressed and packed in each way that imagecodecs can write here."""
    settings = inputs.settings(inputs.shared)
    packed = [] if dicom_lines.imagecodecs is None else list(dicom_lines.PACKERS)
    series = {name: dicom_lines.series_folder(settings, name) for name in [dicom_lines.UNCOMPRESSED, *packed]}
    small = {name: _first_slices(folder, inputs.folder) for name, folder in series.items()}
    plain = dicom_lines.UNCOMPRESSED
    limit = _limit("reading the bytes", lambda: dicom_lines.read_bytes(series[plain]), settings)
    note = "" if packed else "compressed series need imagecodecs"
    memory = Target(memory=_MOST_OF_SERIES * _scan_megabytes(settings))
    return [
        _reading("series to slices", series, small, inputs.targets({plain: Target(limit=limit)}), note),
        *(
            _memory_of(name, series[name], small[name], inputs.targets({f"memory, {name}": memory}))
            for name in (plain, *packed[:1])
        ),
    ]


def read_files(inputs: Inputs) -> list[Workload]:
    """Read a scan from kinds of files."""
    settings = inputs.settings(inputs.shared)
    files = {
        name: format_lines.kind_file(settings, kind) if kind else scan_file(settings) for name, kind in _KINDS.items()
    }
    small = {name: _small_file(kind, inputs.folder / name) for name, kind in _KINDS.items()}
    times, memory = {}, {}
    for name, file in files.items():
        seconds = _seconds(lambda file=file: format_lines.unpack_any(file), settings)
        is_resampled = name == "oblique"  # onto the patient's axes, which takes memory and time of its own
        limit = f"{seconds:.2f} s of decompression"
        times[name] = Target(seconds=None if is_resampled else _MOST_OF_UNPACKING * seconds, limit=limit)
        share = MOST_MEMORY if name == _PLAIN else _MOST_OF_FILE
        memory[name] = Target(memory=None if is_resampled else share * _scan_megabytes(settings))
    return [
        _reading("file to slices", files, small, inputs.targets(times)),
        *(
            _memory_of(name, files[name], small[name], inputs.targets({f"memory, {name}": memory[name]}))
            for name in files
        ),
    ]


def fill_caches(inputs: Inputs) -> list[Workload]:
    """Fill a cache with copies of a scan by one and by two workers, and resume one of 47,000 volumes."""
    settings = inputs.settings(inputs.shared)
    scan, count, listed = scan_file(settings), 2 if inputs.is_tiny else _FILLED, LISTED[settings.size]
    scans, many = inputs.folder / "scans", inputs.folder / "many"
    write_volumes(scans, count, scan)
    write_volumes(many, listed, scan)
    task = {"data": str(many), "write": False}
    resume = inputs.targets({"list and resume": Target(seconds=5, memory=200)})
    return [
        *(
            Workload(
                f"preprocess.py, {count} scans, {workers} worker{'s' * (workers > 1)}",
                command=["{samf}/preprocess.py", str(scans), "--cache", "{out}/cache", "--num_workers", str(workers)],
                read_results=_entry_digests,
                rounds=_FILL_ROUNDS,
                threads=1,
            )
            for workers in (1, 2)
        ),
        Workload(
            "resume",
            program="resume_cache",
            task=task,
            prepare={**task, "write": True},
            rounds=1,
            targets=resume,
            note=f"{listed:,} volumes, all of whose entries exist",
        ),
    ]


def _reading(
    name: str, volumes: Mapping[str, Path], small: Mapping[str, Path], targets: Mapping[str, Target], note: str = ""
) -> Workload:
    """Return a workload that reads volumes, each after a small one of its kind."""
    task = {"volumes": _texts(volumes), "small": _texts(small), "memory": False}
    return Workload(name, program="read_volumes", task=task, targets=targets, note=note)


def _memory_of(name: str, volume: Path, small: Path, targets: Mapping[str, Target]) -> Workload:
    """Return a workload that measures the memory that one volume adds, in a process of its own."""
    figure = f"memory, {name}"
    task = {"volumes": {figure: str(volume)}, "small": {figure: str(small)}, "memory": True}
    return Workload(figure, program="read_volumes", task=task, targets=targets, rounds=1, is_for_memory=True)


def _texts(paths: Mapping[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in paths.items()}


def _first_slices(series: Path, folder: Path) -> Path:
    """Return a folder with the first slices of a series."""
    small = folder / f"small_{series.name}"
    small.mkdir(parents=True)
    for file in sorted(series.iterdir())[:_SMALL_SLICES]:
        os.link(file, small / file.name)
    return small


def _small_file(kind: str | None, stem: Path) -> Path:
    """Return a small volume of a kind of `format_lines`, or in plain int16."""
    hu = np.full((_SMALL_VOXELS,) * 3, -1000, dtype=np.int16)
    affine = np.diag([-_SMALL_MM, -_SMALL_MM, _SMALL_MM, 1.0])
    if kind is None:
        path = stem.with_name(f"small_{stem.name}.nii.gz")
        nib.save(nib.Nifti1Image(hu, affine), path)
        return path
    suffix, write = format_lines.WRITERS[kind]
    path = stem.with_name(f"small_{kind}{suffix}")
    write(hu, affine, path)
    return path


def _scan_megabytes(settings: Settings) -> float:
    return float(np.prod(nib.load(scan_file(settings)).shape) * np.dtype(np.int16).itemsize / 1e6)


def _seconds(task: Callable[[], None], settings: Settings) -> float:
    return statistics.median(settings.stopwatch.seconds(task) for _ in range(3))


def _limit(what: str, task: Callable[[], None], settings: Settings) -> str:
    return f"{_seconds(task, settings):.2f} s of {what}"


def _entry_digests(out: Path) -> list[str]:
    """Return digests of the entries of a cache; their names are a build's own."""
    entries = (out / "cache").rglob("*.safetensors")
    return sorted(hashlib.sha256(entry.read_bytes()).hexdigest() for entry in entries)
