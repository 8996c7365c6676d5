"""How good embeddings are, without training anything on them: nearest neighbours and retrieval."""

import numpy as np


def unit(x: np.ndarray) -> np.ndarray:
    """Rows (N, D) at length one, as float32; a row of zeros stays so."""
    x = np.asarray(x, dtype=np.float32)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    neighbours: int = 20,
    temperature: float = 0.07,
    chunk: int = 512,
) -> float:
    """Share of queries whose label wins among their nearest neighbours, each with exp(cosine / temperature) votes.

    The classifier of DINO's paper. bank (N, D), queries (M, D), labels (N,) and (M,) whole numbers from 0.
    """
    neighbours = min(neighbours, len(bank))
    bank, queries = unit(bank), unit(queries)
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    right = 0
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ bank.T  # (m, N)
        nearest = np.argpartition(-similarity, neighbours - 1, axis=1)[:, :neighbours]
        votes = np.exp(np.take_along_axis(similarity, nearest, axis=1) / temperature)
        load_stats = np.zeros((len(nearest), classes))
        np.add.at(load_stats, (np.arange(len(nearest))[:, None], bank_labels[nearest]), votes)
        right += int((load_stats.argmax(axis=1) == query_labels[start : start + chunk]).sum())
    return right / len(queries)


def retrieval_accuracy(first: np.ndarray, second: np.ndarray) -> float:
    """Share of rows of `first` (N, D) whose nearest row of `second` by cosine is their own, and the other way round."""
    similarity = unit(first) @ unit(second).T  # (N, N)
    own = np.arange(len(similarity))
    return float(((similarity.argmax(axis=1) == own).mean() + (similarity.argmax(axis=0) == own).mean()) / 2)
