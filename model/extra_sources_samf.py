"""Extra sources: named vectors of a patient or an earlier scan that join the fusion."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

# What a caller may give as one source's vector: a number, a list of numbers, an array or a tensor.
SourceVector = torch.Tensor | Sequence[float] | float


def check_source_names(sources: Mapping[str, int]) -> None:
    """Raise ValueError if a source has the name of an attribute of `torch.nn.ModuleDict`."""
    taken = sorted(name for name in sources if hasattr(nn.ModuleDict(), name))
    if taken:
        raise ValueError(
            f"SamfConfig.extra_sources has the names {taken}, which torch's modules use themselves; rename."
        )


def pack_sources(
    sources: Mapping[str, int], rows: Sequence[Mapping[str, SourceVector | None] | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack the named vectors of each volume into two tensors.

    Args:
        sources: `config.extra_sources`: each name with the width of its vector.
        rows: for each volume a mapping from names to vectors (width,); a name that is missing or None is absent.

    Returns:
        values (B, sum of widths) float32, zero where absent, and mask (B, sources) bool.

    Raises:
        ValueError: a name that `sources` doesn't have, a wrong width, or a value that isn't finite.
    """
    values = torch.zeros(len(rows), sum(sources.values()))
    mask = torch.zeros(len(rows), len(sources), dtype=torch.bool)
    columns = values.split(list(sources.values()), dim=1) if sources else ()
    for index, row in enumerate(rows):
        row = row or {}
        unknown = sorted(set(row) - set(sources))
        if unknown:
            raise ValueError(f"Row {index} has extra sources {unknown}; config.extra_sources has {dict(sources)}.")
        for place, (name, width) in enumerate(sources.items()):
            given = row.get(name)
            if given is None:
                continue
            vector = torch.as_tensor(given, dtype=torch.float32).detach().cpu().flatten()
            finite = int(vector.isfinite().sum())
            if len(vector) != width or finite != width:
                raise ValueError(
                    f"Row {index}: {name} has {len(vector)} values, of which {finite} are finite; expected {width} finite "
                    "ones. Leave the name out where it isn't known."
                )
            columns[place][index] = vector
            mask[index, place] = True
    return values, mask


def split_sources(
    sources: Mapping[str, int], volume: torch.Tensor, values: torch.Tensor | None, mask: torch.Tensor | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Split packed vectors by source.

    Args:
        sources: each name with the width of its vector.
        volume: z_3d (B, volume_dim), for the batch size, type and device of absent vectors.
        values: (B, sum of widths); None = all absent.
        mask: (B, sources) bool, True = present; None = all present.

    Returns:
        For each source its vectors (B, width), and where they are absent, (B, 1) bool.

    Raises:
        ValueError: `values` or `mask` has another shape than `sources` and the volumes make.
    """
    if values is None and not sources:
        return []
    widths = list(sources.values())
    shape, mask_shape = (volume.shape[0], sum(widths)), (volume.shape[0], len(widths))
    if values is None:
        values, mask = volume.new_zeros(shape), volume.new_zeros(mask_shape)
    if tuple(values.shape) != shape or (mask is not None and tuple(mask.shape) != mask_shape):
        raise ValueError(
            f"extra_values has shape {tuple(values.shape)} and extra_mask {None if mask is None else tuple(mask.shape)}"
            f"; the sources {dict(sources)} of {shape[0]} volumes make them {shape} and {mask_shape}. "
            "SamfModel.pack_extra_sources makes both."
        )
    parts = []
    for index, vector in enumerate(values.split(widths, dim=1)):
        absent = torch.zeros_like(vector[:, :1], dtype=torch.bool) if mask is None else ~mask[:, index, None].bool()
        parts.append((vector, absent))
    return parts
