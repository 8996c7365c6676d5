"""Occlusion of windows of slice images: what their loss changes in the slices' embeddings, to first order in the text.

One slice through the slice encoder is cheap, and its change serves all sentences; the language model enters by the gradient
of each sentence's log-likelihood alone. Only the encoder's output is needed, so every encoder will do, with patches or not.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

# uint8 images (N, C, H, W) → embeddings (N, D).
Encode = Callable[[torch.Tensor], torch.Tensor]


def windows_of(size: int, windows: int) -> list[tuple[int, int]]:
    """Return (start, stop) pixels of windows along a side, each half covered by the next.

    Args:
        size: of the image in pixels.
        windows: how many along a side.
    """
    edges = [round(size * number / (windows + 1)) for number in range(windows + 2)]
    return [(edges[number], edges[number + 2]) for number in range(windows)]


def blank(images: torch.Tensor) -> torch.Tensor:
    """Return images (…, C, H, W) in which all is as dark as their darkest pixel, in each channel: air."""
    return images.amin(dim=(-2, -1), keepdim=True).expand_as(images).contiguous()


def blanked_windows(image: torch.Tensor, windows: int) -> torch.Tensor:
    """Return copies (windows², C, H, W) of an image, each with one window blanked; row by row.

    Args:
        image: (C, H, W).
        windows: along a side.
    """
    rows, columns = windows_of(image.shape[-2], windows), windows_of(image.shape[-1], windows)
    dark = blank(image)
    copies = image.repeat(len(rows) * len(columns), 1, 1, 1)
    places = [(row, column) for row in rows for column in columns]
    for copy, (row, column) in zip(copies, places, strict=True):
        copy[:, slice(*row), slice(*column)] = dark[:, slice(*row), slice(*column)]
    return copies


def slice_effects(
    encode: Encode, images: torch.Tensor, embeddings: torch.Tensor, gradients: torch.Tensor
) -> torch.Tensor:
    """Return (K, S): by how much the K log-likelihoods would fall, to first order, if a slice became blank.

    Args:
        encode: the slice encoder.
        images: uint8 (S, C, H, W).
        embeddings: (S, D) of the images.
        gradients: (K, S, D) of the log-likelihoods by the embeddings.
    """
    return torch.einsum("ksd,sd->ks", gradients, embeddings - encode(blank(images)))


def window_effects(
    encode: Encode, image: torch.Tensor, embedding: torch.Tensor, gradients: torch.Tensor, windows: int
) -> np.ndarray:
    """Return (K, windows + 1, windows + 1): by how much the K log-likelihoods would fall with the parts of one slice.

    A cell is a quarter of a window; its value is the mean over the windows that cover it.

    Args:
        encode: the slice encoder.
        image: uint8 (C, H, W).
        embedding: (D,) of the image.
        gradients: (K, D) of the log-likelihoods by the embedding.
        windows: along a side.
    """
    changes = embedding - encode(blanked_windows(image, windows))  # (W, D)
    falls = (gradients @ changes.T).reshape(-1, windows, windows).cpu().numpy()  # (K, rows, columns)
    cells, covers = np.zeros((len(falls), windows + 1, windows + 1)), np.zeros((windows + 1, windows + 1))
    for row in (0, 1):
        for column in (0, 1):
            place = (slice(row, row + windows), slice(column, column + windows))
            cells[:, place[0], place[1]] += falls
            covers[place] += 1
    return (cells / covers).astype(np.float32)


def in_batches(encode: Encode, batch_size: int) -> Encode:
    """Return an encoder that takes its images in batches, so that memory doesn't grow with their number."""

    def encoded(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([encode(part) for part in images.split(batch_size)])

    return encoded


def selected(effects: np.ndarray, planes: np.ndarray, count: int) -> Iterator[int]:
    """Yield the slices of each plane whose effect on any sentence is largest.

    Args:
        effects: (K, S), each sentence's counted as a share of its largest.
        planes: (S,) plane of each slice.
        count: slices per plane.
    """
    shares = np.abs(effects) / np.abs(effects).max(axis=1, keepdims=True).clip(min=1e-12)
    strongest = shares.max(axis=0)  # (S,)
    for plane in np.unique(planes):
        own = np.flatnonzero(planes == plane)
        yield from np.sort(own[np.argsort(-strongest[own], kind="stable")[:count]]).tolist()
