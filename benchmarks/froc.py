"""FROC curves of whole cohorts."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pandas as pd

from benchmarks.measure import Row, compare
from wsi_pipeline.evaluation.detection_hits import SlideHits, detection_froc_hits
from wsi_pipeline.evaluation.froc import FrocHits, froc_curve, froc_metrics, lecture_hits

# Its arrays are made beforehand, which spares it the script's conversion of lists every time.
THRESHOLD_LOOP = "the organisers' loop, 50 of its thresholds timed"


def rows(quick: bool) -> list[Row]:
    """Both forms; quick: of a hundredth of the detections and patches."""
    return [detection_froc(1000 if quick else 100_000), patch_froc(10**5 if quick else 10**7)]


def detection_froc(detections: int) -> Row:
    """FROC of 129 slides with so many detections each against the organisers' loop."""
    rng = np.random.default_rng(0)
    # No mask here: two lesions a slide, and detections that hit none.
    slides = [
        SlideHits(f"s{i}", 2, np.array([1, 2]), rng.random(2), rng.random(detections), np.empty(0))
        for i in range(129)
    ]

    hits = detection_froc_hits("corrected", slides)
    thresholds = len(np.unique(hits.fp_score))

    def pipeline() -> int:
        _froc(detection_froc_hits("corrected", slides))
        return thresholds

    return compare(
        f"FROC of 129 slides, {detections:,} detections each, over all thresholds"
        f" (at most {_peak_mib(pipeline):,.0f} MiB)",
        THRESHOLD_LOOP, "thresholds",
        pipeline, _threshold_loop(hits),
    )  # fmt: skip


def patch_froc(count: int) -> Row:
    """The lecture's FROC of so many patches against the same loop."""
    rng = np.random.default_rng(0)
    labels = pd.Series(np.arange(200) % 2, index=[f"s{i}" for i in range(200)])
    slide = rng.integers(0, 200, count)
    patches = pd.DataFrame(
        {
            "slide_id": pd.Categorical.from_codes(slide, labels.index),
            "score": rng.random(len(slide), np.float32),
        }
    )
    lesions = pd.DataFrame({"slide_id": labels.index[labels == 1], "score": rng.random(100)})

    hits = lecture_hits(patches, lesions, labels)
    thresholds = len(np.unique(hits.fp_score))

    def pipeline() -> int:
        _froc(lecture_hits(patches, lesions, labels))
        return thresholds

    return compare(
        f"the lecture's FROC of {count:,} patches, over all thresholds"
        f" (at most {_peak_mib(pipeline):,.0f} MiB)",
        THRESHOLD_LOOP, "thresholds",
        pipeline, _threshold_loop(hits),
    )  # fmt: skip


def _froc(hits: FrocHits) -> None:
    froc_metrics(froc_curve(hits), len(hits.slide_ids))


def _threshold_loop(hits: FrocHits) -> Callable[[], int]:
    thresholds = np.unique(hits.fp_score)[:: len(hits.fp_score) // 50]

    def plain() -> int:
        for threshold in thresholds:
            (hits.fp_score >= threshold).sum()
            (hits.lesion_score >= threshold).sum()
        return len(thresholds)

    return plain


def _peak_mib(work: Callable[[], int]) -> float:
    """Most memory that numpy and Python allocate during the work."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / 2**20
