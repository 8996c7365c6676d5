"""Find what of a scan each sentence of a report rests on.

Slices. Occlusion: how much log-likelihood a sentence loses when slices are taken away, in contiguous blocks of a plane that
are divided where it matters; the slice encoder runs once. Fast: the gradient of the log-likelihood by a slice's embedding
times its difference from the scan's mean slice.

Places. A window of a slice is emptied, the slice is encoded again, and the change of its embedding is multiplied by the same
gradient: occlusion where it is cheap (one slice through the encoder, shared by all sentences), a first-order estimate where
it is not (the language model). The planes' heat then meets in one 3-D map.

The gradient is the mean over a path that begins at a scan of mean slices: a sentence that is certain has none of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers.utils import logging

from .ct_volume import CTVolume
from .evidence_samf import Evidence, Place, SentenceEvidence, SliceEvidence, SliceHeat
from .heat_map_samf import GRID_MM, HeatGrid, back_project, meet
from .sentence_likelihood_samf import SentenceLikelihood, tokenize_answer
from .slice_occlusion_samf import occlude_slices
from .slice_views_samf import ScanGeometry, SliceSettings
from .window_occlusion_samf import Encode, heat_of, in_batches, selected, window_losses

EvidenceMode = Literal["fast", "full"]
_PATIENCE = 5.0  # seconds before a progress bar appears
_SLICE_METHODS = {
    "full": "occlusion: nats of the sentence's log-likelihood lost without the slice",
    "fast": "integrated gradient: the slice's share of the nats gained over a scan of mean slices",
}
_PLACE_METHOD = (
    "windows of the slices emptied and encoded again, times the integrated gradient of the sentence's log-likelihood by the "
    "slice's embedding; geometric mean of the planes"
)


@dataclass(frozen=True)
class ScanImages:
    """The slice images of a scan as the model read them, and where they are.

    Attributes:
        slices: uint8 (S, C, size, size).
        geometry: of the scan.
        indices: (S,) voxel index of each slice along its plane's normal.
        mm: (S,) its coordinate, RAS+.
    """

    slices: np.ndarray
    geometry: ScanGeometry
    indices: np.ndarray
    mm: np.ndarray

    @classmethod
    def of(cls, volume: CTVolume, stack: Mapping[str, np.ndarray], image_processor: SliceSettings) -> "ScanImages":
        """Return the images of a volume.

        Args:
            volume: the volume.
            stack: what `SamfImageProcessor.extract` returned for it.
            image_processor: that extracted it.
        """
        geometry = ScanGeometry.of(volume, stack, image_processor)
        return cls(stack["slices"], geometry, stack["slice_indices"], stack["slice_mm"])


@dataclass(frozen=True)
class EvidenceOptions:
    """What evidence costs and how fine it is.

    Attributes:
        mode: "full" finds slices by occlusion, "fast" by gradient; both find places.
        blocks: of slices per plane that occlusion begins with.
        refined: blocks per sentence that each round of it divides.
        steps: of the path over which the gradient is averaged.
        searched: slices per plane in which places are sought; the others get no heat. None = 12, or 4 in the mode "fast".
        windows: along a side of a slice.
        shown: slices per sentence that are listed, and drawn in the sheet.
        cell_mm: cells of the heat map.
        rows: prompts in one forward pass of the language model.
        images: slices in one forward pass of the slice encoder.
    """

    mode: EvidenceMode = "full"
    blocks: int = 4
    refined: int = 2
    steps: int = 4
    searched: int | None = None
    windows: int = 7
    shown: int = 6
    cell_mm: float = GRID_MM
    rows: int = 4
    images: int = 32

    @property
    def searched_slices(self) -> int:
        """Return the slices per plane in which places are sought."""
        return self.searched or (12 if self.mode == "full" else 4)

    def __post_init__(self) -> None:
        if self.mode not in _SLICE_METHODS:
            raise ValueError(f"evidence={self.mode!r}; it must be one of {', '.join(_SLICE_METHODS)}.")


class Explainer:
    """Finds the evidence of answers by one model.

    Args:
        model: a `SamfForConditionalGeneration`.
        processor: its `SamfProcessor`.
        options: cost and fineness.
        before_pass: called before each pass of the slice encoder or the language model, of which there are hundreds; what
            it raises ends the search, as someone who no longer waits for the evidence wants.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        options: EvidenceOptions = EvidenceOptions(),
        before_pass: Callable[[], object] | None = None,
    ):
        self.model, self.processor, self.options = model, processor, options
        self.before_pass = before_pass or (lambda: None)

    def explain(self, images: ScanImages, features: Mapping[str, np.ndarray], answer: str, question: str) -> Evidence:
        """Return the evidence of an answer's sentences.

        Args:
            images: of the scan.
            features: `slice_embeddings` (S, D), `slice_planes` and `slice_positions` (S,), as the pipeline encodes a scan.
            answer: the report or answer; not necessarily the model's own.
            question: what it answers.

        Raises:
            ValueError: the answer has no text, or the language model has no backward pass.
        """
        tokens = tokenize_answer(self.processor, features, answer, question)
        likelihood = SentenceLikelihood(self.model, tokens, features, self.options.rows, self.before_pass)
        slices = torch.as_tensor(features["slice_embeddings"]).to(self.model.device)
        whole, weights = likelihood.with_weights(slices)
        mean = slices.mean(dim=0, keepdim=True).expand_as(slices)
        gradients = likelihood.gradients(slices, mean, self.options.steps)  # (K, S, D)
        planes = np.asarray(features["slice_planes"])
        scores = torch.einsum("ksd,sd->ks", gradients, (slices - mean).to(gradients.dtype)).cpu().numpy()
        searched = list(selected(scores, planes, self.options.searched_slices))
        heat = self._slice_heat(torch.from_numpy(images.slices), slices, gradients, searched)
        without: list[float | None] = [None] * len(scores)
        if self.options.mode == "full":
            found = occlude_slices(
                likelihood, slices, torch.as_tensor(planes), self.options.blocks, self.options.refined
            )
            scores, without = found.scores.numpy(), found.without.tolist()
        grid = HeatGrid.over(images.geometry, self.options.cell_mm)
        texts = [tokens.text[start:end] for start, end in tokens.spans]
        sentences = [
            self._sentence(images, grid, *parts)
            for parts in zip(texts, whole.tolist(), without, scores, heat, strict=True)
        ]
        return Evidence(
            slice_method=_SLICE_METHODS[self.options.mode],
            place_method=_PLACE_METHOD,
            sentences=tuple(sentences),
            fusion_weights=fusion_weights(weights, tokens.prompt_mask),
            grid_shape=grid.shape,
            grid_affine=_rows(grid.affine),
            scan_shape=tuple(images.geometry.stored_shape),
            scan_affine=_rows(images.geometry.stored_affine),
        )

    def _encoder(self) -> Encode:
        """Return the slice encoder as a function of uint8 images (N, C, H, W)."""

        def encode(images: torch.Tensor) -> torch.Tensor:
            self.before_pass()
            pixels = self.processor.image_processor.normalize_(images.to(self.model.device, torch.float32))
            with torch.inference_mode():
                return self.model.model.encode_slices(pixels[None]).last_hidden_state[0].float()

        return in_batches(encode, self.options.images)

    def _slice_heat(
        self, pixels: torch.Tensor, slices: torch.Tensor, gradients: torch.Tensor, searched: Sequence[int]
    ) -> np.ndarray:
        """Return the heat (K, S, windows + 1, windows + 1) of the searched slices, zero elsewhere.

        Args:
            pixels: uint8 (S, C, H, W).
            slices: embeddings (S, D).
            gradients: (K, S, D).
            searched: numbers of slices.
        """
        encode, windows, cells = self._encoder(), self.options.windows, self.options.windows + 1
        losses = [
            window_losses(encode, pixels[number], slices[number], gradients[:, number], windows)
            for number in logging.tqdm(searched, desc="evidence", unit="slice", leave=False, delay=_PATIENCE)
        ]
        per_sentence = np.stack(losses, axis=2).swapaxes(0, 1)  # (K, FILLS, searched, windows, windows)
        heat = np.zeros((len(gradients), len(slices), cells, cells), dtype=np.float32)
        for own, found in zip(heat, per_sentence, strict=True):
            own[list(searched)] = heat_of(found)
        return heat

    def _sentence(
        self,
        images: ScanImages,
        grid: HeatGrid,
        text: str,
        whole: float,
        without: float | None,
        scores: np.ndarray,
        heat: np.ndarray,
    ) -> SentenceEvidence:
        """Return the evidence of one sentence.

        Args:
            images: of the scan.
            grid: of the map.
            text: of the sentence.
            whole: its log-likelihood with all slices.
            without: and without the volume.
            scores: (S,) of the slices.
            heat: (S, h, w).
        """
        together = meet(back_project(images.geometry, heat, grid.voxels()))
        cell = np.array(np.unravel_index(int(together.argmax()), together.shape))
        top = np.argsort(-scores, kind="stable")[: self.options.shown]
        return SentenceEvidence(
            text=text,
            log_probability=whole,
            without_volume=without,
            slice_scores=tuple(float(score) for score in scores),
            top_slices=tuple(slice_evidence(images, number, float(scores[number]), heat) for number in top),
            peak=place_of(images.geometry, grid.voxel(cell)) if together.max() > 0 else None,
            heat=together,
            slice_heat=slice_images(images, heat, grid.voxel(cell)),
        )


