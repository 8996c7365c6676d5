"""Occlusion of slices: how much log-likelihood the sentences of an answer lose without some of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

Block = tuple[int, ...]  # numbers of neighbouring slices of one plane
# Embeddings (S, D) and rows of slices to keep (B, S) → log-likelihoods (B, K) of K sentences.
Likelihood = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class OccludedSlices:
    """What occlusion of slices found.

    Attributes:
        scores: (K, S) nats that sentence k loses with slice s: the loss of the smallest block that was taken away with the
            slice in it, shared equally among the block's slices.
        whole: (K,) log-likelihoods with all slices.
        without: (K,) log-likelihoods by a prompt without the volume.
        rows: forward passes of one row.
    """

    scores: torch.Tensor
    whole: torch.Tensor
    without: torch.Tensor
    rows: int


def occlude_slices(
    likelihood: Likelihood, slices: torch.Tensor, planes: torch.Tensor, blocks: int = 4, refined: int = 2
) -> OccludedSlices:
    """Take slices away in blocks of each plane, and divide the blocks that matter most until they are single slices.

    Args:
        likelihood: of the sentences; see `SentenceLikelihood`.
        slices: embeddings (S, D).
        planes: (S,) plane of each slice; slices of one plane are in the order of their depth.
        blocks: per plane, to begin with.
        refined: blocks per sentence that are divided in each round.
    """
    count, every = len(slices), tuple(range(len(slices)))
    first = [block for plane in planes.unique().tolist() for block in _divided(_of_plane(planes, plane), blocks)]
    found = _likelihoods(likelihood, slices, [(), every, *(block for block in first if block != every)])
    whole, without = found.pop(()), found[every]
    losses: dict[Block, torch.Tensor] = {block: whole - scores for block, scores in found.items() if block in first}
    rows, frontier = len(found) + 1, set(first)
    while parents := {block for block in _largest(losses, frontier, refined) if len(block) > 1}:
        children = [child for block in parents for child in _divided(block, 2)]
        losses |= {block: whole - scores for block, scores in _likelihoods(likelihood, slices, children).items()}
        rows += len(children)
        frontier = (frontier - parents) | set(children)
    scores = torch.zeros(len(whole), count)
    for block in sorted(losses, key=len, reverse=True):  # smaller blocks overwrite larger ones
        scores[:, list(block)] = (losses[block] / len(block))[:, None]
    return OccludedSlices(scores, whole, without, rows)


def _likelihoods(likelihood: Likelihood, slices: torch.Tensor, blocks: Sequence[Block]) -> dict[Block, torch.Tensor]:
    """Return the log-likelihoods (K,) without each block."""
    keep = torch.ones(len(blocks), len(slices), dtype=torch.bool)
    for row, block in zip(keep, blocks, strict=True):
        row[list(block)] = False
    return dict(zip(blocks, likelihood(slices, keep).float().cpu(), strict=True))


def _largest(losses: Mapping[Block, torch.Tensor], frontier: set[Block], count: int) -> set[Block]:
    """Return for each sentence the `count` undivided blocks with the largest loss per slice, in one set."""
    blocks = sorted(frontier)
    table = torch.stack([losses[block] / len(block) for block in blocks], dim=1)  # (K, blocks)
    best = table.topk(min(count, len(blocks)), dim=1)
    return {
        blocks[index]
        for row, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        for index, value in zip(row, values, strict=True)
        if value > 0
    }


def _of_plane(planes: torch.Tensor, plane: int) -> Block:
    return tuple((planes == plane).nonzero()[:, 0].tolist())


def _divided(block: Block, parts: int) -> Iterator[Block]:
    """Yield contiguous parts of a block, as equal as possible; fewer where the block has fewer slices."""
    parts = min(parts, len(block))
    for part in range(parts):
        yield block[part * len(block) // parts : (part + 1) * len(block) // parts]
