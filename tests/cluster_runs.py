"""Runs of preprocess.py over a few phantoms, and what they leave in the cache directory."""

import json
from collections import Counter
from pathlib import Path

import numpy as np

from samf import preprocess
from samf.phantoms.dataset import make_phantom, write_nifti

SMALL = ("--slices_per_plane=2", "--image_size=16")


def save_phantoms(folder: Path, names: list[str]) -> list[Path]:
    folder.mkdir(parents=True)
    phantom = make_phantom(np.random.default_rng(0), voxel_mm=14)
    for number, name in enumerate(names):
        noise = np.random.default_rng(number).integers(-20, 20, phantom.hu.shape, dtype=np.int16)
        write_nifti(type(phantom)(phantom.hu + noise, phantom.affine, {}, {}), folder / f"{name}.nii.gz")
    return [folder / f"{name}.nii.gz" for name in names]


def entries(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.glob("??/*.safetensors")}


def manifest(cache: Path) -> dict:
    return json.loads((cache / "manifest.json").read_text(encoding="utf-8"))


def failures(cache: Path) -> dict[str, str]:
    lines = (cache / "failures.jsonl").read_text(encoding="utf-8").splitlines()
    return {Path(row["volume"]).name.partition(".")[0]: row["error"] for row in map(json.loads, lines)}


def logged(cache: Path) -> Counter:
    lines = [line for file in (cache / "log").iterdir() for line in file.read_text(encoding="utf-8").splitlines()]
    return Counter(json.loads(line)["record"] for line in lines)


def run(folder: Path, cache: Path, *options: str) -> int:
    return preprocess.main([str(folder), f"--cache={cache}", *SMALL, *options])
