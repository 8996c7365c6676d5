"""InfoNCE between runs of adjacent slices of one scan's planes: what warms the aggregator up."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModel, TrainingArguments

from samf.cache.embedding_cache import EmbeddingCache
from samf.model.configuration_samf import SamfConfig
from samf.model.modeling_samf import SamfModel
from samf.model.slice_encoder_samf import prepare_slice_encoder
from samf.pretraining.neighbours import retrieval_accuracy
from samf.pretraining.slice_datasets import Scan
from samf.training.aggregator_weights import save_aggregator
from samf.training.trainer_base import ResumableTrainer, order_seed, share_rows

try:
    from lightly.loss import NTXentLoss
except ImportError:
    NTXentLoss = None

# The language model of a model that reads no text: as small as it can be.
NO_TEXT = {
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
HALVES = ("interleaved", "contiguous")


def build_slices_model(slice_encoder: str, dtype: torch.dtype | str, **config: Any) -> SamfModel:
    """A SamfModel with a pretrained slice encoder, a new aggregator, and next to no language model.

    slice_encoder: folder or Hub id; dtype: of all weights ("auto" = the encoder's own); config: of SamfConfig.
    """
    encoder = AutoModel.from_pretrained(slice_encoder, dtype=dtype)
    encoder.config._name_or_path = ""
    model = SamfModel(SamfConfig(vision_config=encoder.config, text_config=dict(NO_TEXT), image_token_id=1, **config))
    prepare_slice_encoder(encoder, model.config)
    model.slice_encoder = encoder
    return model.to(encoder.dtype).eval()


class PlanePairs(Dataset):
    """Two runs of adjacent slices of one scan, from two of its planes, as embeddings.

    Item (epoch, index) has `slice_embeddings` (2, R, D), `slice_mask`, `slice_planes` and `slice_positions` (2, R). Which
    reconstruction, planes and places follows from (seed, epoch, index) alone.

    Args:
        scans: one item each.
        embeddings: of all their volumes; filled.
        run: R, how many neighbouring slices a run has; a plane with fewer gives all of them, padded.
    """

    def __init__(self, scans: Sequence[Scan], embeddings: EmbeddingCache, run: int, seed: int):
        self.scans, self.embeddings, self.run, self.seed = scans, embeddings, run, seed

    def __len__(self) -> int:
        return len(self.scans)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        volumes = self.scans[index].volumes
        path, rescale = volumes[rng.integers(len(volumes))]
        record = self.embeddings.get(path, rescale=rescale)
        planes = np.unique(record["slice_planes"])
        if len(planes) < 2:
            raise ValueError(
                f"{path}: slices of one plane alone; a pair needs two. Use an image processor with more planes."
            )
        views = []
        for plane in rng.permutation(planes)[:2]:
            (places,) = np.nonzero(record["slice_planes"] == plane)  # in the order of their positions
            start = rng.integers(max(len(places) - self.run, 0) + 1)
            views.append(select_slices(record, places[start : start + self.run], self.run))
        return {name: torch.stack([view[name] for view in views]) for name in views[0]}


def select_slices(record: Mapping[str, np.ndarray], places: np.ndarray, length: int) -> dict[str, torch.Tensor]:
    """The model's slice inputs (length, …) of some slices of a record, padded at the end."""
    chosen = {name: torch.from_numpy(np.array(record[name][places])) for name in record}
    chosen["slice_mask"] = torch.ones(len(places), dtype=torch.bool)
    missing = length - len(places)
    return {name: nn.functional.pad(t, (*[0, 0] * (t.ndim - 1), 0, missing)) for name, t in chosen.items()}


def half(record: Mapping[str, np.ndarray], number: int, kind: str) -> np.ndarray:
    """Places of one half (0 or 1) of a scan's slices.

    "interleaved": of each plane every other slice. "contiguous": of each plane the lower, back or left half of its field,
    or the other: the two halves share no tissue but what the planes cross in.
    """
    if kind == "contiguous":
        return np.flatnonzero((record["slice_positions"] >= 0.5) == bool(number))
    parts = [np.flatnonzero(record["slice_planes"] == plane)[number::2] for plane in np.unique(record["slice_planes"])]
    return np.concatenate(parts)


class PlaneContrast(nn.Module):
    """The loss of two runs a scan: NT-Xent, which is InfoNCE from either run to the other.

    For run i of N scans, with z = z_3d at length one and temperature t, −log of exp(z_i·z_i'/t) over the sum of
    exp(z_i·z_j/t) for all runs j but i itself: i' is the same scan's other run, the rest belongs to other scans, those
    of all processes.
    """

    def __init__(self, model: SamfModel, temperature: float):
        if NTXentLoss is None:
            raise ImportError("The aggregator's warm-up needs lightly: pip install 'lightly>=1.6'")
        super().__init__()
        self.model = model
        self.loss = NTXentLoss(temperature=temperature, gather_distributed=True)

    def forward(self, **views: torch.Tensor) -> dict[str, torch.Tensor]:
        """slice_embeddings (B, 2, R, D), slice_mask, slice_planes, slice_positions (B, 2, R); {"loss": …}."""
        flat = {name: view.flatten(0, 1) for name, view in views.items()}  # (2·B, R, …)
        volumes = self.model.get_image_features(**flat, return_dict=True).pooler_output[:, 0]  # (2·B, volume_dim)
        with torch.autocast(volumes.device.type, enabled=False):
            first, second = volumes.float().unflatten(0, (-1, 2)).unbind(dim=1)  # (B, volume_dim) each
            return {"loss": self.loss(first, second)}


class ContrastTrainer(ResumableTrainer):
    """Trains the aggregator and slice positions of a SamfModel. `evaluate` gives top-1 retrieval on held-out scans.

    Args:
        model: from `build_slices_model`; needs no slice encoder any more.
        args: training.
        train, valid: scans.
        embeddings: of all their volumes; filled.
        run, temperature: see PlanePairs and PlaneContrast.
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
        for part in (model.aggregator, model.slice_position):
            if part is not None:
                part.requires_grad_(True)
        self.samf, self.valid, self.embeddings = model, valid, embeddings
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        pairs = PlanePairs(train, embeddings, run, order_seed(args))
        super().__init__(model=PlaneContrast(model, temperature), args=args, train_dataset=pairs, eval_dataset=valid)

    def evaluate(self, *args: object, metric_key_prefix: str = "eval", **kwargs: object) -> dict[str, float]:
        """`eval_retrieval_interleaved` and `…_contiguous`: how often a scan's half finds its other half (see `half`)."""
        metrics = {}
        for kind in HALVES:
            first, second = (self._embed_halves(number, kind) for number in (0, 1))
            metrics[f"{metric_key_prefix}_retrieval_{kind}"] = retrieval_accuracy(first, second)
        return self.report(metrics)

    def _embed_halves(self, number: int, kind: str) -> np.ndarray:
        """z_3d float32 (scans, volume_dim) of one half of each held-out scan's first volume."""

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

    def _half_batch(self, rows: Sequence[int], number: int, kind: str) -> dict[str, torch.Tensor]:
        volumes = [self.valid[row].volumes[0] for row in rows]
        records = [self.embeddings.get(path, rescale=rescale) for path, rescale in volumes]
        places = [half(record, number, kind) for record in records]
        views = [select_slices(*pair, max(map(len, places))) for pair in zip(records, places, strict=True)]
        return {name: torch.stack([view[name] for view in views]).to(self.args.device) for name in views[0]}

    def save_aggregator(self) -> None:
        """The weights in `output_dir`, for `load_aggregator`."""
        if self.is_world_process_zero():
            save_aggregator(self.samf, self.args.output_dir)
