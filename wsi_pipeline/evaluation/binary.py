"""Figures of a yes-or-no call at a threshold, shared by patches and slides."""

import numpy as np
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


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _why(n: int, positives: int) -> str:
    if n == 0:
        return "nothing with a known label was scored"
    return "no positive among those evaluated" if positives == 0 else "no negative among them"
