"""Scores of evidence against the masks of phantoms: pointing, slices, deletion and insertion."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np
import torch
from scipy import ndimage

from samf.model.ct_volume import CTVolume
from samf.model.evidence_samf import Evidence
from samf.model.explain_samf import ScanImages
from samf.model.heat_map_samf import HeatGrid, back_project, meet
from samf.model.sentence_likelihood_samf import SentenceLikelihood

STEPS = 8  # of deletion and insertion
RANDOM_ORDERS = 3
_BODY_HU = -300


class Case(TypedDict):
    """The scores of one finding of one phantom.

    Attributes:
        finding: its name.
        patient: number of the phantom.
        head: probability of the finding by the findings head; None without a head.
        log_probability: of the sentence that states it.
        distance_mm: from the map's maximum to the finding; None where the map is empty.
        hit: the distance is within the margin.
        chance: share of the body within the margin.
        weights: whether the point that the fusion's weights alone give is within the margin: where the slices with the
            largest alpha cross, or the scan's centre for a fusion type without alpha.
        shuffled: whether the maximum of the map of the same sentence and another patient's scan is within the margin.
        slice_hit: the top slice shows the finding.
        slice_chance: share of slices that show it.
        deletion: mean log-likelihood while slices are taken away by rank, minus that in random order; evidence is below 0.
        insertion: the same while they are added by rank; evidence is above 0.
    """

    finding: str
    patient: int
    head: float | None
    log_probability: float
    distance_mm: float | None
    hit: bool
    chance: float
    weights: bool
    shuffled: bool
    slice_hit: bool
    slice_chance: float
    deletion: float
    insertion: float


class MaskScorer:
    """Scores points and slices against the mask of one finding.

    Args:
        mask: bool (X, Y, Z), RAS+.
        volume: of the same grid.
        margin_mm: how far from the mask a point may be.
    """

    def __init__(self, mask: np.ndarray, volume: CTVolume, margin_mm: float):
        self.mask, self.volume, self.margin_mm = mask, volume, margin_mm
        self.distance = ndimage.distance_transform_edt(~mask, sampling=volume.spacing)  # mm

    def distance_of(self, mm: Sequence[float]) -> float:
        """Return the distance in mm of a point (3,), RAS+ mm, to the finding; outside the volume that of its border."""
        voxel = np.linalg.inv(self.volume.affine) @ [*mm, 1.0]
        return float(ndimage.map_coordinates(self.distance, voxel[:3, None], order=1, mode="nearest")[0])

    def chance(self) -> float:
        """Return the share of the body's voxels that are within the margin."""
        body = self.volume.hu > _BODY_HU
        filled = np.stack([ndimage.binary_fill_holes(image) for image in np.moveaxis(body, 2, 0)], axis=2)
        return float((self.distance[filled] <= self.margin_mm).mean())

    def slices_shown(self, images: ScanImages) -> np.ndarray:
        """Return which slices of the stack show the finding, bool (S,): any of it in the slab up to the next slices."""
        shown = np.zeros(len(images.slices), dtype=bool)
        for view in images.geometry.views:
            present = self.mask.any(axis=tuple(axis for axis in range(3) if axis != view.normal))
            middles = (view.depths[1:] + view.depths[:-1]) / 2
            nearest = np.searchsorted(middles, np.arange(len(present)))
            shown[view.slices[np.unique(nearest[present])]] = True
        return shown


def weights_point(images: ScanImages, evidence: Evidence) -> np.ndarray:
    """Return the point (3,), RAS+ mm, that the fusion's weights alone give."""
    geometry = images.geometry
    centre = (np.array(geometry.shape) - 1) / 2
    alpha = evidence.fusion_weights.get("alpha")
    if alpha is None:
        return geometry.to_mm(centre)
    grid = HeatGrid.over(geometry)
    heat = np.broadcast_to(np.array(alpha)[:, None, None], (len(alpha), 2, 2))
    together = meet(back_project(geometry, heat, grid.voxels()))
    largest = np.argwhere(together >= 0.999 * together.max())  # a line or a plane where a plane of slices is missing
    return geometry.to_mm(grid.voxel(largest.mean(axis=0)))


def order_effects(
    likelihood: SentenceLikelihood, slices: torch.Tensor, scores: Sequence[float], sentence: int, seed: int
) -> Mapping[str, float]:
    """Return `deletion` and `insertion` of a `Case`: by rank of the scores, against random orders.

    Args:
        likelihood: of the answer's sentences.
        slices: embeddings (S, D).
        scores: (S,) of the slices.
        sentence: number of the sentence.
        seed: of the random orders.
    """
    count = len(scores)
    ranked = np.argsort(-np.array(scores), kind="stable")
    rng = np.random.default_rng(seed)
    orders = [ranked, ranked[::-1], *(rng.permutation(count) for _ in range(RANDOM_ORDERS))]
    removed = [round(count * step / STEPS) for step in range(STEPS + 1)]
    keep = torch.ones(len(orders) * len(removed), count, dtype=torch.bool)
    for row, (order, number) in zip(keep, ((order, n) for order in orders for n in removed), strict=True):
        row[torch.from_numpy(order[:number].copy())] = False
    curves = likelihood(slices, keep)[:, sentence].float().cpu().view(len(orders), -1).mean(dim=1)
    by_chance = float(curves[2:].mean())
    # Taking away the last-ranked first leaves the first-ranked: insertion, read backwards.
    return {"deletion": float(curves[0]) - by_chance, "insertion": float(curves[1]) - by_chance}
