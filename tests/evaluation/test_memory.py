"""Figures of 10^8 patches have to fit into memory: so many bytes for each."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest

from wsi_pipeline.evaluation.binary import call_counts
from wsi_pipeline.evaluation.froc import froc_curve, lecture_hits
from wsi_pipeline.evaluation.patch_level import patch_metrics, patch_metrics_by_slide
from wsi_pipeline.evaluation.weighted_metrics import binary_statistic, froc_statistic

PATCHES, SLIDES = 4_000_000, 20
IDS = [f"s{number}" for number in range(SLIDES)]


@pytest.fixture(scope="module")
def patches():
    """One patch in twenty is tumour; every score is another."""
    rng = np.random.default_rng(0)
    slide = np.repeat(np.arange(SLIDES, dtype=np.int8), PATCHES // SLIDES)
    label = (slide % 2 == 0) & (rng.random(PATCHES) < 0.1)
    table = pd.DataFrame({"label": label.astype(np.int8), "score": rng.random(PATCHES, np.float32)})
    return table.assign(slide_id=pd.Categorical.from_codes(slide, IDS))


@pytest.fixture(scope="module")
def hits(patches):
    lesions = pd.DataFrame({"slide_id": IDS[::2], "score": np.linspace(0.9, 1, SLIDES // 2)})
    return lecture_hits(patches, lesions, pd.Series([1, 0] * (SLIDES // 2), IDS))


def bytes_a_patch(work):
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / PATCHES


@pytest.mark.parametrize(
    "work",
    [
        lambda patches: patch_metrics(patches["label"], patches["score"]),
        lambda patches: call_counts(patches["label"], patches["score"]),
        patch_metrics_by_slide,
        lambda patches: binary_statistic(patches, 0.75, "patches"),
    ],
    ids=["metrics", "curves", "by slide", "bootstrap"],
)
def test_patch_metrics_take_twenty_bytes_a_patch(patches, work):
    work(patches[:1000])  # modules are imported
    assert bytes_a_patch(lambda: work(patches)) < 20


@pytest.mark.parametrize("work", [froc_curve, froc_statistic])
def test_lecture_froc_takes_twenty_bytes_a_false_positive(hits, work):
    assert hits.fp_score.dtype == np.float32 and hits.fp_slide.itemsize <= 4
    assert bytes_a_patch(lambda: work(hits)) < 20 * len(hits.fp_score) / PATCHES
