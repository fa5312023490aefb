"""Which lesion each detection hits: detections looked up in the evaluation mask.

Deviations from the organisers' script: detections off the mask are refused, where the script
wraps negative coordinates to the opposite edge and crashes on others; coordinates may be
fractions.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.evaluation_mask import EvaluationMask, Mode
from wsi_pipeline.evaluation.froc import FrocHits
from wsi_pipeline.geometry import raster_places


@dataclass(frozen=True, eq=False)
class SlideHits:
    """What the detections of a slide hit and miss.

    Parameters
    ----------
    slide_id : str
    lesions : int
        Counted lesions; isolated tumour cells are not.
    lesion_label : int64 array, shape (l,)
        Label, in the slide's evaluation mask, of each entry of `lesion_score`.
    lesion_score : float64 array, shape (l,)
        Highest confidence that hit the lesion. Never found: -inf, in official 0; official has
        all regions here, with 0 for isolated tumour cells.
    fp_score : float64 array, shape (f,)
        Confidences of the false positives, in the detections' order.
    hit : int64 array, shape (d,)
        For each detection the label of its lesion; 0 false positive, -1 isolated tumour cells.
    """

    slide_id: str
    lesions: int
    lesion_label: np.ndarray
    lesion_score: np.ndarray
    fp_score: np.ndarray
    hit: np.ndarray


def detection_hits(
    slide_id: str,
    score,
    x_level0,
    y_level0,
    mask: EvaluationMask | None,
    *,
    mode: Mode,
    size_level0: tuple[int, int] | None = None,
) -> SlideHits:
    """What the detections of one slide hit; the highest confidence in a lesion counts.

    Parameters
    ----------
    slide_id : str
    score, x_level0, y_level0 : array_like of float, shape (d,)
        Confidence and place, level-0 px, of each detection.
    mask : EvaluationMask or None
        None for a slide without tumour: all detections are false positives. Which these are in
        official, see `official_labels`.
    mode : "official" or "corrected"
    size_level0 : (int, int), optional
        Width and height of the slide, for detections to be checked against.

    Raises
    ------
    RunError
        If a confidence is not finite, or a detection lies off the slide or its mask.
    """
    score = np.asarray(score, np.float64)
    if not np.isfinite(score).all():
        raise RunError(f"{slide_id}: a detection's confidence is {score[~np.isfinite(score)][0]}")
    place = np.stack([np.asarray(x_level0, np.float64), np.asarray(y_level0, np.float64)], axis=-1)
    _refuse_off(slide_id, place, place, size_level0 or (np.inf, np.inf), "slide")
    label_at = np.zeros(len(score), np.int64) if mask is None else _look_up(slide_id, place, mask)
    counted = np.zeros(0, bool) if mask is None else mask.counted
    best = np.full(len(counted) + 1, 0.0 if mode == "official" else -np.inf)
    np.maximum.at(best, label_at, score)
    if mode == "official":
        best = np.where(np.append(False, counted), best, 0).astype(np.float32).astype(np.float64)
    entries = np.arange(len(counted)) if mode == "official" else np.flatnonzero(counted)
    return SlideHits(
        slide_id=slide_id,
        lesions=int(counted.sum()),
        lesion_label=entries + 1,
        lesion_score=best[entries + 1],
        fp_score=score[label_at == 0],
        hit=np.where(np.append(True, counted)[label_at], label_at, -1),
    )


def _look_up(slide_id: str, place: np.ndarray, mask: EvaluationMask) -> np.ndarray:
    pixel = np.floor(raster_places(place, mask.downsample))
    _refuse_off(slide_id, place, pixel, mask.labels.shape[::-1], "mask")
    col, row = pixel.astype(np.int64).T
    return mask.labels[row, col].astype(np.int64)


def _refuse_off(slide_id: str, place_level0: np.ndarray, place: np.ndarray, size, what: str):
    off = ~((place >= 0) & (place < size)).all(axis=1)
    if off.any():
        x, y = place_level0[off][0]
        raise RunError(
            f"{slide_id}: a detection at level-0 px x {x:.10g}, y {y:.10g} lies off the {what} of"
            f" {size[0]} x {size[1]} px"
        )


def detection_froc_hits(mode: Mode, slides: Sequence[SlideHits]) -> FrocHits:
    """Join the slides of a cohort.

    Parameters
    ----------
    mode : "official" or "corrected"
        That of all `slides`.
    slides : sequence of SlideHits
        Of every slide evaluated, those without detections included: false positives are
        averaged over all of them.

    Raises
    ------
    RunError
        If a slide is there twice.
    """
    slide_ids = tuple(slide.slide_id for slide in slides)
    if twice := sorted(name for name, times in Counter(slide_ids).items() if times > 1):
        raise RunError(f"slides {twice[:5]} are there more than once")
    number = np.arange(len(slides))
    lesion_score = [slide.lesion_score for slide in slides]
    fp_score = [slide.fp_score for slide in slides]
    return FrocHits(
        mode=mode,
        slide_ids=slide_ids,
        lesions=np.array([slide.lesions for slide in slides], np.int64),
        averaged=np.ones(len(slides), bool),
        lesion_slide=np.repeat(number, [len(scores) for scores in lesion_score]),
        lesion_score=np.concatenate([*lesion_score, np.zeros(0)]),
        fp_slide=np.repeat(number, [len(scores) for scores in fp_score]),
        fp_score=np.concatenate([*fp_score, np.zeros(0)]),
    )
