"""FROC: is each lesion found, and at the price of how many false positives.

A *lesion* is found at a threshold t by a *hit* of confidence t or more; whatever has confidence t
or more and hits no lesion is a false positive (FP). With L lesions and N averaged slides

    sensitivity(t) = (lesions whose best hit has confidence >= t) / L
    average_fps(t) = (false positives of confidence >= t) / N

and the score is the mean sensitivity at 1/4, 1/2, 1, 2, 4 and 8 average FP. What counts as a
lesion, a hit and a false positive is told by a `FrocHits`; three definitions fill one.

*lecture*: the Lecture's third attempt, on patches. A lesion is one connected annotated region,
hit by each patch whose inner square intersects it, with the patch's F(I) as confidence. Patches
of slides without tumour are the false positives, averaged over these slides; within tumour slides
none are counted. Sensitivity is read as a step: the largest that some threshold reaches with at
most so many FP. The Lecture defines neither the reading nor a score.

*official*: on detections (confidence, x, y), number for number what the CAMELYON16 organisers'
script gives (github.com/computationalpathologygroup/Camelyon16, Python/Evaluation_FROC.py), its
faults included; lesions and hits are those of `evaluation_mask` and `detection_hits`. FP of all
slides, averaged over all slides.

- The lowest of the distinct confidences is left out, and the point (0, 0) is put to the curve.
  Where the lowest confidence is a real one its hits and false positives are lost.
- A lesion never found, and each region of isolated tumour cells (ITC), stays among the
  confidences as 0. Without negative confidences that 0 is the lowest and so does no harm.
- Best hits are kept as float32, false positives as float64. A threshold is rounded to float32
  where it meets a best hit, so that equal confidences written as 0.3 stay equal there.
- Deviation: the script ends with the curve. Its sensitivities at 1/4 to 8 are read here by linear
  interpolation between the vertices (`numpy.interp`, constant beyond the last), the common
  practice for challenge results. Without lesions it divides by 0; here the curve is undefined.

*corrected*: as official without its faults. Every threshold counts, confidences are float64, a
lesion never found is never found (-inf), and the evaluation mask's faults are mended too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from wsi_pipeline.errors import RunError

AVERAGE_FPS = (0.25, 0.5, 1, 2, 4, 8)
COLUMNS = ("threshold", "sensitivity", "average_fps")
NO_LESION = {
    "lecture": "lesion",
    "official": "lesion (ITC aside)",
    "corrected": "lesion (ITC aside)",
}


@dataclass(frozen=True, eq=False)
class FrocHits:
    """What the detections of a cohort hit and miss: the input of a FROC curve.

    S slides, L entries of lesions, F false positives.

    Parameters
    ----------
    mode : "lecture", "official" or "corrected"
        The definition that filled it, see the module.
    slide_ids : tuple of str, length S
        The slides evaluated, those without detections included.
    lesions : int64 array, shape (S,)
        Lesions of each slide that sensitivity is a share of; regions of isolated tumour cells
        are not counted.
    averaged : bool array, shape (S,)
        The slides over which false positives are averaged.
    lesion_slide : int64 array, shape (L,)
        Which slide (index into `slide_ids`) an entry of `lesion_score` is of.
    lesion_score : float64 array, shape (L,)
        Highest confidence that hit the lesion. Never found: -inf, in official 0. Official has
        entries of 0 for isolated tumour cells too, so that L may exceed the sum of `lesions`.
    fp_slide : int array, shape (F,)
        Which slide a false positive is of.
    fp_score : float array, shape (F,)
        Its confidence. Patches have int32 and float32 here: 8 bytes each.
    """

    mode: Literal["lecture", "official", "corrected"]
    slide_ids: tuple[str, ...]
    lesions: np.ndarray
    averaged: np.ndarray
    lesion_slide: np.ndarray
    lesion_score: np.ndarray
    fp_slide: np.ndarray
    fp_score: np.ndarray


@dataclass(frozen=True, eq=False)
class FrocCurve:
    """Sensitivity against average false positives.

    Parameters
    ----------
    table : DataFrame
        ``threshold`` (falling, the first inf), ``sensitivity``, ``average_fps``; both rise from
        0. Empty if undefined. See `froc_curve` for its rows.
    lesions : int
        The lesions that sensitivity is a share of.
    slides_averaged : int
        The slides that false positives are averaged over.
    interpolation : "step" or "linear"
        How the curve runs from row to row: level up to the next, or straight to it.
    undefined : str, optional
        Why there is no curve.
    """

    table: pd.DataFrame
    lesions: int
    slides_averaged: int
    interpolation: Literal["step", "linear"]
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


def lecture_hits(patches: pd.DataFrame, lesions: pd.DataFrame, slide_labels: pd.Series) -> FrocHits:
    """Hits and false positives of the lecture's definition.

    Parameters
    ----------
    patches : DataFrame
        ``slide_id, score`` of all patches; a score of NaN (unreadable) is no false positive.
    lesions : DataFrame
        ``slide_id, score`` of all lesions, as `lesion_scores` gives them.
    slide_labels : Series of int, indexed by slide id
        The label of each slide evaluated, those without patches included: 0 is a slide without
        tumour.

    Raises
    ------
    RunError
        If a patch or a lesion is of a slide that is not among `slide_labels`.
    """
    normal = slide_labels.to_numpy() == 0
    slide = _slide_numbers(patches["slide_id"], slide_labels.index)
    score = patches["score"].to_numpy()
    false_positive = normal[slide] & ~np.isnan(score)
    lesion_slide = _slide_numbers(lesions["slide_id"], slide_labels.index)
    return FrocHits(
        mode="lecture",
        slide_ids=tuple(slide_labels.index),
        lesions=np.bincount(lesion_slide, minlength=len(normal)),
        averaged=normal,
        lesion_slide=lesion_slide,
        lesion_score=lesions["score"].to_numpy(np.float64),
        fp_slide=slide[false_positive],
        fp_score=score[false_positive],
    )


def _slide_numbers(slide_id: pd.Series, slide_ids: pd.Index) -> np.ndarray:
    """Position of each slide id among all; by category, for ten million patches."""
    names = slide_id.astype("category").cat
    number = slide_ids.get_indexer(names.categories).astype(np.int32)[names.codes]
    if (number < 0).any():
        strange = slide_id[number < 0].unique()[:5].tolist()
        raise RunError(f"there are patches or lesions of slides {strange} that are not evaluated")
    return number


def froc_curve(hits: FrocHits, weights=None) -> FrocCurve:
    """The FROC curve of all distinct thresholds, see the module for the definitions.

    It has a row for each threshold that finds a lesion, the threshold just above each of these,
    and the lowest; those between only add false positives, of which there may be 10^8, and lie on
    the curve.

    Parameters
    ----------
    hits : FrocHits
    weights : array_like of int, shape (S,), optional
        How many times each slide is there, as in a bootstrap's cohort; once by default.

    Returns
    -------
    FrocCurve
        Undefined without lesions or without slides to average over.
    """
    times = np.ones(len(hits.slide_ids), int) if weights is None else np.asarray(weights)
    lesions, slides = int(times @ hits.lesions), int(times @ hits.averaged)
    interpolation: Literal["step", "linear"] = "step" if hits.mode == "lecture" else "linear"
    if not lesions or not slides:
        missing = "slide without tumour" if lesions else NO_LESION[hits.mode]
        empty = pd.DataFrame(columns=COLUMNS, dtype="float64")
        return FrocCurve(
            empty, lesions, slides, interpolation, f"there is no {missing} to evaluate"
        )
    lesion = _sorted(hits.lesion_score, hits.lesion_slide, weights)
    fp = _sorted(hits.fp_score, hits.fp_slide, weights)
    threshold = _thresholds(lesion[np.isfinite(lesion)], fp, hits.mode)
    dtype = np.float32 if hits.mode == "official" else np.float64
    found = len(lesion) - np.searchsorted(lesion.astype(dtype), threshold.astype(dtype))
    false_positives = len(fp) - np.searchsorted(fp, threshold)
    columns = np.stack([threshold, found / lesions, false_positives / slides])
    table = pd.DataFrame(columns[:, ::-1].T, columns=COLUMNS)
    return FrocCurve(table, lesions, slides, interpolation)


def _sorted(score: np.ndarray, slide: np.ndarray, weights) -> np.ndarray:
    return np.sort(score if weights is None else np.repeat(score, np.asarray(weights)[slide]))


def _thresholds(lesion: np.ndarray, fp: np.ndarray, mode: str) -> np.ndarray:
    """The curve's thresholds, of two sorted arrays of scores, rising to inf.

    Official leaves the lowest out, and finds a lesion at a false positive of the same float32.
    """
    scores = [values for values in (lesion, fp) if len(values)]
    if not scores:
        return np.array([np.inf])
    lowest, finding = min(values[0] for values in scores), np.unique(lesion)
    if mode == "official" and len(fp):
        alike = np.searchsorted(fp.astype(np.float32), finding.astype(np.float32), "right") - 1
        finding = np.where(alike < 0, finding, np.maximum(finding, fp[alike]))
    rows = np.append(finding, lowest)
    rows = np.unique(np.concatenate([rows, _next_above(rows, scores), [np.inf]]))
    return rows[rows > lowest] if mode == "official" else rows


def _next_above(threshold: np.ndarray, scores: Sequence[np.ndarray]) -> np.ndarray:
    """The lowest of some sorted arrays' scores that is above each threshold; inf without any."""
    lowest = np.full(len(threshold), np.inf)
    for values in scores:
        at = np.searchsorted(values, threshold, "right")
        above = at < len(values)
        lowest[above] = np.minimum(lowest[above], values[at[above]])
    return lowest


