"""Cache of slice embeddings: z_2d of a frozen slice encoder, computed once per volume."""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from samf.cache.entries import Arrays, Namer, VolumeCache, entry_key, write_entry
from samf.cache.slice_cache import SliceCache
from samf.cache.volume_identity import Identity
from samf.data.schema import VolumeLike
from samf.model.ct_volume import VolumeRef
from samf.model.image_processing_samf import PIXEL_SETTINGS, SamfImageProcessor
from samf.model.modeling_samf import SamfModel
from samf.utils.distributed import Processes

# Settings of the slice encoder that don't change its output: where it comes from, and how it is trained.
_IRRELEVANT_SETTINGS = {
    "_name_or_path",
    "architectures",
    "attention_probs_dropout_prob",
    "dtype",
    "hidden_dropout_prob",
    "id2label",
    "initializer_range",
    "label2id",
    "transformers_version",
}


class EmbeddingCache(VolumeCache):
    """z_2d of volumes, in float32 entries named by the volume, the slice settings and the encoder's weights.

    Args:
        folder: the cache directory.
        slices: provides the slices.
        model: the model with the frozen slice encoder, which is used on its device. It is not pickled: a filled cache can
            be sent to worker processes.
    """

    def __init__(self, folder: str | os.PathLike, slices: SliceCache, model: SamfModel):
        super().__init__(folder)
        self.slices = slices
        self.fingerprint = encoder_fingerprint(model)
        self._model: SamfModel | None = model

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_model": None}

    def namer(self) -> Namer:
        """Return the function that names the entries of many volumes, by the settings of this moment."""
        pixels = [getattr(self.slices.image_processor, name) for name in PIXEL_SETTINGS]
        name_slices = self.slices.namer()

        def name(volume: VolumeRef, identity: Identity) -> str:
            return entry_key(name_slices(volume, identity), pixels, self.fingerprint)

        return name

    def get(self, volume: VolumeLike, *, rescale: Sequence[float] | None = None) -> Arrays:
        """Return `slice_embeddings` (S, D) float32, `slice_planes` and `slice_positions` (S,) of a volume.

        Args:
            volume: see `SliceCache.get`.
            rescale: see `SliceCache.get`.

        Raises:
            FileNotFoundError: there is no entry, and this copy of the cache was unpickled without its model.
            CTReadError: the volume can't be read.
        """
        return self._get(VolumeRef.of(volume, rescale), self._make)

    def _make(self, volume: VolumeRef) -> Arrays:
        if self._model is None:
            entry_path = self.entry_path(volume)
            raise FileNotFoundError(f"{volume.path} has no embeddings at {entry_path}; call fill() before training.")
        return self.encode(self.slices.get(volume))

    def fill(self, volumes: Sequence[VolumeLike], num_workers: int | None = None) -> None:
        """Compute the missing entries.

        Args:
            volumes: paths, or `VolumeRef`s.
            num_workers: processes that read slices ahead; by default one per core, at most 8.
        """
        missing = [volume for volume in volumes if not self.has(volume)]
        if not missing:
            return
        workers = min(os.cpu_count() or 1, 8) if num_workers is None else num_workers
        ahead = self.read_ahead(missing, workers)
        for volume, slices in tqdm(ahead, total=len(missing), desc="embedding slices"):
            write_entry(self.entry_path(volume), self.encode(slices))

    def fill_together(self, volumes: Sequence[VolumeLike]) -> None:
        """Compute the missing entries on all processes, each its share; all must call, and return when all have finished.

        Args:
            volumes: paths, or `VolumeRef`s; the same on all processes.
        """
        processes, failed = Processes(), None
        try:
            self.fill(volumes[processes.rank :: processes.count])
        except Exception as error:  # noqa: BLE001 - raised on every process, or the others would wait for this one
            failed = error
        processes.raise_together(failed)

    def read_ahead(
        self, volumes: Sequence[VolumeLike], num_workers: int
    ) -> Iterator[tuple[VolumeLike, Mapping[str, np.ndarray]]]:
        """Yield each volume with its slices, in order, read ahead by worker processes.

        Args:
            volumes: paths, or `VolumeRef`s.
            num_workers: number of processes; 0 reads in this one.
        """
        dataset = _SliceStacks(self.slices, volumes)
        loader = DataLoader(dataset, batch_size=1, num_workers=num_workers, collate_fn=_single_row)
        return zip(volumes, loader, strict=True)

    def encode(self, slices: Mapping[str, np.ndarray]) -> Arrays:
        """Return the arrays of an entry for one volume's slices; see `encode_slices`.

        Raises:
            RuntimeError: this copy of the cache was unpickled without its model.
        """
        if self._model is None:
            raise RuntimeError("This cache was sent to another process without its model; encode before that.")
        return encode_slices(self._model, self.slices.image_processor, slices)


@torch.inference_mode()
def encode_slices(model: SamfModel, image_processor: SamfImageProcessor, slices: Mapping[str, np.ndarray]) -> Arrays:
    """Return the slice embeddings of one volume (z_2d, eq. 1), computed in evaluation mode.

    Args:
        model: provides the slice encoder, on its device and in its dtype.
        image_processor: rescales and normalises the slices.
        slices: the output of `SamfImageProcessor.extract` for one volume.

    Returns:
        `slice_embeddings` (S, D) float32, and the `slice_planes` and `slice_positions` (S,) of `slices`.
    """
    encoder = model.slice_encoder
    pixel_values = image_processor.preprocess([slices], return_tensors="pt")["pixel_values"]
    pixel_values = pixel_values.to(next(encoder.parameters()).device, model.dtype)
    was_training = encoder.training
    encoder.eval()
    embeddings = model.encode_slices(pixel_values).last_hidden_state
    encoder.train(was_training)
    assert embeddings is not None
    return {
        "slice_embeddings": embeddings[0].float().cpu().numpy(),  # (S, D)
        "slice_planes": slices["slice_planes"],
        "slice_positions": slices["slice_positions"],
    }


def encoder_fingerprint(model: SamfModel) -> str:
    """Return 16 hexadecimal digits that identify the slice encoder: weights, settings and how z_2d is read out.

    Heads, activation and epsilons change embeddings without changing the weights.
    """
    encoder = model.slice_encoder
    settings = {
        name: value for name, value in encoder.config.to_diff_dict().items() if name not in _IRRELEVANT_SETTINGS
    }
    described = [type(encoder).__name__, model.config.slice_pooling, str(model.dtype), settings]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.slice_encoder.state_dict().items()):
        buffer = io.BytesIO()
        np.save(buffer, tensor.detach().float().cpu().numpy())
        digest.update(name.encode() + buffer.getbuffer())
    return digest.hexdigest()[:16]


class _SliceStacks(torch.utils.data.Dataset[Arrays]):
    """Dataset of the slices of each volume."""

    def __init__(self, slices: SliceCache, volumes: Sequence[VolumeLike]):
        self.slices, self.volumes = slices, volumes

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> Arrays:
        return self.slices.get(self.volumes[index])


def _single_row(rows: list[Arrays]) -> Arrays:
    """Return the only row of a batch, as numpy arrays."""
    return rows[0]
