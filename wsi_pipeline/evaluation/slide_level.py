"""Slide accuracy, the Lecture's first attempt: whether there is tumour somewhere in a slide.

A slide is called positive iff at least one of its patches has F(I) >= t: iff its score, the
largest F of its patches, is at least t. The threshold t is chosen on the validation split; the
functions that choose it take nothing else.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from wsi_pipeline.errors import CatalogError, RunError
from wsi_pipeline.evaluation.binary import binary_metrics, evaluated


def slide_scores(slide_ids: Sequence[str], patches: pd.DataFrame) -> pd.Series:
    """The largest F of each slide's patches.

    Parameters
    ----------
    slide_ids : sequence of str
    patches : DataFrame
        ``slide_id, score``; a NaN score (unreadable patch) is passed over.

    Returns
    -------
    float64 Series, indexed by slide id
        -inf for a slide without patches: no tissue was found in it, so by the rule it is negative
        at every t. NaN where patches exist but none could be scored: nothing can be said.

    Raises
    ------
    CatalogError
        If a patch belongs to none of the slides.
    """
    best = patches.groupby("slide_id", observed=True)["score"].max().astype("float64")
    if strange := sorted(set(best.index) - set(slide_ids)):
        raise CatalogError(f"patches of {strange[:5]}: none of the slides to be evaluated")
    index = pd.Index(slide_ids, name="slide_id")
    return best.reindex(index).mask(~index.isin(best.index), -np.inf)


def accuracy_curve(labels, scores) -> pd.DataFrame:
    """Accuracy, sensitivity and specificity as functions of the threshold.

    Parameters
    ----------
    labels : array_like of int, shape (N,)
        1, 0, or -1 (unknown: left out).
    scores : array_like of float, shape (N,)
        As `slide_scores` gives them; NaN is left out.

    Returns
    -------
    DataFrame
        ``threshold, accuracy, sensitivity, specificity``, the threshold rising over the distinct
        scores, then inf, at which nothing is positive. A row holds from just above the threshold
        before it up to its own. Sensitivity is NaN without positives, specificity without
        negatives.
    """
    truth, score = evaluated(labels, scores)
    positive, negative = np.sort(score[truth]), np.sort(score[~truth])
    threshold = np.append(np.unique(score[np.isfinite(score)]), np.inf)
    tp = len(positive) - np.searchsorted(positive, threshold)
    tn = np.searchsorted(negative, threshold)
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {
                "threshold": threshold,
                "accuracy": (tp + tn) / len(score),
                "sensitivity": tp / len(positive),
                "specificity": tn / len(negative),
            }
        )


def choose_threshold(validation_curve: pd.DataFrame) -> float:
    """The threshold of best accuracy, as far as possible from where the accuracy changes.

    The best accuracy holds on whole intervals of t within [0, 1]: the middle of the widest is
    taken; of equally wide ones the lower, which misses less.

    Parameters
    ----------
    validation_curve : DataFrame
        `accuracy_curve` of the validation split, with slides of both labels.

    Returns
    -------
    float
        In [0, 1].

    Raises
    ------
    RunError
        If there is no slide in the curve, or a score outside [0, 1].
    """
    accuracy = validation_curve["accuracy"].to_numpy()
    steps = validation_curve["threshold"].to_numpy()[:-1]
    if not len(steps) or steps[0] < 0 or steps[-1] > 1:
        raise RunError(f"slide scores {steps.tolist()}: one or more are needed, all in [0, 1]")
    edges = np.concatenate([[0.0], steps, [1.0]])  # row i holds for edges[i] < t <= edges[i + 1]
    if edges[-2] == 1:  # "nothing is positive" would need t > 1
        accuracy = accuracy[:-1]
    change = np.diff(np.concatenate([[False], accuracy == accuracy.max(), [False]]).astype(int))
    low, high = edges[np.flatnonzero(change == 1)], edges[np.flatnonzero(change == -1)]
    widest = np.argmax(high - low)
    middle = (low[widest] + high[widest]) / 2
    return float(middle if middle > low[widest] else high[widest])


def slide_metrics(
    validation: pd.DataFrame, test: pd.DataFrame, fallback_threshold: float = 0.75
) -> dict:
    """Slide accuracy on the test split, at the threshold chosen on the validation split.

    Parameters
    ----------
    validation, test : DataFrame
        ``slide_id, label, score``: a row for each slide.
    fallback_threshold : float
        Taken when the validation split cannot choose: it lacks scored slides of one label. The
        result says so.

    Returns
    -------
    dict
        `binary_metrics` of the test split; ``threshold_from``: ``"validation"`` or
        ``"fallback"``, ``threshold_reason``: why it is the fallback, or None; and
        ``validation``: `binary_metrics` of the validation split, at the same threshold.

    Raises
    ------
    CatalogError
        If a slide is in both splits.
    """
    if shared := sorted(set(validation["slide_id"]) & set(test["slide_id"])):
        raise CatalogError(f"slides {shared[:5]} are in the validation and in the test split")
    truth, score = evaluated(validation["label"], validation["score"])
    chosen = 0 < truth.sum() < len(truth) and np.isfinite(score).any()
    threshold = (
        choose_threshold(accuracy_curve(validation["label"], validation["score"]))
        if chosen
        else fallback_threshold
    )
    slides = "slide" if truth.sum() == 1 else "slides"
    reason = (
        f"the validation split has {truth.sum()} scored {slides} with tumour and"
        f" {(~truth).sum()} without, {np.isfinite(score).sum()} of them with tissue: it needs both"
        " to choose a threshold"
    )
    return {
        **binary_metrics(test["label"], test["score"], threshold),
        "threshold_from": "validation" if chosen else "fallback",
        "threshold_reason": None if chosen else reason,
        "validation": binary_metrics(validation["label"], validation["score"], threshold),
    }
