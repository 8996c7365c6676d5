"""Benchmarks of reading slices from a scan: time against decompression and the reference implementation, memory, cache.

The scan is a `.nii.gz` of 512 x 512 x 300 int16 voxels: the largest CT of `$SAMF_TEST_DATA/ct` enlarged, or a phantom.
"""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm import tqdm

from samf.benchmarks.measuring import Measurement, ratios, resident
from samf.benchmarks.workloads import Settings
from samf.cache.slice_cache import SliceCache
from samf.model.ct_volume import CTVolume, read_ct
from samf.model.image_processing_samf import SamfImageProcessor
from samf.phantoms.volume import make_phantom
from samf.training.memory import peak_resident

try:
    from isal import igzip
except ImportError:
    igzip = None

SHAPES = {"full": (512, 512, 300), "tiny": (48, 40, 30)}
ROUNDS = 5  # at least
PIECE = 1 << 20
PHANTOM_MM = {"full": 2.5, "tiny": 8.0}
REFERENCE_SLICES, REFERENCE_REACH, REFERENCE_SIZE = 24, 72, 224
MOST_OF_UNPACKING, MOST_WITH_SLABS, LEAST_OF_REFERENCE = 1.5, 2.5, 1.7
MOST_MEMORY, LEAST_FROM_CACHE = 1.5, 50


# --- The scan ---------------------------------------------------------------------------------------------------------


def find_source(settings: Settings) -> CTVolume:
    """Return the CT with the largest file in `$SAMF_TEST_DATA/ct`, or a phantom; always a phantom at size "tiny"."""
    folder = Path(os.environ.get("SAMF_TEST_DATA", "")) / "ct"
    if settings.size == "full" and folder.is_dir() and (files := [file for file in folder.iterdir() if file.is_file()]):
        return read_ct(max(files, key=lambda file: file.stat().st_size))
    phantom = make_phantom(np.random.default_rng(0), voxel_mm=PHANTOM_MM[settings.size])
    return CTVolume(phantom.hu, phantom.spacing, phantom.affine, "a phantom")


