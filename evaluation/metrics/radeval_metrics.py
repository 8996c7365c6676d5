"""RadGraph-F1, RaTEScore and GREEN, by the library RadEval."""

import warnings
from collections.abc import Sequence

import numpy as np

from samf.evaluation.metrics.sampled_metric import SampledMetric

# Keys of the per-sample values that the library returns for each metric.
RADEVAL_METRICS = {
    "radgraph": ("radgraph_simple", "radgraph_partial", "radgraph_complete"),
    "ratescore": ("ratescore",),
    "green": ("green",),
}
RADEVAL_REMEDY = (
    "RadGraph-F1, RaTEScore and GREEN are computed by RadEval: pip install radeval, then name them (radeval). It is not an "
    "extra of this package: in radeval 2.2.1 none of the three runs with numpy 2 (see docs/reference/evaluation.md)."
)


def check_radeval(metrics: Sequence[str]) -> None:
    """Raise ValueError for a name that isn't in `RADEVAL_METRICS`."""
    unknown = sorted(set(metrics) - set(RADEVAL_METRICS))
    if unknown:
        raise ValueError(f"radeval names {unknown}; expected some of {', '.join(RADEVAL_METRICS)}.")


def radeval_samples(
    predictions: Sequence[str], references: Sequence[str], metrics: Sequence[str]
) -> dict[str, SampledMetric]:
    """Return RadGraph-F1, RaTEScore and GREEN by sample; RadEval downloads their models.

    All three were developed for chest X-ray reports. A pair with an empty text scores 0.

    Args:
        predictions: generated reports, (N,).
        references: one reference report for each.
        metrics: names from `RADEVAL_METRICS`.

    Raises:
        ImportError: RadEval isn't installed.
        ValueError: `metrics` has an unknown name.
    """
    check_radeval(metrics)
    try:
        from radeval import RadEval
    except ImportError as error:
        raise ImportError(RADEVAL_REMEDY) from error
    filled = [k for k, pair in enumerate(zip(predictions, references, strict=True)) if all(s.strip() for s in pair)]
    values = {key: np.zeros(len(predictions)) for name in metrics for key in RADEVAL_METRICS[name]}
    if filled and metrics:
        with warnings.catch_warnings():  # the library turns all warnings off globally
            scorer = RadEval(metrics=list(metrics), per_sample=True, show_progress=False)
            scores = scorer(refs=[references[k] for k in filled], hyps=[predictions[k] for k in filled])
        for key, column in values.items():
            column[filled] = scores[key]
    return {key: SampledMetric.mean(column) for key, column in values.items()}
