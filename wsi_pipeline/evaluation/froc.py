"""FROC, the Lecture's third attempt: is each tumour found, and with how many false positives.

With F(I) the probability that the model gives patch I:

- sensitivity(t) = share of all tumours, over all slides, that hold at least one patch I with
  F(I) >= t;
- AvgFP(t) = mean number of patches I with F(I) >= t in a non-cancerous slide.

A tumour (lesion) is one connected annotated region; it holds a patch iff the patch's inner square
intersects it. False positives within tumour slides are not counted. The Lecture defines no
interpolation between thresholds and no score: see `sensitivity_at` and `froc_metrics`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from wsi_pipeline.errors import RunError

AVERAGE_FPS = (0.25, 0.5, 1, 2, 4, 8)


@dataclass(frozen=True, eq=False)
class FrocCurve:
    """Sensitivity against average false positives.

    Parameters
    ----------
    table : DataFrame
        ``threshold`` (falling, the first inf), ``sensitivity`` in [0, 1], ``average_fps``; both
        rise from 0. Empty if undefined.
    lesions : int
        The lesions that sensitivity is a share of.
    normal_slides : int
        The slides that false positives are averaged over.
    undefined : str, optional
        Why there is no curve.
    """

    table: pd.DataFrame
    lesions: int
    normal_slides: int
    undefined: str | None = None


def lesion_scores(patches: pd.DataFrame, lesion_ids: Mapping[str, Sequence[int]]) -> pd.DataFrame:
    """The largest F over the patches that each lesion holds.

    Parameters
    ----------
    patches : DataFrame
        ``slide_id``, ``lesions`` (list of the ids of all lesions that the patch's inner square
        intersects), ``score`` (NaN: unreadable).
    lesion_ids : mapping
        For each slide the ids of all its lesions, also of those without patches.

    Returns
    -------
    DataFrame
        ``slide_id, lesion_id, score, n_patches``; a row for each lesion, in the order given.
        ``n_patches`` counts its scored patches; where there are none the score is -inf: never
        found.

    Raises
    ------
    RunError
        If a patch names a lesion that is not among `lesion_ids`.
    """
    pairs = patches.loc[patches["lesions"].map(len) > 0, ["slide_id", "lesions", "score"]]
    pairs = pairs.explode("lesions").astype({"lesions": "int64", "score": "float64"})
    found = pairs.groupby(["slide_id", "lesions"], observed=True)["score"].agg(["max", "count"])
    rows = [(slide, lesion) for slide, lesions in lesion_ids.items() for lesion in lesions]
    every = pd.MultiIndex.from_frame(pd.DataFrame(rows, columns=["slide_id", "lesion_id"]))
    if len(strange := found.index.difference(every)):
        raise RunError(
            f"patches name lesions {strange[:5].tolist()} (slide, lesion) that their annotations"
            " do not hold: the patch index was made from others"
        )
    found = found.reindex(every)
    return pd.DataFrame(
        {"score": found["max"].fillna(-np.inf), "n_patches": found["count"].fillna(0).astype(int)},
        index=every,
    ).reset_index()


def lecture_froc(lesion_scores, normal_scores, normal_slides: int) -> FrocCurve:
    """The FROC curve at every distinct threshold.

    Parameters
    ----------
    lesion_scores : array_like of float, shape (L,)
        The largest F of each lesion, over all slides; -inf: never found.
    normal_scores : array_like of float, shape (N,)
        F of all patches of all non-cancerous slides together; NaN (unreadable) is no false
        positive.
    normal_slides : int
        How many these slides are, those without patches included.

    Returns
    -------
    FrocCurve
        Undefined without lesions or without non-cancerous slides.
    """
    lesion = np.sort(np.asarray(lesion_scores, np.float64))
    normal = np.asarray(normal_scores, np.float64)
    normal = np.sort(normal[~np.isnan(normal)])
    if not len(lesion) or not normal_slides:
        missing = "lesion" if not len(lesion) else "slide without tumour"
        empty = pd.DataFrame(columns=["threshold", "sensitivity", "average_fps"], dtype="float64")
        return FrocCurve(empty, len(lesion), normal_slides, f"there is no {missing} to evaluate")
    scores = np.concatenate([lesion[np.isfinite(lesion)], normal])
    threshold = np.append(np.unique(scores), np.inf)[::-1]
    table = pd.DataFrame(
        {
            "threshold": threshold,
            "sensitivity": (len(lesion) - np.searchsorted(lesion, threshold)) / len(lesion),
            "average_fps": (len(normal) - np.searchsorted(normal, threshold)) / normal_slides,
        }
    )
    return FrocCurve(table, len(lesion), normal_slides)


def sensitivity_at(curve: FrocCurve, average_fps: float) -> float | None:
    """The largest sensitivity that is reached with at most `average_fps` false positives.

    A step function: only what some threshold does reach counts, nothing is interpolated.

    Returns
    -------
    float or None
        None if the curve is undefined.
    """
    if curve.undefined:
        return None
    last = np.searchsorted(curve.table["average_fps"], average_fps, side="right") - 1
    return float(curve.table["sensitivity"].iloc[last])


def froc_metrics(curve: FrocCurve, slides: int, average_fps: Sequence[float] = AVERAGE_FPS) -> dict:
    """The figures that stand for a curve.

    Parameters
    ----------
    curve : FrocCurve
    slides : int
        All slides evaluated, for the record.
    average_fps : sequence of float
        Average false positives per non-cancerous slide at which sensitivity is read off; by
        default CAMELYON16's.

    Returns
    -------
    dict
        ``score``: mean of ``sensitivity_at`` (keyed by `average_fps` as text); ``lesions``,
        ``slides``, ``normal_slides``; ``undefined``: why score and sensitivities are None, or
        None.
    """
    found = {f"{fps:g}": sensitivity_at(curve, fps) for fps in average_fps}
    return {
        "score": None if curve.undefined else float(np.mean(list(found.values()))),
        "sensitivity_at": found,
        "lesions": curve.lesions,
        "slides": slides,
        "normal_slides": curve.normal_slides,
        "undefined": curve.undefined,
    }


def vertices(curve: FrocCurve) -> pd.DataFrame:
    """The curve's table without the rows inside its horizontal and vertical runs.

    Drawn, or read by `sensitivity_at`, it is the same curve; with a million patches in normal
    slides it has at most two rows for each sensitivity.
    """
    table = curve.table
    inside = np.zeros(len(table), bool)
    for column in ("sensitivity", "average_fps"):
        same = np.diff(table[column].to_numpy()) == 0
        inside[1:-1] |= same[:-1] & same[1:]
    return table[~inside].reset_index(drop=True)


@dataclass(frozen=True, eq=False)
class FrocHits:
    """What the detections of a cohort hit and miss: the input of a FROC curve.

    Parameters
    ----------
    mode : "lecture", "official" or "corrected"
    slide_ids : tuple of str, S of them
        The slides evaluated, those without detections included.
    lesions : int64 array, shape (S,)
        Counted lesions of each slide (isolated tumour cells not counted).
    averaged : bool array, shape (S,)
        The slides over which false positives are averaged.
    lesion_slide : int64 array, shape (L,)
        Which slide (index into `slide_ids`) an entry of `lesion_score` is of.
    lesion_score : float64 array, shape (L,)
        Highest confidence that hit the lesion; never found: -inf (lecture, corrected), 0
        (official).
    fp_slide : int64 array, shape (F,)
    fp_score : float64 array, shape (F,)
    """

    mode: Literal["lecture", "official", "corrected"]
    slide_ids: tuple[str, ...]
    lesions: np.ndarray
    averaged: np.ndarray
    lesion_slide: np.ndarray
    lesion_score: np.ndarray
    fp_slide: np.ndarray
    fp_score: np.ndarray