def sensitivity_at(curve: FrocCurve, average_fps: float) -> float | None:
    """The sensitivity at so many average false positives.

    "step": the largest that some threshold reaches with at most `average_fps`. "linear":
    interpolated between the vertices; where several have the same false positives the highest
    counts, and beyond the last vertex its own.

    Returns
    -------
    float or None
        None if the curve is undefined.
    """
    if curve.undefined:
        return None
    fps, sensitivity = (curve.table[name].to_numpy() for name in ("average_fps", "sensitivity"))
    if curve.interpolation == "linear":
        return float(np.interp(average_fps, fps, sensitivity))
    return float(sensitivity[np.searchsorted(fps, average_fps, side="right") - 1])


def froc_metrics(curve: FrocCurve, slides: int, average_fps: Sequence[float] = AVERAGE_FPS) -> dict:
    """The figures that stand for a curve.

    Parameters
    ----------
    curve : FrocCurve
    slides : int
        All slides evaluated, for the record.
    average_fps : sequence of float
        Average false positives per averaged slide at which sensitivity is read off; by default
        CAMELYON16's.

    Returns
    -------
    dict
        ``score``: mean of ``sensitivity_at`` (keyed by `average_fps` as text); ``lesions``,
        ``slides``, ``slides_averaged``; ``undefined``: why score and sensitivities are None, or
        None.
    """
    found = {f"{fps:g}": sensitivity_at(curve, fps) for fps in average_fps}
    return {
        "score": None if curve.undefined else float(np.mean(list(found.values()))),
        "sensitivity_at": found,
        "lesions": curve.lesions,
        "slides": slides,
        "slides_averaged": curve.slides_averaged,
        "undefined": curve.undefined,
    }


def vertices(curve: FrocCurve) -> pd.DataFrame:
    """The curve's table without the rows inside its horizontal and vertical runs.

    Drawn, or read by `sensitivity_at`, it is the same curve, by steps and by straight lines, with
    at most two rows for each sensitivity.
    """
    table = curve.table
    inside = np.zeros(len(table), bool)
    for column in ("sensitivity", "average_fps"):
        same = np.diff(table[column].to_numpy()) == 0
        inside[1:-1] |= same[:-1] & same[1:]
    return table[~inside].reset_index(drop=True)
