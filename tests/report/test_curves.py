import re
import xml.etree.ElementTree as ET

import numpy as np
import pandas as pd
import pytest

from wsi_pipeline.evaluation.binary import binary_metrics, reliability_table
from wsi_pipeline.evaluation.froc import FrocCurve
from wsi_pipeline.evaluation.slide_level import accuracy_curve
from wsi_pipeline.report.curves import (
    froc_figure,
    precision_recall_figure,
    reliability_figure,
    score_histogram_figure,
    slide_accuracy_figure,
    slide_roc_figure,
)

SVG = "{http://www.w3.org/2000/svg}"
POINTS = (0.5, 2, 8)


def a_curve(interpolation, rows=((np.inf, 0, 0), (0.5, 1, 8)), undefined=None):
    """From (0, 0) to all lesions found at 8 false positives per slide."""
    table = pd.DataFrame(rows, columns=["threshold", "sensitivity", "average_fps"])
    return FrocCurve(table, 4, 2, interpolation, undefined)


def a_band(low=0.2):
    return pd.DataFrame({"average_fps": [0.0, 8], "sensitivity": 0.5, "low": low, "high": 0.7})


CURVES = {
    "lecture": a_curve("step"),
    "official": a_curve("linear"),
    "corrected": a_curve("linear"),
}
BANDS = dict.fromkeys(CURVES, a_band())


def groups(picture):
    """The parts of an SVG that have an id."""
    parts = ET.fromstring(picture.svg).iter(f"{SVG}g")
    return {part.get("id"): part for part in parts if part.get("id")}


def outline(part):
    """Corners of the first path, (x, y) in the SVG's frame: y falls as values rise."""
    path = part.find(f".//{SVG}path").get("d")
    return np.array([line.split() for line in re.findall(r"[ML] ([\d. ]+)", path)], float)


def shares(part, axis):
    """Heights of markers as shares, measured on a curve that runs from 0 to 1."""
    y = [float(marker.get("y")) for marker in part.iter(f"{SVG}use")]
    return (y - axis[0]) / (axis[-1] - axis[0])


def lowest(part):
    """The largest y, down the page, of a group's lines and texts."""
    text = re.sub(r"<(\w+:)?defs>.*?</(\w+:)?defs>", "", ET.tostring(part, "unicode"), flags=re.S)
    at = re.findall(r"[ML] [\d.]+ ([\d.]+)|translate\([\d.]+ ([\d.]+)\)", text)
    return max(float(path or moved) for path, moved in at)


@pytest.mark.parametrize(
    "draw",
    [
        lambda labels, scores: precision_recall_figure(labels, scores, 0.75),
        lambda labels, scores: score_histogram_figure(labels, scores, 0.75),
        lambda labels, scores: slide_accuracy_figure(
            {"test": accuracy_curve(pd.Series(labels), pd.Series(scores))}, 0.75
        ),
    ],
)
def test_the_legend_lies_above_what_is_drawn(draw):
    parts = groups(draw(np.array([0, 1, 0, 1]), np.array([0.1, 0.9, 0.4, 0.6])))
    assert lowest(parts["legend_1"]) < outline(parts["patch_2"])[:, 1].min() + 1  # of the axes


def test_lecture_is_drawn_in_steps_and_the_others_in_straight_lines():
    parts = groups(froc_figure(CURVES, BANDS, POINTS))
    slanted = {
        mode: (np.diff(outline(parts[f"froc-{mode}"]), axis=0) != 0).all(axis=1).any()
        for mode in CURVES
    }
    assert slanted == {"lecture": False, "official": True, "corrected": True}


def test_marks_lie_where_the_sensitivities_are_read_off():
    parts = groups(froc_figure(CURVES, BANDS, POINTS))
    axis = outline(parts["froc-corrected"])[:, 1]
    # Straight from (0, 0) to (8, 1): 0.5, 2 and 8 of 8. By steps nothing before 8.
    assert shares(parts["points-corrected"], axis) == pytest.approx([1 / 16, 1 / 4, 1], abs=1e-3)
    assert shares(parts["points-lecture"], axis) == pytest.approx([0, 0, 1], abs=1e-3)


def test_curves_differ_in_line_and_marker_and_not_in_colour_alone():
    parts = groups(froc_figure(CURVES, BANDS, POINTS))
    lines = [parts[f"froc-{mode}"].find(f".//{SVG}path").get("style") for mode in CURVES]
    dashes = [re.findall(r"stroke-dasharray: ([\d., ]+)", line) for line in lines]
    assert dashes[2] == [] and dashes[0] and dashes[1] and dashes[0] != dashes[1]
    markers = {parts[f"points-{mode}"].find(f".//{SVG}path").get("d") for mode in CURVES}
    assert len(markers) == 3


def test_a_curve_past_its_last_threshold_goes_on_level_to_the_edge():
    early = a_curve("linear", ((np.inf, 0, 0), (0.5, 1, 2)))
    parts = groups(froc_figure({"corrected": early}, BANDS, POINTS))
    corners = outline(parts["froc-corrected"])
    assert corners[-1, 1] == corners[-2, 1] and corners[-1, 0] > corners[-2, 0]


def test_undefined_curves_are_left_out():
    curves = CURVES | {"lecture": a_curve("step", (), "there is no slide without tumour")}
    picture = froc_figure(curves, BANDS, POINTS)
    assert {name for name in groups(picture) if name.startswith("froc-")} == {
        "froc-official", "froc-corrected",
    }  # fmt: skip
    assert "lecture" not in picture.alt
    assert "corrected from 6% at 0.5 to 100% at 8" in picture.alt  # 1/16 and all


@pytest.mark.parametrize(
    ("modes", "band"),
    [(["lecture", "official", "corrected"], "band-corrected"), (["official"], "band-official")],
)
def test_one_curve_has_a_band(modes, band):
    parts = groups(froc_figure({mode: CURVES[mode] for mode in modes}, BANDS, POINTS))
    assert {name for name in parts if name.startswith("band-")} == {band}


def test_a_band_without_intervals_is_not_drawn():
    picture = froc_figure(CURVES, dict.fromkeys(CURVES, a_band(np.nan)), POINTS)
    assert not [name for name in groups(picture) if name.startswith("band-")]


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
