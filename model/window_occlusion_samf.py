"""Occlusion of windows of slice images: what their loss changes in the slices' embeddings, and by it in the sentences.

One slice through the slice encoder is cheap, and its change serves all sentences; the language model enters by the gradient
of each sentence's log-likelihood. Only the encoder's output is needed, so every encoder will do, with patches or not.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

# uint8 images (N, C, H, W) → embeddings (N, D).
Encode = Callable[[torch.Tensor], torch.Tensor]
FILLS = 2


def windows_of(size: int, windows: int) -> list[tuple[int, int]]:
    """Return (start, stop) pixels of windows along a side, each half covered by the next.

    Args:
        size: of the image in pixels.
        windows: how many along a side.
    """
    edges = [round(size * number / (windows + 1)) for number in range(windows + 2)]
    return [(edges[number], edges[number + 2]) for number in range(windows)]


def filled(image: torch.Tensor, row: tuple[int, int], column: tuple[int, int]) -> Iterator[torch.Tensor]:
    """Yield copies of an image (C, H, W) in which a window holds nothing: the image's darkest value, then its own mean.

    One fill alone would find what differs from it, dense tissue in air, or what has structure; evidence has either.

    Args:
        image: (C, H, W).
        row: (start, stop) of the window.
        column: (start, stop) of the window.
    """
    place = (slice(None), slice(*row), slice(*column))
    for value in (image.amin(dim=(-2, -1)), image[place].float().mean(dim=(-2, -1)).round().to(image.dtype)):
        copy = image.clone()
        copy[place] = value[:, None, None]
        yield copy


def window_losses(
    encode: Encode, image: torch.Tensor, embedding: torch.Tensor, gradients: torch.Tensor, windows: int
) -> np.ndarray:
    """Return (FILLS, K, windows, windows): by how much the K log-likelihoods would fall without each window of a slice.

    Args:
        encode: the slice encoder.
        image: uint8 (C, H, W).
        embedding: (D,) of the image.
        gradients: (K, D) of the log-likelihoods by the embedding.
        windows: along a side.
    """
    rows, columns = windows_of(image.shape[-2], windows), windows_of(image.shape[-1], windows)
    copies = [copy for row in rows for column in columns for copy in filled(image, row, column)]
    changes = embedding - encode(torch.stack(copies))  # (windows² · FILLS, D)
    losses = (gradients @ changes.T.to(gradients.dtype)).view(-1, windows, windows, FILLS)
    return losses.permute(3, 0, 1, 2).cpu().numpy()


def heat_of(losses: np.ndarray) -> np.ndarray:
    """Return the heat (S, windows + 1, windows + 1) of one sentence on all slices.

    What speaks against the sentence has no heat. Each fill counts in units of its standard deviation. A cell is a quarter of a
    window, and its heat the mean over the windows that cover it.

    Args:
        losses: (FILLS, S, windows, windows).
    """
    spread = losses.std(axis=(1, 2, 3), keepdims=True).clip(min=1e-12)
    positive = (losses.clip(min=0) / spread).sum(axis=0)  # (S, windows, windows)
    windows = positive.shape[-1]
    cells = np.zeros((len(positive), windows + 1, windows + 1))
    covers = np.zeros((windows + 1, windows + 1))
    for row in (0, 1):
        for column in (0, 1):
            place = (slice(row, row + windows), slice(column, column + windows))
            cells[:, place[0], place[1]] += positive
            covers[place] += 1
    return (cells / covers).astype(np.float32)


def in_batches(encode: Encode, batch_size: int) -> Encode:
    """Return an encoder that takes its images in batches, so that memory doesn't grow with their number."""

    def encoded(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([encode(part) for part in images.split(batch_size)])

    return encoded


def selected(scores: np.ndarray, planes: np.ndarray, count: int) -> Iterator[int]:
    """Yield the slices of each plane whose score for any sentence is largest.

    Args:
        scores: (K, S), each sentence's counted as a share of its largest, of either sign.
        planes: (S,) plane of each slice.
        count: slices per plane.
    """
    shares = np.abs(scores) / np.abs(scores).max(axis=1, keepdims=True).clip(min=1e-12)
    strongest = shares.max(axis=0)  # (S,)
    for plane in np.unique(planes):
        own = np.flatnonzero(planes == plane)
        yield from np.sort(own[np.argsort(-strongest[own], kind="stable")[:count]]).tolist()
