"""Attention of a slice encoder's last layer from CLS to the patches, and an image of it."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from samf.utils.files import atomic_write


@torch.no_grad()
def cls_attention(encoder: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the last layer's attention from CLS to the patches, (N, heads, rows, columns), for images (N, C, H, W).

    The weights sum to less than one: CLS itself and register tokens have the rest.
    """
    implementation = encoder.config._attn_implementation
    was_training = encoder.training
    encoder.eval()
    encoder.set_attn_implementation("eager")  # the others don't return their weights
    try:
        outputs = encoder(pixel_values=pixel_values, output_attentions=True)
    finally:
        encoder.set_attn_implementation(implementation)
        encoder.train(was_training)
    attention = outputs.attentions[-1]  # (N, heads, 1 + P, 1 + P)
    rows, columns = (side // encoder.config.patch_size for side in pixel_values.shape[-2:])
    return attention[:, :, 0, -rows * columns :].unflatten(-1, (rows, columns)).float()


def save_attention_image(
    slices: np.ndarray, attention: np.ndarray, titles: Sequence[str], path: str | os.PathLike, heads: int = 4
) -> None:
    """Save an image with one row per slice: the slice, the mean attention over the heads, and the first heads.

    Args:
        slices: uint8 (N, C, H, W); the last channel is shown.
        attention: (N, heads, rows, columns).
        titles: One per slice.
        path: Of the PNG.
        heads: Number of heads shown.
    """
    columns = [attention.mean(axis=1), *attention.transpose(1, 0, 2, 3)[:heads]]
    names = ["slice", "mean", *(f"head {number + 1}" for number in range(len(columns) - 1))]
    figure = Figure(figsize=(1.6 * len(names), 1.7 * len(slices)), layout="constrained")
    axes = figure.subplots(len(slices), len(names), squeeze=False)
    for row, title in enumerate(titles):
        axes[row, 0].imshow(slices[row, -1], cmap="gray", vmin=0, vmax=255)
        axes[row, 0].set_ylabel(title, fontsize=7)
        for axis, weights in zip(axes[row, 1:], columns, strict=True):
            axis.imshow(weights[row], cmap="viridis", vmin=0)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    atomic_write(Path(path), png.getvalue())
