"""The metrics against naive references in numpy, and against closed forms."""

import logging
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_adaprune.metrics import GLUE_METRICS, glue_metric


def compute(task: str, predictions: Any, references: Any) -> dict[str, float]:
    return glue_metric(task, keep_in_memory=True).compute(predictions=predictions, references=references)


def naive_counts(predictions: np.ndarray, references: np.ndarray) -> tuple[float, float, float, float]:
    """True positives, false positives, false negatives, true negatives."""
    pairs = list(zip(predictions.tolist(), references.tolist(), strict=True))
    tp, fp, fn, tn = (float(pairs.count(pair)) for pair in [(1, 1), (1, 0), (0, 1), (0, 0)])
    return tp, fp, fn, tn


def naive_pearson(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64), y.astype(np.float64)
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    return float(covariance / np.sqrt(((x - x.mean()) ** 2).mean() * ((y - y.mean()) ** 2).mean()))


def naive_ranks(x: np.ndarray) -> np.ndarray:
    """The rank of each value, ties sharing the mean of theirs."""
    return np.array([(x < value).sum() + ((x == value).sum() + 1) / 2 for value in x])


@pytest.fixture
def binary() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    references = rng.integers(0, 2, 101)
    return np.where(rng.random(101) < 0.7, references, 1 - references), references


@pytest.fixture
def real() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    references = (rng.integers(0, 26, 101) / 5).astype(np.float32)  # ties, as in STS-B
    return (references + rng.normal(size=101)).astype(np.float32), references


def test_keys_are_those_of_the_hubs_metric() -> None:
    expected = {"cola": {"matthews_correlation"}, "stsb": {"pearson", "spearmanr"}}
    expected |= {task: {"accuracy", "f1"} for task in ("mrpc", "qqp")}
    accuracy_alone = "hans mnli mnli_matched mnli_mismatched qnli rte sst2 wnli"
    expected |= {task: {"accuracy"} for task in accuracy_alone.split()}
    assert {task: set(compute(task, [0, 1, 1], [0, 1, 0])) for task in GLUE_METRICS} == expected


def test_accuracy_is_the_share_of_equal_labels(binary: tuple[np.ndarray, np.ndarray]) -> None:
    tp, _, _, tn = naive_counts(*binary)
    assert compute("sst2", *binary)["accuracy"] == pytest.approx((tp + tn) / 101)
    assert compute("mnli", [0, 1, 2, 2], [0, 1, 2, 0]) == {"accuracy": 0.75}


def test_f1_equals_a_count_of_hits_and_misses(binary: tuple[np.ndarray, np.ndarray]) -> None:
    tp, fp, fn, tn = naive_counts(*binary)
    scores = compute("mrpc", *binary)
    assert scores["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    assert scores["accuracy"] == pytest.approx((tp + tn) / 101)


def test_f1_of_three_examples_is_as_by_hand() -> None:
    assert compute("qqp", [1, 1, 0], [1, 0, 0])["f1"] == pytest.approx(2 / 3)
    assert compute("qqp", [0, 0, 1], [0, 1, 1])["f1"] == pytest.approx(2 / 3)
    assert compute("qqp", [0, 0, 0], [0, 1, 1])["f1"] == 0.0


def test_matthews_correlation_equals_its_closed_form(binary: tuple[np.ndarray, np.ndarray]) -> None:
    tp, fp, fn, tn = naive_counts(*binary)
    expected = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert compute("cola", *binary) == {"matthews_correlation": pytest.approx(expected)}


def test_correlations_equal_naive_ones_with_ties(real: tuple[np.ndarray, np.ndarray]) -> None:
    predictions, references = real
    scores = compute("stsb", predictions, references)
    assert scores["pearson"] == pytest.approx(naive_pearson(predictions, references))
    expected = naive_pearson(naive_ranks(predictions), naive_ranks(references))
    assert scores["spearmanr"] == pytest.approx(expected)


def test_a_monotone_curve_has_a_perfect_spearman_only() -> None:
    scores = compute("stsb", [0.0, 1.0, 8.0, 27.0], [0.0, 1.0, 2.0, 3.0])
    assert scores["spearmanr"] == pytest.approx(1.0)
    assert scores["pearson"] < 0.95


@pytest.mark.parametrize("task", ["stsb", "cola"])
@pytest.mark.parametrize(("predictions", "references"), [([1, 1, 1], [0, 1, 0]), ([0, 1, 0], [1, 1, 1]), ([1], [1])])
def test_correlation_with_a_constant_is_zero_and_logged_once(
    task: str, predictions: list[int], references: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_adaprune"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = compute(task, predictions, references)
    assert set(scores.values()) == {0.0}
    assert [record.getMessage().split()[0] for record in caplog.records] == list(scores)
    assert not caught


def test_f1_without_any_positive_is_zero_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert compute("mrpc", [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}
    assert "no prediction and no reference is positive" in caplog.text


def test_two_examples_are_enough_for_a_correlation() -> None:
    assert compute("stsb", [0.0, 1.0], [3.0, 2.0]) == {"pearson": pytest.approx(-1), "spearmanr": pytest.approx(-1)}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_predictions_of_a_diverged_model_score_nan_and_say_so(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    assert all(math.isnan(score) for score in compute("stsb", [0.0, bad, 1.0], [0.0, 1.0, 2.0]).values())
    assert "contain NaN or infinity" in caplog.text


def test_scores_are_plain_floats(real: tuple[np.ndarray, np.ndarray]) -> None:
    assert {type(score) for score in compute("stsb", *real).values()} == {float}
    assert {type(score) for score in compute("mrpc", [0, 1], [0, 1]).values()} == {float}


def test_batches_add_up_to_the_whole(binary: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    metric = glue_metric("mrpc", cache_dir=str(tmp_path))
    for part in np.array_split(np.arange(101), 4):
        metric.add_batch(predictions=binary[0][part], references=binary[1][part])
    assert metric.compute() == compute("mrpc", *binary)


def test_predictions_do_not_stay_in_the_cache(tmp_path: Path) -> None:
    metric = glue_metric("sst2", cache_dir=str(tmp_path))
    assert metric.compute(predictions=[0, 1], references=[0, 1]) == {"accuracy": 1.0}
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".arrow"]


def test_two_metrics_of_one_task_do_not_mix(tmp_path: Path) -> None:
    first, second = (glue_metric("sst2", cache_dir=str(tmp_path)) for _ in range(2))
    first.add_batch(predictions=[0, 0], references=[0, 0])
    second.add_batch(predictions=[1, 1], references=[0, 0])
    assert (first.compute(), second.compute()) == ({"accuracy": 1.0}, {"accuracy": 0.0})


def test_many_processes_share_one_score(tmp_path: Path) -> None:
    def score(rank: int) -> Any:  # the processes of `evaluate` meet in the file system: threads will do
        metric = glue_metric("sst2", cache_dir=str(tmp_path), num_process=2, process_id=rank, experiment_id="run")
        return metric.compute(predictions=[rank, rank, 1], references=[0, 0, 1])

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(score, range(2))) == [{"accuracy": pytest.approx(4 / 6)}, None]


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"must be one of \['cola', .*'wnli'\], got 'sts-b'"):
        glue_metric("sts-b")


def test_nothing_to_score_raises() -> None:
    with pytest.raises(ValueError, match="At least one prediction"):
        compute("sst2", [], [])