def fusion_weights(weights: Mapping[str, torch.Tensor], prompt_mask: torch.Tensor) -> dict[str, tuple[float, ...]]:
    """Return the fusion's softmax weights of one row as plain numbers; see `Evidence.fusion_weights`.

    Args:
        weights: fields of `SamfSliceAttentions` that are not None.
        prompt_mask: (T,) bool, the text that the fusion reads.
    """
    mask = prompt_mask.to(next(iter(weights.values())).device) if weights else prompt_mask
    rows = {}
    for name, weight in weights.items():
        if name == "gamma":
            rows[name] = weight[0][mask].mean(dim=0)
        elif name == "slice_text":
            rows[name] = weight[0].mean(dim=0)[mask]
        else:
            rows[name] = weight[0, 0] if name == "alpha" else weight[0, 0][mask]
    return {name: tuple(row.float().tolist()) for name, row in rows.items()}


def place_of(geometry: ScanGeometry, voxel: np.ndarray) -> Place:
    """Return the place of a voxel index (3,), which may be a fraction."""
    x, y, z = (round(float(value), 2) for value in geometry.to_mm(voxel))
    nearest = np.rint(voxel).astype(int).clip(0, np.array(geometry.shape) - 1).tolist()
    stored = np.rint(geometry.to_stored(voxel)).astype(int).tolist()
    return Place((x, y, z), (-x, -y, z), tuple(nearest), tuple(stored))


