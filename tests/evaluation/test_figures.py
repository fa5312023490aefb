import xml.etree.ElementTree as ET

import numpy as np

from wsi_pipeline.evaluation.binary import binary_metrics, reliability_table
from wsi_pipeline.evaluation.figures import reliability_figure, slide_roc_figure

SVG = "{http://www.w3.org/2000/svg}"


def groups(picture):
    """The parts of an SVG that have an id."""
    parts = ET.fromstring(picture.svg).iter(f"{SVG}g")
    return {part.get("id"): part for part in parts if part.get("id")}


def test_reliability_has_a_point_for_each_filled_bin_hollow_where_patches_are_few():
    # 60 patches at 0.05, none of them tumour; 4 at 0.95, 3 of them; the other 8 bins are empty.
    labels, probabilities = [0] * 60 + [1, 1, 1, 0], [0.05] * 60 + [0.95] * 4
    picture = reliability_figure(reliability_table(labels, probabilities))
    parts = groups(picture)
    assert "2 of 10 bins" in picture.alt
    for name, hollow in (("50-patches-or-more", False), ("fewer-than-50-patches", True)):
        (marker,) = parts[name].iter(f"{SVG}use")
        assert ("fill: #ffffff" in marker.get("style")) == hollow


def test_a_slide_without_tissue_has_the_lowest_place_in_the_roc():
    # Its score is -inf, which scikit-learn refuses. 0.9 > 0.4 > -inf: each tumour slide wins.
    labels, scores = [1, 1, 0], [0.9, 0.4, -np.inf]
    metrics = binary_metrics(labels, scores, 0.5)
    metrics["intervals"] = {"roc_auc": {"low": None, "high": None}}
    assert b"<svg" in slide_roc_figure({"slides": (labels, scores, metrics)}).svg
    assert metrics["roc_auc"] == 1
