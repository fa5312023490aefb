"""Each lesion by itself: how large it is, whether it counts, how confidently it is found."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import shapely
from scipy.spatial.distance import pdist
from skimage.measure import regionprops_table

from wsi_pipeline.evaluation.detection_hits import SlideHits
from wsi_pipeline.evaluation.evaluation_mask import EvaluationMask, lesion_labels
from wsi_pipeline.evaluation.froc import FrocCurve
from wsi_pipeline.geometry import level0_to_um, raster_to_level0

LESION_COLUMNS = {
    **dict.fromkeys(("lesion_id", "region"), "int64"),
    **dict.fromkeys(("x0", "y0", "x1", "y1", "area_mm2", "longest_diameter_um"), "float64"),
    "itc": "bool",
    "confidence": "float64",
}
UM2_PER_MM2 = 1e6


def annotated_lesions(
    lesions: Sequence[shapely.Polygon], mpp: float, mask: EvaluationMask, hits: SlideHits
) -> pd.DataFrame:
    """What is known of each annotated lesion of a slide.

    Parameters
    ----------
    lesions : sequence of shapely.Polygon
        Level-0 px, in the order of their ids.
    mpp : float
        Micrometres per level-0 px.
    mask : EvaluationMask
        Corrected, made of `lesions`.
    hits : SlideHits
        Corrected, of the slide's detections.

    Returns
    -------
    DataFrame
        ``lesion_id`` (from 1); ``region``, its label in the evaluation mask: lesions that the
        dilation merges share one and are found together; ``x0, y0, x1, y1``, its box in level-0
        px; ``area_mm2`` (holes taken out); ``longest_diameter_um``, between the two points of its
        outline that lie furthest apart; ``itc``: whether its region counts as isolated tumour
        cells; ``confidence`` of the best detection in its region, -inf without one and for ITC.
    """
    region = lesion_labels(lesions, mask)
    boxes = shapely.bounds(np.array(lesions, object)).reshape(-1, 4)
    return _table(
        region,
        boxes,
        area_mm2=shapely.area(lesions) * mpp**2 / UM2_PER_MM2,
        longest_diameter_um=[level0_to_um(_longest_diameter(lesion), mpp) for lesion in lesions],
        mask=mask,
        hits=hits,
    )


def mask_lesions(
    pixels: np.ndarray, mpp: float, mask: EvaluationMask, hits: SlideHits
) -> pd.DataFrame:
    """What is known of each lesion of a slide that is annotated by a mask: of each region.

    Parameters
    ----------
    pixels : bool array, shape (h, w)
        The lesions' own pixels, before the dilation.
    mpp, mask, hits
        See `annotated_lesions`.

    Returns
    -------
    DataFrame
        As `annotated_lesions`; ``lesion_id`` is the region, area and diameter are those of its
        lesion pixels, and the diameter is that of the box around them, corner to corner: at most
        1.4 times the longest.
    """
    own = np.where(pixels, mask.labels, 0)
    found = regionprops_table(own, properties=("label", "bbox", "area"))
    top, left, bottom, right = (
        raster_to_level0(found[f"bbox-{i}"], mask.downsample) for i in range(4)
    )
    spacing_um = level0_to_um(mask.downsample, mpp)
    return _table(
        found["label"],
        np.stack([left, top, right, bottom], axis=1),
        area_mm2=found["area"] * spacing_um**2 / UM2_PER_MM2,
        longest_diameter_um=level0_to_um(np.hypot(right - left, bottom - top), mpp),
        mask=mask,
        hits=hits,
        lesion_id=found["label"],
    )


def _table(region, boxes, area_mm2, longest_diameter_um, mask, hits, lesion_id=None):
    region = np.asarray(region, np.int64)
    best = np.full(len(mask.counted) + 1, -np.inf)
    best[hits.lesion_label] = hits.lesion_score
    x0, y0, x1, y1 = np.asarray(boxes, np.float64).T
    columns = (
        np.arange(1, len(region) + 1) if lesion_id is None else lesion_id,
        region, x0, y0, x1, y1, area_mm2, longest_diameter_um,
        ~np.append(True, mask.counted)[region], best[region],
    )  # fmt: skip
    table = pd.DataFrame(dict(zip(LESION_COLUMNS, columns, strict=True)))
    return table.astype(LESION_COLUMNS)


def _longest_diameter(lesion: shapely.Polygon) -> float:
    return pdist(shapely.get_coordinates(lesion.convex_hull)).max()


def found_or_missed(lesions: pd.DataFrame, curve: FrocCurve, most_fps: float) -> pd.DataFrame:
    """Say of each lesion of a cohort at which price it is found.

    Parameters
    ----------
    lesions : DataFrame
        `annotated_lesions` or `mask_lesions` of all slides, with ``slide_id``.
    curve : FrocCurve
        Corrected, of the same cohort.
    most_fps : float
        A lesion that is found only with more average false positives than this is missed.

    Returns
    -------
    DataFrame
        `lesions` with ``average_fps``, the false positives per slide at the threshold that finds
        it (NaN: no detection does, or it is ITC), and ``status``: "missed", "found" or "ITC".
        Missed lesions first, the largest of them first; found ones by rising confidence.
    """
    table = curve.table.sort_values("threshold")
    confidence = lesions["confidence"].to_numpy(np.float64)
    hit = np.isfinite(confidence) & ~lesions["itc"].to_numpy(bool)
    fps = np.full(len(lesions), np.nan)
    at = np.searchsorted(table["threshold"].to_numpy(), confidence[hit])
    fps[hit] = table["average_fps"].to_numpy()[at]
    status = np.where(lesions["itc"], "ITC", np.where(fps <= most_fps, "found", "missed"))
    order = pd.Series(status).map({"missed": 0, "found": 1, "ITC": 2}).to_numpy()
    size = np.where(order == 0, -lesions["area_mm2"], confidence)
    return lesions.assign(average_fps=fps, status=status).iloc[np.lexsort((size, order))]