def enlarge(volume: CTVolume, shape: tuple[int, int, int]) -> np.ndarray:
    """Resample a volume to `shape` (int16) over the same field of view, keeping its noise and so its compressibility.

    Each voxel is drawn at random from those around its position in the slice, so that no two rows are equal. Slices repeat,
    but at a distance beyond gzip's window.
    """
    rng = np.random.default_rng(0)
    hu = np.empty(shape, dtype=np.int16, order="F")
    for k in tqdm(range(shape[2]), desc="enlarge", leave=False):
        x, y = (
            (np.indices(shape[:2], sparse=True)[axis] + rng.random(shape[:2])) * volume.shape[axis] / shape[axis]
            for axis in (0, 1)
        )
        hu[:, :, k] = volume.hu[x.astype(int), y.astype(int), k * volume.shape[2] // shape[2]]
    return hu


def scan_file(settings: Settings) -> Path:
    """Return the scan in the stage's folder; write it if it doesn't exist."""
    path = settings.folder / "scan.nii.gz"
    if not path.exists():
        source, shape = find_source(settings), SHAPES[settings.size]
        hu = enlarge(source, shape)
        spacing = np.array(source.spacing) * source.shape / shape
        # Stored like most scanners' files: the first two axes run to the left and to the back.
        image = nib.Nifti1Image(hu[::-1, ::-1], np.diag([-spacing[0], -spacing[1], spacing[2], 1.0]))
        image.header["descrip"] = Path(source.source).name.encode()[:79]
        nib.save(image, path)
    return path


def write_scan(settings: Settings) -> list[Measurement]:
    """Write the scan; in its own process, since that takes memory."""
    path = scan_file(settings)
    image = nib.load(path)
    made_of = bytes(image.header["descrip"]).rstrip(b"\0").decode(errors="replace")
    note = f"{' x '.join(map(str, image.shape))} int16 voxels, made of {made_of}"
    return [
        Measurement("scan in memory", "MB", [_voxel_bytes(path) / 1e6], note=note),
        Measurement("scan on disk", "MB", [path.stat().st_size / 1e6], note=".nii.gz"),
    ]


def _voxel_bytes(path: Path) -> int:
    return int(np.prod(nib.load(path).shape)) * np.dtype(np.int16).itemsize


# --- Speed ------------------------------------------------------------------------------------------------------------


def unpack(path: Path) -> None:
    """Decompress a file piece by piece into one small buffer, by isal if it is installed."""
    piece = memoryview(bytearray(PIECE))
    with (igzip or gzip).open(path) as stream:
        while stream.readinto(piece):
            pass


def reference_slices(path: Path) -> np.ndarray:
    """Read slices like the reference implementation: the whole volume in float64, the middle axial slices through Pillow.

    Returns:
        uint8 (24, 224, 224).
    """
    volume = nib.load(path).get_fdata()  # (X, Y, Z)
    middle, last = volume.shape[2] // 2, volume.shape[2] - 1
    places = np.linspace(max(0, middle - REFERENCE_REACH), min(last, middle + REFERENCE_REACH), REFERENCE_SLICES)
    slices = [Image.fromarray(volume[:, :, k].astype(np.int64).astype(np.uint8)) for k in places.astype(int)]
    return np.stack([np.asarray(s.resize((REFERENCE_SIZE,) * 2, Image.Resampling.BICUBIC)) for s in slices])


def time_slices(settings: Settings) -> list[Measurement]:
    """Time the whole path from the file to the slices of three planes, with and without slabs of the body."""
    path = scan_file(settings)
    plain = SamfImageProcessor()
    slabs = {slab: SamfImageProcessor(field="body", slab=slab) for slab in ("mean", "mip")}
    tasks = {
        "unpacking": lambda: unpack(path),
        "plain": lambda: plain.extract(read_ct(path)),
        **{slab: lambda slab=slab: slabs[slab].extract(read_ct(path)) for slab in slabs},
        "reference": lambda: reference_slices(path),
    }
    times = settings.stopwatch.in_turns(tasks, "slices", ROUNDS)
    name, over = f"{plain.num_slices} slices", {task: ratios(times[task], times["unpacking"]) for task in tasks}
    library = "isal" if igzip is not None else "zlib, since isal isn't installed"
    return [
        Measurement("unpacking only", "s", times["unpacking"], note=library),
        Measurement(f"file to {name}", "s", times["plain"], note="field full, slab none"),
        *(Measurement(f"file to {name}, {slab}", "s", times[slab], note=f"field body, slab {slab}") for slab in slabs),
        Measurement(
            "reference implementation", "s", times["reference"], note=f"float64, {REFERENCE_SLICES} slices, one window"
        ),
        Measurement(f"{name} / unpacking", "x", over["plain"], at_most=settings.limit(MOST_OF_UNPACKING)),
        *(
            Measurement(f"{name}, {slab} / unpacking", "x", over[slab], at_most=settings.limit(MOST_WITH_SLABS))
            for slab in slabs
        ),
        Measurement(
            f"reference implementation / {name}",
            "x",
            ratios(times["reference"], times["plain"]),
            settings.limit(LEAST_OF_REFERENCE),
        ),
    ]


def time_cache(settings: Settings) -> list[Measurement]:
    """Time reading slices from the cache, every byte of them, against the whole path.

    Raises:
        RuntimeError: the cache's slices differ from the file's.
    """
    path, processor = scan_file(settings), SamfImageProcessor()
    cache = SliceCache(settings.folder / "cache", processor)
    if not np.array_equal(cache.get(path)["slices"], processor.extract(read_ct(path))["slices"]):
        raise RuntimeError("The cache's slices differ from the file's.")
    tasks = {"cache": lambda: np.array(cache.get(path)["slices"]), "file": lambda: processor.extract(read_ct(path))}
    times = settings.stopwatch.in_turns(tasks, "cache", ROUNDS)
    return [
        Measurement("from the cache", "ms", [1e3 * seconds for seconds in times["cache"]], note="every byte read"),
        Measurement("file / cache", "x", ratios(times["file"], times["cache"]), settings.limit(LEAST_FROM_CACHE)),
    ]


# --- Memory -----------------------------------------------------------------------------------------------------------


def measure_memory(settings: Settings) -> list[Measurement]:
    """Measure the memory that the whole path adds to a process that has imported everything and read a tiny scan."""
    return _measure_memory(settings, SamfImageProcessor())


def measure_slab_memory(settings: Settings) -> list[Measurement]:
    """Measure the same memory with mean slabs of the body."""
    return _measure_memory(settings, SamfImageProcessor(field="body", slab="mean"))


def _measure_memory(settings: Settings, processor: SamfImageProcessor) -> list[Measurement]:
    path, tiny = scan_file(settings), settings.folder / "tiny.nii.gz"
    phantom = make_phantom(np.random.default_rng(0), voxel_mm=PHANTOM_MM["tiny"])
    nib.save(nib.Nifti1Image(phantom.hu, phantom.affine), tiny)
    processor.extract(read_ct(tiny))
    before = resident()
    processor.extract(read_ct(path))
    grown = peak_resident() - before
    note = f"field {processor.field}, slab {processor.slab}"
    return [
        Measurement("memory added", "MB", [grown / 1e6], note=note),
        Measurement("memory added / scan", "x", [grown / _voxel_bytes(path)], at_most=settings.limit(MOST_MEMORY)),
    ]
