"""Data sets of single slices with labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Dataset


class LabelledDataset(Protocol):
    """A data set of slices uint8 (3, H, W) with labels.

    Attributes:
        labels: int64 (N,), indices into `label_names`.
        label_names: Names of the labels.
    """

    labels: np.ndarray
    label_names: tuple[str, ...]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class SliceSets:
    """Slices to learn from, uint8 (3, H, W), and two labelled sets for nearest neighbours, of which `queries` is held out."""

    train: Dataset
    bank: LabelledDataset
    queries: LabelledDataset


class LabelledSet(Dataset):
    """The slices of a labelled data set at some indices.

    Args:
        slices: All slices.
        indices: Of the slices to keep, int64 (N,).
    """

    def __init__(self, slices: LabelledDataset, indices: np.ndarray):
        self.slices, self.indices = slices, indices
        self.labels, self.label_names = slices.labels[indices], slices.label_names

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.slices[int(self.indices[index])]


class JoinedSets(ConcatDataset):
    """Labelled sets with the same label names, one after the other.

    Args:
        parts: The sets.
    """

    def __init__(self, parts: Sequence[Dataset]):
        super().__init__(parts)
        self.labels = np.concatenate([part.labels for part in parts])
        self.label_names = parts[0].label_names


def some_slices(slices: LabelledDataset, most: int, seed: int = 0) -> LabelledSet:
    """Return a random choice of slices in their order.

    Args:
        slices: All slices.
        most: Largest number of slices.
        seed: Of the choice.
    """
    order = np.random.default_rng(seed).permutation(len(slices))
    return LabelledSet(slices, np.sort(order[:most]))
