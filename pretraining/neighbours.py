"""Quality of embeddings without training on them: nearest neighbours and retrieval."""

import numpy as np


def _normalise(rows: np.ndarray) -> np.ndarray:
    """Return rows (N, D) at unit length, float32; rows of zeros stay zero."""
    rows = np.asarray(rows, dtype=np.float32)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def knn_accuracy(
    bank: np.ndarray,
    bank_labels: np.ndarray,
    queries: np.ndarray,
    query_labels: np.ndarray,
    neighbours: int = 20,
    temperature: float = 0.07,
    chunk: int = 512,
) -> float:
    """Return the share of queries whose label wins among their nearest neighbours, as in DINO's paper.

    Each neighbour has exp(cosine / temperature) votes. `lightly.utils.benchmarking.knn_predict` gives the same predictions
    without ties; among exact ties, such as blank slices, it chooses other neighbours, which would change recorded curves.

    Args:
        bank: Embeddings (N, D).
        bank_labels: Whole numbers from 0, (N,).
        queries: Embeddings (M, D).
        query_labels: Whole numbers from 0, (M,).
        neighbours: Number of neighbours that vote, at most N.
        temperature: Of the votes.
        chunk: Queries compared with the bank at once.
    """
    neighbours = min(neighbours, len(bank))
    bank, queries = _normalise(bank), _normalise(queries)
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    right = 0
    for start in range(0, len(queries), chunk):
        similarity = queries[start : start + chunk] @ bank.T  # (m, N)
        nearest = np.argpartition(-similarity, neighbours - 1, axis=1)[:, :neighbours]
        votes = np.exp(np.take_along_axis(similarity, nearest, axis=1) / temperature)
        scores = np.zeros((len(nearest), classes))
        np.add.at(scores, (np.arange(len(nearest))[:, None], bank_labels[nearest]), votes)
        right += int((scores.argmax(axis=1) == query_labels[start : start + chunk]).sum())
    return right / len(queries)


def retrieval_accuracy(first: np.ndarray, second: np.ndarray) -> float:
    """Return how often the nearest row by cosine is a row's own counterpart, averaged over both directions.

    Args:
        first: Embeddings (N, D).
        second: Embeddings (N, D); row i is the counterpart of row i of `first`.
    """
    similarity = _normalise(first) @ _normalise(second).T  # (N, N)
    own = np.arange(len(similarity))
    return float(((similarity.argmax(axis=1) == own).mean() + (similarity.argmax(axis=0) == own).mean()) / 2)
