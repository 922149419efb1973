"""Metrics of classification, from integer labels, and of regression. Pure."""

from __future__ import annotations

import numpy as np


def classification_metrics(labels: np.ndarray, predictions: np.ndarray, num_labels: int) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation; labels and predictions are (examples,) ints in [0, num_labels).

    `f1` is the mean over the labels that occur, and for two labels that of label 1, as GLUE reports it.
    """
    confusion = np.zeros((num_labels, num_labels))
    np.add.at(confusion, (labels, predictions), 1)
    f1 = _f1(confusion)
    occurs = (confusion.sum(0) + confusion.sum(1)) > 0
    return {
        "accuracy": float(np.trace(confusion) / max(1, confusion.sum())),
        "f1": float(f1[1]) if num_labels == 2 else float(f1[occurs].mean()),
        "matthews": matthews(confusion),
    }


def matthews(confusion: np.ndarray) -> float:
    """Matthews' correlation of a confusion matrix (labels x predictions), for any number of labels (Gorodkin 2004)."""
    total, right = confusion.sum(), np.trace(confusion)
    true, predicted = confusion.sum(1), confusion.sum(0)
    below = np.sqrt(float(total**2 - predicted @ predicted) * float(total**2 - true @ true))
    return float((right * total - true @ predicted) / below) if below else 0.0


def _f1(confusion: np.ndarray) -> np.ndarray:
    """F1 of each label; 0 where a label neither occurs nor is predicted."""
    return 2 * np.diag(confusion) / np.maximum(1, confusion.sum(0) + confusion.sum(1))


def regression_metrics(values: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation and the root of the mean squared error; both (examples,) floats."""
    return {
        "pearson": pearson(values, predictions),
        "spearman": pearson(ranks(values), ranks(predictions)),
        "rmse": float(np.sqrt(np.mean((values - predictions) ** 2))),
    }


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """The correlation of two (examples,) arrays; 0 where one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    below = np.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / below if below else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """(examples,) fp64: the place of each value in their order, from 1; equal values share the mean of their places."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]
