"""Figures of a cohort as functions of how often each of its slides counts.

A slide that is drawn twice into a resampled cohort has the weight 2, one that is not drawn 0. The
functions here prepare, once, what a figure needs of each slide, so that the figure of a thousand
resampled cohorts is a few products of matrices. Each gives exactly what the cohort of repeated
slides would give, computed from scratch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from wsi_pipeline.evaluation.binary import by_slide, evaluated, is_called, parts
from wsi_pipeline.evaluation.froc import AVERAGE_FPS, FrocHits


@dataclass(frozen=True, eq=False)
class Statistic:
    """Figures of a cohort as a function of its slides' weights.

    Parameters
    ----------
    kind : str
        What is evaluated: "official FROC", "slides".
    slide_ids : tuple of str, S of them
    truth : int64 array, shape (S,)
        What there is to find in each slide (lesions, or rows with tumour): runs that differ in
        it have not been evaluated on the same cohort.
    names : tuple of str, M of them
    evaluate : callable
        float64 weights, shape (R, S), 0 or more -> figures, float64, shape (R, M); NaN where a
        figure is undefined.
    """

    kind: str
    slide_ids: tuple[str, ...]
    truth: np.ndarray
    names: tuple[str, ...]
    evaluate: Callable[[np.ndarray], np.ndarray]


def froc_statistic(hits: FrocHits, average_fps: Sequence[float] = AVERAGE_FPS) -> Statistic:
    """The FROC score and the sensitivities it is the mean of.

    A curve bends only at the scores of lesions. Let f_k of its lesions have the k-th score t_k,
    A_k false positives a slide a score >= t_k and B_k one > t_k. Then

        sensitivity(q) = sum_k f_k share_k(q) / lesions,
        share_k(q) = clip((q - B_k) / (A_k - B_k), 0, 1)    (official, corrected),
        share_k(q) = 1 if A_k <= q else 0                   (lecture).

    The first is linear interpolation between the vertices of all thresholds: from t_k's
    predecessor (at B_k) to t_k (at A_k) the curve climbs by f_k in a straight line, upright where
    A_k = B_k (share_k is then 1 from there on), and it is level elsewhere. In the official mode
    scores of lesions are float32, and so are thresholds where they meet one: B_k has the false
    positives > t_k as float32 (of several that are t_k as float32 all count as the first); and
    lesions that only the lowest
    threshold among the slides of positive weight would find have share 0: the organisers' script
    leaves that threshold out.

    Parameters
    ----------
    hits : FrocHits
    average_fps : sequence of float
        Average false positives at which sensitivity is read off.

    Returns
    -------
    Statistic
        Of ``score`` and of each of `average_fps` as text. Undefined without lesions, or without
        slides to average over, of positive weight. Memory: 24 bytes for each pair of a slide and a
        distinct lesion score.
    """
    official = hits.mode == "official"
    found = np.isfinite(hits.lesion_score)
    thresholds, rank = np.unique(hits.lesion_score[found], return_inverse=True)
    size = len(thresholds), len(hits.slide_ids)
    at_threshold = _count(rank, hits.lesion_slide[found], size)
    at_least = _count_above(thresholds, hits, size, "right", np.float64)
    above = _count_above(thresholds, hits, size, "left", np.float32 if official else np.float64)
    lowest, beside = _lowest_scores(hits) if official else (np.empty(0), np.empty(0))

    def evaluate(weights):
        lesions, slides = weights @ hits.lesions, weights @ hits.averaged
        climbs = weights @ at_threshold.T
        if official:
            drawn = np.where(weights > 0, lowest, np.inf)
            least = drawn.min(axis=1, keepdims=True)
            alike = drawn.astype(np.float32) == least.astype(np.float32)
            alone = np.where(alike, beside, least).max(axis=1, keepdims=True) <= least
            climbs[alone & (thresholds <= least.astype(np.float32))] = 0
        with np.errstate(divide="ignore", invalid="ignore"):
            end = weights @ at_least.T / slides[:, None]
            start = end if hits.mode == "lecture" else weights @ above.T / slides[:, None]
            reached = [np.einsum("rk,rk->r", climbs, _share(q, start, end)) for q in average_fps]
            sensitivity = np.stack(reached, axis=1) / lesions[:, None]
        sensitivity[(lesions == 0) | (slides == 0)] = np.nan
        return np.column_stack([sensitivity.mean(axis=1), sensitivity])

    names = ("score", *(f"{fps:g}" for fps in average_fps))
    return Statistic(f"{hits.mode} FROC", hits.slide_ids, hits.lesions, names, evaluate)


def _share(average_fps: float, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How much of the climb from `start` to `end` has happened; all of an upright one."""
    return np.nan_to_num(np.clip((average_fps - start) / (end - start), 0, 1), nan=1)


