"""Figures of a yes-or-no call at a threshold, shared by patches and slides.

There may be 10^8 patches. They are counted a part at a time, and ranked by sorting their scores
alone: scikit-learn's ROC AUC and average precision take some 100 bytes a row, these 15.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pandas as pd

from wsi_pipeline.errors import RunError

ROWS_AT_ONCE = 1 << 20


def evaluated(labels, scores) -> tuple[np.ndarray, np.ndarray]:
    """What can be evaluated: the label is known (not -1) and there is a score (not NaN).

    Scores of float32 stay so, all others become float64: see `is_called`.

    Parameters
    ----------
    labels : array_like of int, shape (N,)
        1 tumour, 0 no tumour, -1 unknown.
    scores : array_like of float, shape (N,)

    Returns
    -------
    truth : bool array, shape (M,)
    scores : float32 or float64 array, shape (M,)

    Raises
    ------
    RunError
        If a label is none of 1, 0, -1, or there are more of one than of the other.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if scores.dtype != np.float32:
        scores = scores.astype(np.float64)
    if labels.shape != scores.shape:
        raise RunError(f"{labels.shape} labels and {scores.shape} scores: each needs the other")
    if strange := set(np.unique(labels).tolist()) - {1, 0, -1}:
        raise RunError(f"labels {sorted(strange)}: a label is 1, 0 or -1")
    known = (labels >= 0) & ~np.isnan(scores)
    return labels[known] == 1, scores[known]


def is_called(score: np.ndarray, threshold: float) -> np.ndarray:
    """Whether each score is the threshold or more; it is never rounded to a score's precision."""
    return score >= np.float64(threshold)


def parts(count: int) -> Iterator[slice]:
    """Slices of so many rows, to be worked on one after the other."""
    return (slice(start, start + ROWS_AT_ONCE) for start in range(0, count, ROWS_AT_ONCE))


def by_slide(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each slide's rows, sorted by slide; rows that lie in this order already are not copied.

    Parameters
    ----------
    rows : DataFrame
        ``slide_id`` (in the order of its categories, if it has some) and other columns.
    """
    names = rows["slide_id"].astype("category").cat
    codes = names.codes.to_numpy()
    if (codes[1:] < codes[:-1]).any():
        order = np.argsort(codes, kind="stable")
        rows, codes = rows.iloc[order], codes[order]
    starts = [0, *(np.flatnonzero(codes[1:] != codes[:-1]) + 1).tolist(), len(codes)]
    for start, stop in pairwise(starts if len(codes) else []):
        yield names.categories[codes[start]], rows.iloc[start:stop]


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
    called = is_called(score, threshold)
    tp, predicted = int((truth & called).sum()), int(called.sum())
    fp, fn = predicted - tp, positives - tp
    tn = n - positives - fp
    both = 0 < positives < n
    roc_auc, average_precision = _ranking(truth, score) if both else (None, None)
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
        "roc_auc": roc_auc,
        "average_precision": average_precision,
        "undefined": None if both else _why(n, positives),
    }


def _ranking(truth: np.ndarray, score: np.ndarray) -> tuple[float, float]:
    """ROC AUC and average precision of rows of both classes.

    AUC is the share of pairs of a positive and a negative that the positive wins, ties half.
    Average precision, the sum over thresholds of (R_k - R_k-1) P_k, is the mean over the positives
    of the precision at their own score.
    """
    positive, negative = np.sort(score[truth]), np.sort(score[~truth])
    won, precision = 0, 0.0
    for part in parts(len(positive)):
        below = np.searchsorted(negative, positive[part], "left")
        won += int(below.sum() + np.searchsorted(negative, positive[part], "right").sum())
        tp = len(positive) - np.searchsorted(positive, positive[part], "left")
        precision += float((tp / (tp + len(negative) - below)).sum())
    return won / (2 * len(positive) * len(negative)), precision / len(positive)


def call_counts(labels, scores, points: int = 2000) -> pd.DataFrame:
    """True and false positives at falling thresholds, for ROC and precision-recall curves.

    Parameters
    ----------
    labels, scores
        See `binary_metrics`.
    points : int
        Thresholds are the distinct scores; where there are more positives than this, or more
        negatives, those scores at every so many of them: no share of either class grows by much
        more than 1 / `points` from row to row but at a tie.

    Returns
    -------
    DataFrame
        ``threshold`` (the first inf, the last the lowest score), ``tp, fp``.
    """
    truth, score = evaluated(labels, scores)
    ranked = [np.sort(score[truth == positive]) for positive in (True, False)]
    chosen = [values[:: max(1, len(values) // points)] for values in ranked]
    threshold = np.append(np.inf, np.unique(np.concatenate(chosen))[::-1]).astype(score.dtype)
    tp, fp = (len(values) - np.searchsorted(values, threshold) for values in ranked)
    return pd.DataFrame({"threshold": threshold, "tp": tp, "fp": fp})


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
    edges, counts, total = _by_bin(*_probabilities(labels, probabilities), bins)
    n = counts.sum(axis=1)
    with np.errstate(invalid="ignore"):
        mean, share = total / n, counts[:, 1] / n
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
    edges, counts, _ = _by_bin(*_probabilities(labels, probabilities), bins)
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
    squares = (
        float((np.subtract(probability[part], truth[part], dtype=np.float64) ** 2).sum())
        for part in parts(len(truth))
    )
    return {
        "brier": sum(squares) / len(truth),
        "calibration_error": float((table["n"] * gap).sum() / len(truth)),
    }


def _by_bin(truth: np.ndarray, probability: np.ndarray, bins: int):
    """The bins' edges, rows without and with tumour in each, and the sum of its probabilities."""
    edges = np.linspace(0, 1, bins + 1)
    counts, total = np.zeros((bins, 2), np.int64), np.zeros(bins)
    for part in parts(len(truth)):
        row = np.searchsorted(edges[1:-1], probability[part])
        counts += np.bincount(2 * row + truth[part], minlength=2 * bins).reshape(bins, 2)
        total += np.bincount(row, weights=probability[part], minlength=bins)
    return edges, counts, total


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
