"""GLUE's metrics for `evaluate`, without the network.

`evaluate.load("glue", "mrpc")` downloads the metric's code from the Hub at run time. [`glue_metric`] needs no download
and returns the same keys and values, with one exception: a correlation with a constant is undefined, and is 0.0 here
rather than NaN. This keeps a run's logs valid JSON, and its checkpoints comparable.
"""

import logging
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef


logger = logging.getLogger(__name__)

GLUE_METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews_correlation",),
    "hans": ("accuracy",),
    "mnli": ("accuracy",),
    "mnli_matched": ("accuracy",),
    "mnli_mismatched": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "qnli": ("accuracy",),
    "qqp": ("accuracy", "f1"),
    "rte": ("accuracy",),
    "sst2": ("accuracy",),
    "stsb": ("pearson", "spearmanr"),
    "wnli": ("accuracy",),
}
"""The metrics of each task."""


class GlueMetric(evaluate.Metric):
    """Score predictions on a GLUE task (Wang et al., ICLR 2019) as the Hub's `glue` metric does, without a download.

    Two scores can be undefined, and are then 0.0, with a warning in the log: a correlation, if all predictions or all
    references are the same; F1, if neither contains a positive. A regression's predictions that contain NaN or
    infinity score NaN, with a warning in the log: the model has diverged.

    Args:
        config_name (`str`): The task, one of `GLUE_METRICS`.
        kwargs: Arguments of `evaluate.Metric`: `keep_in_memory`, `cache_dir`, `num_process`, `process_id`,
            `experiment_id` and so on.

    Raises:
        ValueError: If there is no such task, or, in `compute`, there is nothing to score.
    """

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in GLUE_METRICS:
            raise ValueError(f"The task must be one of {sorted(GLUE_METRICS)}, got {self.config_name!r}.")
        value = datasets.Value("float32" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description=f"Scores of GLUE's {self.config_name}: {', '.join(GLUE_METRICS[self.config_name])}.",
            citation="Wang et al., GLUE: A Multi-Task Benchmark and Analysis Platform, ICLR 2019",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        if len(references) == 0:
            raise ValueError("At least one prediction and one reference are needed, got none.")
        return {name: _score(name, predictions, references) for name in GLUE_METRICS[self.config_name]}


def glue_metric(task_name: str, **kwargs: Any) -> GlueMetric:
    """Build the metric of a GLUE task; use it in place of `evaluate.load("glue", task_name)`.

    Args:
        task_name (`str`): One of `GLUE_METRICS`: `"cola"`, `"mrpc"`, `"sst2"`, `"stsb"` and so on.
        kwargs: Arguments of `evaluate.Metric`. With `keep_in_memory=True`, predictions are not written to its cache.

    Returns:
        [`GlueMetric`]: Its `compute(predictions=..., references=...)` returns a `dict[str, float]`.

    Raises:
        ValueError: If there is no such task.

    Example:
        >>> glue_metric("sst2").compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
        {'accuracy': 0.75}
    """
    return GlueMetric(config_name=task_name, **kwargs)


def _score(name: str, predictions: np.ndarray, references: np.ndarray) -> float:
    if name == "accuracy":
        return float((predictions == references).mean())
    if name == "f1":
        if not (predictions == 1).any() and not (references == 1).any():
            logger.warning("f1 is undefined, since no prediction and no reference is positive: 0.0 is reported.")
        return float(f1_score(references, predictions, zero_division=0.0))
    sides = {"predictions": predictions.astype(np.float64), "references": references.astype(np.float64)}
    if not all(np.isfinite(side).all() for side in sides.values()):
        logger.warning("%s is NaN, since the predictions or the references contain NaN or infinity.", name)
        return float("nan")
    if any(np.ptp(side) == 0 for side in sides.values()):
        logger.warning("%s is undefined, since all predictions or all references are the same: 0.0 is reported.", name)
        return 0.0
    if name == "matthews_correlation":
        return float(matthews_corrcoef(references, predictions))
    correlation = pearsonr if name == "pearson" else spearmanr
    return float(correlation(sides["predictions"], sides["references"]).statistic)
