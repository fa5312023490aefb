"""Figures of a yes-or-no call at a threshold, shared by patches and slides."""

import numpy as np
import pandas as pd
from sklearn.metrics import average_precision_score, roc_auc_score

from wsi_pipeline.errors import RunError


def evaluated(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    """What can be evaluated: the label is known (not -1) and there is a score (not NaN).

    Scores become float64, so that a threshold is never rounded to the precision of a float32
    score before the two are compared.

    Parameters
    ----------
    labels : array_like of int, shape (N,)
        1 tumour, 0 no tumour, -1 unknown.
    scores : array_like of float, shape (N,)

    Returns
    -------
    truth : bool array, shape (M,)
    scores : float64 array, shape (M,)

    Raises
    ------
    RunError
        If a label is none of 1, 0, -1, or there are more of one than of the other.
    """
    labels, scores = np.asarray(labels), np.asarray(scores, np.float64)
    if labels.shape != scores.shape:
        raise RunError(f"{labels.shape} labels and {scores.shape} scores: each needs the other")
    if strange := set(np.unique(labels).tolist()) - {1, 0, -1}:
        raise RunError(f"labels {sorted(strange)}: a label is 1, 0 or -1")
    known = (labels >= 0) & ~np.isnan(scores)
    return labels[known] == 1, scores[known]


def binary_metrics(labels, scores, threshold: float) -> dict:
    """Figures of the call "positive iff score >= threshold".

    Parameters
    ----------
    labels : array_like of int, shape (N,)
        1, 0, or -1 (unknown: left out and counted).
    scores : array_like of float, shape (N,)
        NaN: not scored, left out and counted; -inf: negative at every threshold.
    threshold : float

    Returns
    -------
    dict
        ``threshold``; ``n`` and ``positives`` evaluated; ``unscored`` and ``unknown``, the
        numbers left out; ``tp, fp, tn, fn``; ``accuracy, sensitivity, specificity, roc_auc,
        average_precision``; ``undefined``, the reason why some of these five are None, or None.
        Without both classes ROC AUC is undefined, and average precision is left undefined too:
        it would be 1 whatever the scores.
    """
    truth, score = evaluated(labels, scores)
    n, positives = len(truth), int(truth.sum())
    called = score >= threshold
    tn, fp, fn, tp = np.bincount(2 * truth + called, minlength=4).tolist()
    both = 0 < positives < n
    finite = np.nan_to_num(score)  # scikit-learn refuses -inf; the order is the same
    known = np.asarray(labels) >= 0
    return {
        "threshold": float(threshold),
        "n": n,
        "positives": positives,
        "unscored": int(known.sum()) - n,
        "unknown": int((~known).sum()),
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "accuracy": _share(tp + tn, n),
        "sensitivity": _share(tp, positives),
        "specificity": _share(tn, n - positives),
        "roc_auc": float(roc_auc_score(truth, finite)) if both else None,
        "average_precision": float(average_precision_score(truth, finite)) if both else None,
        "undefined": None if both else _why(n, positives),
    }


def reliability_table(labels, probabilities, bins: int = 10) -> pd.DataFrame:
    """How often rows of each predicted probability are positive.

    Parameters
    ----------
    labels : array_like of int, shape (N,)
        1, 0, or -1 (unknown: left out).
    probabilities : array_like of float, shape (N,)
        In [0, 1]; NaN: not scored, left out.
    bins : int
        Of equal width. A bin holds its upper edge, the first one 0 as well.

    Returns
    -------
    DataFrame
        ``low, high`` (a bin's edges), ``n``, ``mean_probability``, ``share_positive``; a row for
        each bin, the last two NaN in an empty one.

    Raises
    ------
    RunError
        If a probability is outside [0, 1].
    """
    truth, probability, edges, row = _binned(labels, probabilities, bins)
    n = np.bincount(row, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(row, weights=probability, minlength=bins) / n
        share = np.bincount(row, weights=truth, minlength=bins) / n
    columns = {"low": edges[:-1], "high": edges[1:], "n": n}
    return pd.DataFrame({**columns, "mean_probability": mean, "share_positive": share})


def score_counts(labels, probabilities, bins: int = 1000) -> pd.DataFrame:
    """How many positive and negative rows lie in each bin of probability.

    Histogram, ROC and precision-recall curve follow from it, to the width of a bin.

    Parameters
    ----------
    labels, probabilities, bins
        See `reliability_table`.

    Returns
    -------
    DataFrame
        ``low, high`` (a bin's edges), ``positive``, ``negative``; a row for each bin.

    Raises
    ------
    RunError
        If a probability is outside [0, 1].
    """
    truth, _, edges, row = _binned(labels, probabilities, bins)
    counts = np.bincount(2 * row + truth, minlength=2 * bins).reshape(bins, 2)
    return pd.DataFrame(
        {"low": edges[:-1], "high": edges[1:], "positive": counts[:, 1], "negative": counts[:, 0]}
    )


def calibration_metrics(labels, probabilities, bins: int = 10) -> dict:
    """Whether probabilities can be taken at their word.

    Parameters
    ----------
    labels, probabilities, bins
        See `reliability_table`.

    Returns
    -------
    dict
        ``brier``: mean of (p - y)^2 over the rows, y being 1 or 0. ``calibration_error``: the
        expected calibration error, sum over bins of n_b / n |mean p - share positive| (Guo et
        al., On calibration of modern neural networks, ICML 2017, there of the confidence in the
        predicted class, here of the probability of the positive one). None without rows.

    Raises
    ------
    RunError
        If a probability is outside [0, 1].
    """
    truth, probability = _probabilities(labels, probabilities)
    if not len(truth):
        return {"brier": None, "calibration_error": None}
    table = reliability_table(labels, probabilities, bins)
    gap = (table["mean_probability"] - table["share_positive"]).abs()
    return {
        "brier": float(np.mean((probability - truth) ** 2)),
        "calibration_error": float((table["n"] * gap).sum() / len(truth)),
    }


def _binned(labels, probabilities, bins: int):
    """Truth, probabilities, the bins' edges, and the bin of each row."""
    truth, probability = _probabilities(labels, probabilities)
    edges = np.linspace(0, 1, bins + 1)
    return truth, probability, edges, np.searchsorted(edges[1:-1], probability)


def _probabilities(labels, probabilities) -> tuple[np.ndarray, np.ndarray]:
    truth, probability = evaluated(labels, probabilities)
    outside = probability[(probability < 0) | (probability > 1)]
    if len(outside):
        raise RunError(f"probability {outside[0]:g}: a probability is in [0, 1]")
    return truth, probability


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _why(n: int, positives: int) -> str:
    if n == 0:
        return "nothing with a known label was scored"
    return "no positive among those evaluated" if positives == 0 else "no negative among them"
