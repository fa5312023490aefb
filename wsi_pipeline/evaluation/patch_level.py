"""Patch accuracy, the Lecture's second attempt: whether each patch is called rightly."""

import pandas as pd

from wsi_pipeline.evaluation.binary import binary_metrics, by_slide, calibration_metrics


def patch_metrics(labels, scores, threshold: float = 0.75) -> dict:
    """Accuracy, ROC AUC, average precision, confusion and calibration of patches.

    A patch I is called positive iff F(I) >= `threshold`, in the Lecture 0.75.

    Parameters
    ----------
    labels : array_like of int, shape (N,)
        1, 0, or -1 (unknown: left out and counted).
    scores : array_like of float, shape (N,)
        F, in [0, 1]; NaN: unreadable patch, left out and counted.
    threshold : float

    Returns
    -------
    dict
        See `binary_metrics`; and ``brier, calibration_error``, see `calibration_metrics`.

    Raises
    ------
    RunError
        If a score is outside [0, 1].
    """
    return {
        **binary_metrics(labels, scores, threshold),
        **calibration_metrics(labels, scores),
    }


def patch_metrics_by_slide(patches: pd.DataFrame, threshold: float = 0.75) -> pd.DataFrame:
    """`patch_metrics` of each slide's patches.

    Parameters
    ----------
    patches : DataFrame
        ``slide_id, label, score``: a row for each patch.
    threshold : float

    Returns
    -------
    DataFrame
        ``slide_id`` and the keys of `patch_metrics`; a row for each slide, sorted. A figure
        that is undefined (a slide without tumour has no ROC AUC) is missing.
    """
    rows = [
        {"slide_id": slide_id, **patch_metrics(slide["label"], slide["score"], threshold)}
        for slide_id, slide in by_slide(patches)
    ]
    columns = ["slide_id", *patch_metrics([], [], threshold)]
    figures = ["accuracy", "sensitivity", "specificity", "roc_auc", "average_precision"]
    figures += ["brier", "calibration_error"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(figures, "float64"))
