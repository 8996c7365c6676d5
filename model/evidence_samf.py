"""What of a scan each sentence of a report rests on: slices, places in them, and a 3-D heat map."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .heat_map_samf import resample_heat, save_heat
from .slice_geometry import Plane

NAME_ENDING = ".evidence.nii.gz"


@dataclass(frozen=True)
class Place:
    """A point of a scan.

    Attributes:
        ras_mm: scanner coordinates in mm, to the patient's right, front and head (NIfTI's).
        lps_mm: the same point to the patient's left, back and head (DICOM's).
        voxel: nearest index (X, Y, Z) in the RAS+ array that `read_ct` returns.
        stored_voxel: nearest index in the file's own array; outside it where the volume was resampled with margins of air.
    """

    ras_mm: tuple[float, float, float]
    lps_mm: tuple[float, float, float]
    voxel: tuple[int, int, int]
    stored_voxel: tuple[int, int, int]


@dataclass(frozen=True)
class SliceEvidence:
    """A slice that a sentence rests on.

    Attributes:
        number: in the stack that the model read, from 0.
        plane: "axial", "coronal" or "sagittal".
        index: voxel index along the plane's normal in the RAS+ array.
        mm: coordinate of the slice along the plane's normal, RAS+.
        score: share of the sentence's log-likelihood in nats; see `Evidence.slice_method`.
        place: maximum of the slice's heat; None where the slice has none.
    """

    number: int
    plane: str
    index: int
    mm: float
    score: float
    place: Place | None = None


@dataclass(frozen=True, eq=False)
class SliceHeat:
    """One slice of each plane through the maximum of a sentence's heat, for the sheet; they are not part of the JSON.

    Attributes:
        numbers: (N,) of the slices in the stack.
        planes: of the slices.
        mm: (N,) coordinate of each slice along its plane's normal, RAS+.
        marks: (N, 2) row and column of the heat map's maximum in each image, in pixels.
        images: uint8 (N, C, size, size), the windowed slices.
        heat: float32 (N, size, size) in [0, 1], in proportion to the largest value on any slice.
        oriented: whether the images are in patient orientation.
    """

    numbers: np.ndarray
    planes: tuple[Plane, ...]
    mm: np.ndarray
    marks: np.ndarray
    images: np.ndarray
    heat: np.ndarray
    oriented: bool = True


@dataclass(frozen=True)
class SentenceEvidence:
    """What one sentence rests on.

    Attributes:
        text: the sentence.
        log_probability: with all slices, given the prompt and what precedes the sentence.
        without_volume: its log-probability by a prompt without any slice; None where it was not computed.
        slice_scores: (S,), for each slice of the stack its share of the log-likelihood in nats: positive where the slice
            speaks for the sentence, negative where it speaks against it.
        top_slices: the slices with the largest scores, in order.
        peak: maximum of the heat map; None without one.
        heat: float32 (X, Y, Z) in [0, 1] on the evidence's grid; not part of the JSON.
        slice_heat: images of top slices; not part of the JSON.
    """

    text: str
    log_probability: float
    without_volume: float | None
    slice_scores: tuple[float, ...]
    top_slices: tuple[SliceEvidence, ...]
    peak: Place | None = None
    heat: np.ndarray | None = field(default=None, compare=False, repr=False)
    slice_heat: SliceHeat | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the evidence as plain values, without arrays."""
        values = dataclasses.asdict(dataclasses.replace(self, heat=None, slice_heat=None))
        del values["heat"], values["slice_heat"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SentenceEvidence":
        """Return the evidence that `to_dict` gave, without arrays."""
        slices = tuple(SliceEvidence(**{**found, "place": _place(found["place"])}) for found in values["top_slices"])
        known = {**values, "slice_scores": tuple(values["slice_scores"]), "top_slices": slices}
        return cls(**{**known, "peak": _place(values["peak"])})


@dataclass(frozen=True)
class Evidence:
    """What the sentences of one report, or of one answer, rest on. It explains the model, not the patient.

    Attributes:
        slice_method: how `slice_scores` were found, in words.
        place_method: how the heat was found, in words.
        sentences: one per sentence of the text, in order.
        fusion_weights: softmax weights of the fusion, which are no evidence: `alpha` and `gamma` (mean over the prompt's
            tokens) per slice, `beta` and `slice_text` (mean over slices) per token of the prompt.
        grid_shape, grid_affine: of the heat maps; cell index → RAS+ millimetres, (4, 4) by rows.
        scan_shape, scan_affine: of the file's own array, likewise.
        files: names of the files that `save` wrote next to the JSON.
    """

    slice_method: str
    place_method: str
    sentences: tuple[SentenceEvidence, ...]
    fusion_weights: Mapping[str, tuple[float, ...]]
    grid_shape: tuple[int, ...]
    grid_affine: tuple[tuple[float, ...], ...]
    scan_shape: tuple[int, ...]
    scan_affine: tuple[tuple[float, ...], ...]
    files: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the evidence as plain values, without arrays."""
        known = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {**known, "sentences": [sentence.to_dict() for sentence in self.sentences]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Evidence":
        """Return the evidence that `to_dict` gave, without arrays."""
        known: dict[str, Any] = {item.name: values[item.name] for item in dataclasses.fields(cls)}
        known |= {name: tuple(known[name]) for name in ("grid_shape", "scan_shape", "files")}
        known |= {name: tuple(map(tuple, known[name])) for name in ("grid_affine", "scan_affine")}
        known["fusion_weights"] = {name: tuple(row) for name, row in known["fusion_weights"].items()}
        known["sentences"] = tuple(map(SentenceEvidence.from_dict, known["sentences"]))
        return cls(**known)

    def maps(self) -> np.ndarray | None:
        """Return the heat maps (X, Y, Z, K) of the K sentences, zero where a sentence has none; None without arrays."""
        found = [sentence.heat for sentence in self.sentences]
        if all(heat is None for heat in found):
            return None
        empty = np.zeros(self.grid_shape, dtype=np.float32)
        return np.stack([empty if heat is None else heat for heat in found], axis=-1)

    def save_maps(self, folder: str | os.PathLike[str], name: str, on_scan_grid: bool = False) -> list[Path]:
        """Write the heat maps as NIfTI; they open in register with the scan in 3D Slicer, ITK-SNAP and NiiVue.

        Args:
            folder: where to write; made when missing.
            name: of the file, without `.evidence.nii.gz`.
            on_scan_grid: in place of one coarse 4-D file with a frame per sentence, write a file per sentence,
                `name`.evidence.1.nii.gz and so on, on the scan's own grid, which is hundreds of times finer.

        Returns:
            The files' paths; none where there are no maps.
        """
        maps, affine = self.maps(), np.array(self.grid_affine)
        if maps is None:
            return []
        if not on_scan_grid:
            return [save_heat(Path(folder) / f"{name}{NAME_ENDING}", maps, affine)]
        target = np.array(self.scan_affine)
        return [
            save_heat(
                Path(folder) / f"{name}.evidence.{number}.nii.gz",
                resample_heat(maps[..., number - 1], affine, self.scan_shape, target),
                target,
            )
            for number in range(1, maps.shape[-1] + 1)
        ]


def _place(values: Mapping[str, Sequence[Any]] | None) -> Place | None:
    if values is None:
        return None
    known: dict[str, Any] = {name: tuple(value) for name, value in values.items()}
    return Place(**known)
