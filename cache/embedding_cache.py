"""Slice embeddings of a frozen slice encoder, computed once and kept on disk."""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from samf.cache.slice_cache import (
    Identity,
    SliceCache,
    entry_file,
    entry_key,
    read_entry,
    volume_identity,
    write_entry,
)
from samf.data.volume_discovery import VolumeKey
from samf.model.modeling_samf import SamfModel
from samf.utils.distributed import Processes

# Of the image processor: they change the encoder's input, but not the cached slices.
PIXEL_SETTINGS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")

# Of the slice encoder's configuration: they say where it comes from, or how training is done.
NOT_COMPUTED_WITH = {
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


class EmbeddingCache:
    """z_2d of every volume, in records named by the volume, the slice settings and the encoder's weights.

    Args:
        folder: where the records lie; one float32 record a volume.
        slices: where the slices come from.
        model: whose slice encoder is frozen; used on the device where it is. It isn't kept in a pickle: a filled cache
            can go to worker processes.
    """

    def __init__(self, folder: str | os.PathLike, slices: SliceCache, model: SamfModel):
        self.folder = Path(folder)
        self.slices = slices
        self.fingerprint = encoder_fingerprint(model)
        self._model: SamfModel | None = model

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}

    def get(self, path: str | os.PathLike, *, rescale: Sequence[float] | None = None) -> dict[str, np.ndarray]:
        """`slice_embeddings` (S, D) float32, `slice_planes` and `slice_positions` (S,) of the volume at `path`."""
        file = self.entry_path(path, rescale=rescale)
        record = read_entry(file)
        if record is None:
            if self._model is None:
                raise FileNotFoundError(f"{path} has no embeddings at {file}; call fill() before training.")
            record = self.encode(self.slices.get(path, rescale=rescale))
            write_entry(file, record)
        return record

    def has(self, path: str | os.PathLike, *, rescale: Sequence[float] | None = None) -> bool:
        """Whether there is a whole record of the volume at `path`."""
        return read_entry(self.entry_path(path, rescale=rescale)) is not None

    def entry_path(self, path: str | os.PathLike, *, rescale: Sequence[float] | None = None) -> Path:
        """Where the record of the volume at `path` lies or would lie."""
        return entry_file(self.folder, self.key(volume_identity(path), rescale))

    def key(self, identity: Identity, rescale: Sequence[float] | None = None) -> str:
        """A record's name from its volume's identity."""
        pixels = [getattr(self.slices.image_processor, name) for name in PIXEL_SETTINGS]
        return entry_key(self.slices.key(identity, rescale), pixels, self.fingerprint)

    def fill(self, volumes: Sequence[VolumeKey], num_workers: int | None = None) -> None:
        """Compute what is missing of `volumes`, pairs of a path and its rescale (None = as the file says).

        `num_workers` processes read slices ahead; by default one a core, at most 8.
        """
        missing = [volume for volume in volumes if not self.has(volume[0], rescale=volume[1])]
        if not missing:
            return
        workers = min(os.cpu_count() or 1, 8) if num_workers is None else num_workers
        ahead = self.slices_ahead(missing, workers)
        for (path, rescale), slices in tqdm(ahead, total=len(missing), desc="embedding slices"):
            write_entry(self.entry_path(path, rescale=rescale), self.encode(slices))

    def fill_together(self, volumes: Sequence[VolumeKey]) -> None:
        """`fill`, every process its share; all must call, and go on when all are done, however long a share takes."""
        processes, failed = Processes(), None
        try:
            self.fill(volumes[processes.rank :: processes.count])
        except Exception as error:  # noqa: BLE001 - raised on every process, or the others would wait for this one
            failed = error
        processes.raise_together(failed)

    def slices_ahead(
        self, volumes: Sequence[VolumeKey], num_workers: int
    ) -> Iterator[tuple[VolumeKey, Mapping[str, np.ndarray]]]:
        """Each volume with its slices, in this order, read ahead by processes; 0 workers read them here."""
        loader = DataLoader(_Slices(self.slices, volumes), batch_size=1, num_workers=num_workers, collate_fn=_only)
        return zip(volumes, loader, strict=True)

    @torch.inference_mode()
    def encode(self, slices: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """What a record holds, of one volume's slices as `SliceCache.get` gives them."""
        encoder = self._model.slice_encoder
        pixel_values = self.slices.image_processor([slices], return_tensors="pt")["pixel_values"]
        pixel_values = pixel_values.to(next(encoder.parameters()).device, self._model.dtype)
        was_training = encoder.training
        encoder.eval()
        embeddings = self._model.encode_slices(pixel_values).last_hidden_state[0]  # (S, D)
        encoder.train(was_training)
        return {
            "slice_embeddings": embeddings.float().cpu().numpy(),
            "slice_planes": slices["slice_planes"],
            "slice_positions": slices["slice_positions"],
        }


def _only(rows: list[Mapping[str, np.ndarray]]) -> Mapping[str, np.ndarray]:
    """The one row of a batch, as numpy arrays."""
    return rows[0]


class _Slices(torch.utils.data.Dataset):
    def __init__(self, slices: SliceCache, volumes: Sequence[VolumeKey]):
        self.slices, self.volumes = slices, volumes

    def __len__(self) -> int:
        return len(self.volumes)

    def __getitem__(self, index: int) -> Mapping[str, np.ndarray]:
        path, rescale = self.volumes[index]
        return self.slices.get(path, rescale=rescale)


def encoder_fingerprint(model: SamfModel) -> str:
    """Return sixteen hex digits that name the slice encoder: its weights, its settings and how z_2d is read out.

    Heads, activation and epsilons change embeddings and leave no trace in the weights.
    """
    encoder = model.slice_encoder
    settings = {name: value for name, value in encoder.config.to_diff_dict().items() if name not in NOT_COMPUTED_WITH}
    described = [type(encoder).__name__, model.config.slice_pooling, str(model.dtype), settings]
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.slice_encoder.state_dict().items()):
        buffer = io.BytesIO()
        np.save(buffer, tensor.detach().float().cpu().numpy())
        digest.update(name.encode() + buffer.getbuffer())
    return digest.hexdigest()[:16]