def _count(rank: np.ndarray, slide: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """How many entries each slide has at each rank, shape (ranks, slides)."""
    counts = np.bincount(rank * size[1] + slide, minlength=size[0] * size[1])
    return counts.reshape(size).astype(np.float64)


def _count_above(
    thresholds: np.ndarray,
    hits: FrocHits,
    size: tuple[int, int],
    side: Literal["left", "right"],
    dtype,
) -> np.ndarray:
    """How many false positives of each slide have passed each threshold, shape (K, S).

    "right" counts those at the threshold, "left" does not; their scores are rounded to `dtype`.
    """
    counts = np.zeros((size[0] + 1, size[1]))
    for part in parts(len(hits.fp_score)):
        passed = np.searchsorted(
            thresholds, hits.fp_score[part].astype(dtype or hits.fp_score.dtype), side
        )
        counts += _count(passed, hits.fp_slide[part], counts.shape)
    return np.cumsum(counts[:0:-1], axis=0)[::-1]


def _lowest_scores(hits: FrocHits) -> tuple[np.ndarray, np.ndarray]:
    """Each slide's lowest score, and the highest that is the same as float32; inf without any."""
    slide = np.concatenate([hits.lesion_slide, hits.fp_slide])
    score = np.concatenate([hits.lesion_score, hits.fp_score])
    lowest = np.full(len(hits.slide_ids), np.inf)
    np.minimum.at(lowest, slide, score)
    same = score.astype(np.float32) == lowest.astype(np.float32)[slide]
    beside = lowest.copy()
    np.maximum.at(beside, slide[same], score[same])
    return lowest, beside


def binary_statistic(rows: pd.DataFrame, threshold: float, kind: str) -> Statistic:
    """ROC AUC, and figures of the call "positive iff score >= threshold".

    AUC is the share of pairs of a tumour and a normal row in which the tumour row has the larger
    score, ties counted half. With P_i tumour and N_j normal rows in slides i and j, and U_ij such
    pairs won between them, AUC(w) = sum_ij w_i U_ij w_j / (sum_i w_i P_i  sum_j w_j N_j).

    Parameters
    ----------
    rows : DataFrame
        ``slide_id, label, score``: a row for each patch, or for each slide. A row with an unknown
        label (-1) or without a score (NaN) is left out, as in `binary_metrics`, and so is a slide
        without any other.
    threshold : float
    kind : str
        What a row is: "patches", "slides".

    Returns
    -------
    Statistic
        Of ``roc_auc, accuracy, sensitivity, specificity``. Time to prepare: a sort of the rows,
        and a pass over all tumour rows for each slide with normal rows (10^7 patches of 129
        slides: some 7 s). Memory: 8 bytes for each pair of a slide with tumour rows and one with
        normal rows.

    Raises
    ------
    RunError
        If a label is none of 1, 0, -1.
    """
    found = {name: evaluated(part["label"], part["score"]) for name, part in by_slide(rows)}
    found = {name: (truth, score) for name, (truth, score) in found.items() if len(truth)}
    by_slide_id = [
        np.bincount(2 * truth + is_called(score, threshold), minlength=4)
        for truth, score in found.values()
    ]
    counts = np.array(by_slide_id, np.int64).reshape(-1, 4)
    tn, fp, fn, tp = counts.T.astype(np.float64)
    tumour, normal, wins = _pairs_won(list(found.values()))

    def evaluate(weights):
        positives, negatives = weights @ (tp + fn), weights @ (tn + fp)
        won = np.einsum("rj,rj->r", weights[:, tumour] @ wins, weights[:, normal])
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.column_stack(
                [
                    won / (positives * negatives),
                    weights @ (tp + tn) / (positives + negatives),
                    weights @ tp / positives,
                    weights @ tn / negatives,
                ]
            )

    names = ("roc_auc", "accuracy", "sensitivity", "specificity")
    positives = counts[:, 2] + counts[:, 3]
    return Statistic(kind, tuple(found), positives, names, evaluate)


def _pairs_won(
    slides: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs that tumour rows win against normal rows, between every two slides.

    Parameters
    ----------
    slides : sequence of (bool array, float array)
        Truth and score of each slide's rows.

    Returns
    -------
    tumour, normal : int arrays, shapes (I,) and (J,)
        The slides that have such rows.
    wins : float64 array, shape (I, J)
        A tie is half a pair.
    """
    tumour = np.array([i for i, (truth, _) in enumerate(slides) if truth.any()], int)
    normal = np.array([i for i, (truth, _) in enumerate(slides) if not truth.all()], int)
    scores = [slides[i][1][slides[i][0]] for i in tumour]
    row = np.repeat(np.arange(len(tumour)), [len(of_slide) for of_slide in scores])
    ranked = np.concatenate([*scores, np.empty(0, np.float32)])
    order = np.argsort(ranked)
    ranked, row = ranked[order], row[order]
    wins = np.empty((len(tumour), len(normal)))
    for column, number in enumerate(normal):
        truth, score = slides[number]
        # A normal row loses to every tumour row from "right" on, and draws with those before it
        # from "left" on; past the last tumour row there is none.
        reached = np.zeros(len(ranked) + 1, np.int64)
        for side in ("left", "right"):
            place = np.searchsorted(ranked, score[~truth], side)
            reached += np.bincount(place, minlength=len(reached))
        halves = np.cumsum(reached[:-1])
        wins[:, column] = np.bincount(row, weights=halves, minlength=len(tumour)) / 2
    return tumour, normal, wins
