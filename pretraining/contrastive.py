"""Contrastive warm-up of the aggregator: InfoNCE between runs of adjacent slices from different planes of one scan."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModel, TrainingArguments

from samf.cache.embedding_cache import EmbeddingCache
from samf.model.configuration_samf import SamfConfig
from samf.model.modeling_samf import SamfForConditionalGeneration, SamfModel
from samf.model.slice_encoder_samf import prepare_slice_encoder
from samf.pretraining.neighbours import retrieval_accuracy
from samf.pretraining.row_shares import share_rows
from samf.pretraining.scans import Scan
from samf.training.aggregator_weights import save_aggregator
from samf.training.sampling import order_seed
from samf.training.trainer_base import ResumableTrainer

try:
    from lightly.loss import NTXentLoss
except ImportError:
    NTXentLoss = None

# The language model of a model that reads no text, as small as it can be.
_NO_TEXT = {
    "model_type": "phi3",
    "vocab_size": 2,
    "hidden_size": 2,
    "intermediate_size": 2,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
Halves = Literal["interleaved", "contiguous"]


def build_slices_model(slice_encoder: str, dtype: torch.dtype | str, **config: Any) -> SamfModel:
    """Return a SamfModel with a pretrained slice encoder, a new aggregator, and a minimal language model.

    Args:
        slice_encoder: Folder or Hub id.
        dtype: Of all weights; "auto" = the encoder's own.
        **config: Settings of SamfConfig.
    """
    encoder = AutoModel.from_pretrained(slice_encoder, dtype=dtype)
    encoder.config._name_or_path = ""
    model = SamfModel(SamfConfig(vision_config=encoder.config, text_config=dict(_NO_TEXT), image_token_id=1, **config))
    prepare_slice_encoder(encoder, model.config)
    model.slice_encoder = encoder
    return model.to(encoder.dtype).eval()


def load_slice_encoder(source: str, dtype: torch.dtype | str) -> SamfModel:
    """Return a model with the slice encoder of a SAMF model, or with a slice encoder itself; without a language model.

    Args:
        source: Folder or Hub id.
        dtype: Of all weights; "auto" = as saved.
    """
    if AutoConfig.from_pretrained(source).model_type != "samf":
        return build_slices_model(source, dtype)
    whole: Any = SamfForConditionalGeneration.from_pretrained(source, dtype=dtype)
    whole.model.language_model = None  # frees its memory
    model: SamfModel = whole.model
    return model


class PlanePairs(Dataset):
    """Two runs of adjacent slices of one scan, from two of its planes, as embeddings.

    Item (epoch, index) has `slice_embeddings` (2, R, D), `slice_mask`, `slice_planes` and `slice_positions` (2, R). The
    reconstruction, planes and positions depend on (seed, epoch, index) only.

    Args:
        scans: One item each.
        embeddings: Has the embeddings of all their volumes.
        run: R, the number of adjacent slices in a run; a plane with fewer gives all of them, padded.
        seed: Of the choices.
    """

    def __init__(self, scans: Sequence[Scan], embeddings: EmbeddingCache, run: int, seed: int):
        self.scans, self.embeddings, self.run, self.seed = scans, embeddings, run, seed

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        volumes = self.scans[index].volumes
        volume = volumes[rng.integers(len(volumes))]
        entry = self.embeddings.get(volume)
        planes = np.unique(entry["slice_planes"])
        if len(planes) < 2:
            raise ValueError(
                f"{volume.path}: slices of one plane only; a pair needs two. Use an image processor with more planes."
            )
        views = []
        for plane in rng.permutation(planes)[:2]:
            (rows,) = np.nonzero(entry["slice_planes"] == plane)  # in the order of their positions
            start = rng.integers(max(len(rows) - self.run, 0) + 1)
            views.append(select_slices(entry, rows[start : start + self.run], self.run))
        return {name: torch.stack([view[name] for view in views]) for name in views[0]}


def select_slices(entry: Mapping[str, np.ndarray], rows: np.ndarray, length: int) -> dict[str, torch.Tensor]:
    """Return the model's inputs (length, …) for some slices of a volume, padded at the end.

    Args:
        entry: Embeddings, planes and positions of all slices.
        rows: Numbers of the slices, at most `length`.
        length: Number of slices with padding.
    """
    chosen = {name: torch.from_numpy(np.array(entry[name][rows])) for name in entry}
    chosen["slice_mask"] = torch.ones(len(rows), dtype=torch.bool)
    missing = length - len(rows)
    return {name: nn.functional.pad(t, (*[0, 0] * (t.ndim - 1), 0, missing)) for name, t in chosen.items()}


def half(entry: Mapping[str, np.ndarray], number: int, kind: Halves) -> np.ndarray:
    """Return the numbers of one half of a volume's slices.

    Args:
        entry: Planes and positions of all slices.
        number: 0 or 1.
        kind: "interleaved": every other slice of each plane. "contiguous": the lower, posterior or left half of each
            plane's field of view, or the other half; the two halves share only the tissue where planes cross.
    """
    if kind == "contiguous":
        return np.flatnonzero((entry["slice_positions"] >= 0.5) == bool(number))
    parts = [np.flatnonzero(entry["slice_planes"] == plane)[number::2] for plane in np.unique(entry["slice_planes"])]
    return np.concatenate(parts)


class PlaneContrast(nn.Module):
    """The loss of two runs per scan: NT-Xent, which is InfoNCE from either run to the other.

    For run i of N scans, with z = z_3d at unit length and temperature t: −log of exp(z_i·z_i'/t) over the sum of
    exp(z_i·z_j/t) for all runs j except i. Run i' is the same scan's other run; the rest belongs to other scans, those of
    all processes.

    Args:
        model: Computes z_3d.
        temperature: t.

    Raises:
        ImportError: lightly is missing.
    """

    def __init__(self, model: SamfModel, temperature: float):
        if NTXentLoss is None:
            raise ImportError("The aggregator's warm-up needs lightly: pip install 'lightly>=1.6'")
        super().__init__()
        self.model = model
        self.loss = NTXentLoss(temperature=temperature, gather_distributed=True)

    def forward(self, **views: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return {"loss": …} for slice_embeddings (B, 2, R, D), slice_mask, slice_planes, slice_positions (B, 2, R)."""
        flat = {name: view.flatten(0, 1) for name, view in views.items()}  # (2·B, R, …)
        volumes = self.model.get_image_features(**flat, return_dict=True).pooler_output[:, 0]  # (2·B, volume_dim)
        with torch.autocast(volumes.device.type, enabled=False):
            first, second = volumes.float().unflatten(0, (-1, 2)).unbind(dim=1)  # (B, volume_dim) each
            return {"loss": self.loss(first, second)}


class ContrastTrainer(ResumableTrainer):
    """Trains the aggregator and slice positions of a SamfModel. `evaluate` measures top-1 retrieval on held-out scans.

    Args:
        model: From `build_slices_model`; its slice encoder isn't used.
        args: Of the training.
        train: Scans to learn from.
        valid: Held-out scans.
        embeddings: Has the embeddings of all their volumes.
        run: See PlanePairs.
        temperature: See PlaneContrast.
    """

    def __init__(
        self,
        model: SamfModel,
        args: TrainingArguments,
        *,
        train: Sequence[Scan],
        valid: Sequence[Scan],
        embeddings: EmbeddingCache,
        run: int,
        temperature: float,
    ):
        model.requires_grad_(False)
        for module in (model.aggregator, model.slice_position):
            if module is not None:
                module.requires_grad_(True)
        self.samf, self.valid, self.embeddings = model, valid, embeddings
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        pairs = PlanePairs(train, embeddings, run, order_seed(args))
        super().__init__(model=PlaneContrast(model, temperature), args=args, train_dataset=pairs, eval_dataset=valid)

    def evaluate(self, *args: object, metric_key_prefix: str = "eval", **kwargs: object) -> dict[str, float]:
        """Return how often one half of a held-out scan retrieves its other half, for both kinds of halves (see `half`).

        Args:
            *args: Ignored; Trainer's.
            metric_key_prefix: Of `…_retrieval_interleaved` and `…_retrieval_contiguous`.
            **kwargs: Ignored; Trainer's.
        """
        metrics = {}
        for kind in get_args(Halves):
            first, second = (self._embed_halves(number, kind) for number in (0, 1))
            metrics[f"{metric_key_prefix}_retrieval_{kind}"] = retrieval_accuracy(first, second)
        return self.report(metrics)

    def _embed_halves(self, number: int, kind: Halves) -> np.ndarray:
        """Return z_3d, float32 (scans, volume_dim), of one half of each held-out scan's first volume."""

        @torch.no_grad()
        def compute(rows: Sequence[int]) -> np.ndarray:
            size = self.args.eval_batch_size
            batches = [self._half_batch(rows[i : i + size], number, kind) for i in range(0, len(rows), size)]
            parts = [self.samf.get_image_features(**batch, return_dict=True).pooler_output[:, 0] for batch in batches]
            return torch.cat(parts).float().cpu().numpy()

        was_training = self.model.training
        self.samf.eval()
        volumes = share_rows(compute, len(self.valid))
        self.model.train(was_training)
        return volumes

    def _half_batch(self, rows: Sequence[int], number: int, kind: Halves) -> dict[str, torch.Tensor]:
        entries = [self.embeddings.get(self.valid[row].volumes[0]) for row in rows]
        halves = [half(entry, number, kind) for entry in entries]
        views = [select_slices(*pair, max(map(len, halves))) for pair in zip(entries, halves, strict=True)]
        return {name: torch.stack([view[name] for view in views]).to(self.args.device) for name in views[0]}

    def save_aggregator(self) -> None:
        """Save the weights in `output_dir`, for `load_aggregator`."""
        if self.is_world_process_zero():
            save_aggregator(self.samf, self.args.output_dir)
