"""Metrics of classification against scikit-learn's, of regression against scipy's."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from finetune.metrics import classification_metrics, regression_metrics


@pytest.mark.parametrize("num_labels", [2, 3, 10])
@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_those_of_scikit_learn(num_labels, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_labels, 200)
    predictions = np.where(rng.random(200) < 0.6, labels, rng.integers(0, num_labels, 200))
    found = classification_metrics(labels, predictions, num_labels)
    average = "binary" if num_labels == 2 else "macro"
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert found["f1"] == pytest.approx(f1_score(labels, predictions, average=average))
    assert found["matthews"] == pytest.approx(matthews_corrcoef(labels, predictions))


def test_one_answer_for_everything_has_no_correlation():
    found = classification_metrics(np.array([0, 1, 0, 1]), np.zeros(4, int), 2)
    assert found == {"accuracy": 0.5, "f1": 0.0, "matthews": 0.0}


def test_label_that_does_not_occur_does_not_lower_the_mean_f1():
    found = classification_metrics(np.array([0, 1, 1]), np.array([0, 1, 1]), 5)
    assert found == {"accuracy": 1.0, "f1": 1.0, "matthews": 1.0}


@pytest.mark.parametrize("seed", range(5))
def test_correlations_are_those_of_scipy_with_equal_values_too(seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 6, 100) / 2
    predictions = np.round(values + rng.normal(size=100), 1)
    found = regression_metrics(values, predictions)
    assert found["pearson"] == pytest.approx(pearsonr(values, predictions).statistic)
    assert found["spearman"] == pytest.approx(spearmanr(values, predictions).statistic)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((values - predictions) ** 2)))


def test_constant_prediction_has_no_correlation():
    assert regression_metrics(np.array([1.0, 2.0]), np.array([1.0, 1.0]))["pearson"] == 0.0