def slice_evidence(images: ScanImages, number: int, score: float, heat: np.ndarray) -> SliceEvidence:
    """Return a slice with its score and the place of its largest heat.

    Args:
        images: of the scan.
        number: of the slice in the stack.
        score: of the sentence.
        heat: (S, h, w) of the sentence.
    """
    view, within = images.geometry.view_of(number)
    own, place = heat[number], None
    if own.max() > 0:
        row, column = np.unravel_index(int(own.argmax()), own.shape)
        pixels = [
            (index + 0.5) * images.geometry.size / cells - 0.5
            for index, cells in zip((row, column), own.shape, strict=True)
        ]
        place = place_of(images.geometry, view.voxels(within, np.array(pixels[0]), np.array(pixels[1])))
    return SliceEvidence(
        int(number), view.plane, int(images.indices[number]), round(float(images.mm[number]), 2), score, place
    )


def slice_images(images: ScanImages, heat: np.ndarray, voxel: np.ndarray) -> SliceHeat:
    """Return for each plane the slice nearest to a voxel, with its heat.

    Args:
        images: of the scan.
        heat: (S, h, w) of the sentence.
        voxel: (3,), where the sentence's heat is largest.
    """
    size, views = images.geometry.size, images.geometry.views
    places = [[float(value) for value in view.coordinates(voxel)] for view in views]  # number, row, column
    numbers = np.array([view.slices[round(place[0])] for view, place in zip(views, places, strict=True)])
    own = torch.from_numpy(heat[numbers].clip(min=0))[:, None]
    fine = torch.nn.functional.interpolate(own, size=(size, size), mode="bilinear", align_corners=False)
    shares = fine[:, 0].numpy() / max(float(heat.max()), 1e-12)
    return SliceHeat(
        numbers=numbers,
        planes=tuple(view.plane for view in views),
        mm=np.asarray(images.mm)[numbers],
        marks=np.array(places)[:, 1:],
        images=images.slices[numbers],
        heat=shares.astype(np.float32),
        oriented=images.geometry.oriented,
    )


def _rows(affine: np.ndarray) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row) for row in affine)
