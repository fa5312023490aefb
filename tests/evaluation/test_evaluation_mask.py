import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage.measure import label

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.detection_hits import detection_froc_hits, detection_hits
from wsi_pipeline.evaluation.evaluation_mask import evaluation_mask, lesion_labels, official_labels
from wsi_pipeline.evaluation.froc import (
    AVERAGE_FPS,
    froc_curve,
    froc_metrics,
    sensitivity_at,
    vertices,
)
from wsi_pipeline.evaluation.lesion_pixels import rasterise

OFFICIAL = Path(__file__).parent / "official_froc"
MODES = ("official", "corrected")
# A corrected mask px is then 8 um, so that 75 um are 9.375 px; official's 37.5 are 4.822 px.
DOWNSAMPLE, MPP = 32, 0.25


def blank(height=121, width=121):
    return np.zeros((height, width), bool)


def bar(row, first=40, last=79, mask=None):
    """A lesion one pixel high and 40 wide: over 275 um across, and so counted."""
    mask = blank() if mask is None else mask
    mask[row, first : last + 1] = True
    return mask


def ring(inner_px, outer_px):
    y, x = np.ogrid[-60:61, -60:61]
    return (np.hypot(x, y) >= inner_px) & (np.hypot(x, y) <= outer_px)


def place(*pixels):
    """Level-0 x and y in the middle of mask pixels given as (row, col)."""
    rows, cols = np.array(pixels).reshape(-1, 2).T
    return cols * DOWNSAMPLE + DOWNSAMPLE // 2, rows * DOWNSAMPLE + DOWNSAMPLE // 2


def hits(mask, mode, pixels, scores=None, slide_id="Tumor_001"):
    of_slide = None if mask is None else evaluation_mask(mask, DOWNSAMPLE, MPP, mode)
    scores = [0.5] * len(pixels) if scores is None else scores
    return detection_hits(slide_id, scores, *place(*pixels), of_slide, mode=mode)


def brute_force_dilation(mask, radius_px):
    lesion = np.argwhere(mask)
    grid = np.argwhere(np.ones_like(mask))
    distance = np.sqrt(((grid[:, np.newaxis] - lesion) ** 2).sum(-1)).min(1, initial=np.inf)
    return (distance < radius_px).reshape(mask.shape)


# --- the organisers' script ---------------------------------------------------------------------


def official_cases():
    """``(slides, expected)`` of each case: see the folder's README."""
    with np.load(OFFICIAL / "cases.npz") as file:
        data = dict(file)
    ends = {
        "bits": np.cumsum(-(-data["height"].astype(int) * data["width"] // 8)),
        "detections": np.cumsum(data["detections"]),
        "regions": np.cumsum(data["regions"]),
        "vertices": np.cumsum(data["vertices"]),
    }
    bits, score, x, y, best, fps, sensitivity = (
        np.split(data[name], ends[counted][:-1])
        for name, counted in (
            ("mask_bits", "bits"), ("score", "detections"), ("x", "detections"),
            ("y", "detections"), ("best", "regions"), ("average_fps", "vertices"),
            ("sensitivity", "vertices"),
        )
    )  # fmt: skip
    for case in range(len(data["vertices"])):
        slides = []
        for i in np.flatnonzero(data["case"] == case):
            shape = int(data["height"][i]), int(data["width"][i])
            mask = np.unpackbits(bits[i], count=shape[0] * shape[1]).reshape(shape).astype(bool)
            slides.append(
                {
                    "name": str(data["name"][i]), "mask": mask if mask.size else None,
                    "detections": (score[i], x[i], y[i]), "best": best[i],
                    "lesions": data["lesions"][i], "false_positives": data["false_positives"][i],
                }
            )  # fmt: skip
        yield slides, (fps[case][::-1], sensitivity[case][::-1])


def official_hits(slide):
    """A slide's hits, held against what the script says of the slide."""
    mask = slide["mask"] if official_labels({slide["name"]: 0})[slide["name"]] else None
    of_slide = None if mask is None else evaluation_mask(mask, 32, MPP, "official")
    found = detection_hits(slide["name"], *slide["detections"], of_slide, mode="official")
    assert found.lesions == slide["lesions"]
    assert found.lesion_score.tolist() == slide["best"].tolist()
    assert len(found.fp_score) == slide["false_positives"]
    return found


def test_official_is_the_organisers_script_on_300_random_cohorts():
    defined = 0
    for slides, (fps, sensitivity) in official_cases():
        curve = froc_curve(detection_froc_hits("official", [official_hits(s) for s in slides]))
        if curve.undefined:  # the script divides by zero there
            assert sum(slide["lesions"] for slide in slides) == 0
            continue
        defined += 1
        # The script has a point for every threshold, ours those at which the curve turns.
        table = pd.DataFrame({"sensitivity": sensitivity, "average_fps": fps})
        theirs = vertices(replace(curve, table=table))
        ours = vertices(curve)
        for name in ("average_fps", "sensitivity"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=1e-9)
        apart = cdist(curve.table[["average_fps", "sensitivity"]], np.transpose([fps, sensitivity]))
        assert apart.min(axis=1).max() < 1e-9
        for average_fps in AVERAGE_FPS:
            expected = np.interp(average_fps, fps, sensitivity)
            assert sensitivity_at(curve, average_fps) == pytest.approx(expected, abs=1e-9)
    assert defined >= 200


def test_official_is_the_script_on_real_detections(test_data):
    expected = json.loads((OFFICIAL / "test_001.json").read_text())
    mask = np.zeros(expected["mask_shape"], bool)
    y, x = np.ogrid[: mask.shape[0], : mask.shape[1]]
    for row, col, radius_y, radius_x in expected["ellipses_row_col_ry_rx"]:
        mask |= ((x - col) / radius_x) ** 2 + ((y - row) / radius_y) ** 2 <= 1
    detections = np.loadtxt(test_data / "ncrf-camelyon16/test_001.nms.csv", delimiter=",").T
    tumour = official_hits(
        {**expected, "name": "Tumor_001", "mask": mask, "detections": detections}
        | {"best": np.array(expected["best"])}
    )
    normal = [
        detection_hits(f"Normal_00{i}", [], [], [], None, mode="official")
        for i in range(1, expected["slides"])
    ]
    metrics = froc_metrics(froc_curve(detection_froc_hits("official", [tumour, *normal])), slides=4)
    assert list(metrics["sensitivity_at"].values()) == pytest.approx(
        expected["sensitivity"], abs=1e-9
    )
    assert metrics["score"] == pytest.approx(expected["score"], abs=1e-9)


# --- the evaluation mask ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "last"),
    # 4 px are 31.1 of 37.5 um and 5 px 38.9; 9 px are 72 of 75 um and 10 px 80.
    [("official", 4), ("corrected", 9)],
)
def test_a_hit_lies_within_the_dilation(mode, last):
    beside = [(60, 79 + last), (60, 80 + last), (60 - last, 50), (59 - last, 50)]
    assert hits(bar(60), mode, beside).hit.tolist() == [1, 0, 1, 0]


def test_corrected_distance_is_in_the_slides_own_um():
    # Of 0.5 um at downsample 16 a px is 8 um as well; at downsample 32, 16: 75 um are 4.7 px.
    for downsample, mpp, last in ((16, 0.5, 9), (32, 0.5, 4)):
        labels = evaluation_mask(bar(60), downsample, mpp, "corrected").labels
        assert np.flatnonzero(labels[:, 50]).tolist() == list(range(60 - last, 61 + last))


@pytest.mark.parametrize(("mode", "apart", "regions"), [
    # Official reaches 4 rows: 24 and 25 touch, 24 and 26 do not. Corrected reaches 9.
    ("official", 9, 1), ("official", 10, 2), ("corrected", 19, 1), ("corrected", 20, 2),
])  # fmt: skip
def test_lesions_that_the_dilation_merges_are_one(mode, apart, regions):
    mask = bar(20, mask=bar(20 + apart))
    assert hits(mask, mode, [(20, 50), (20 + apart, 50)]).hit.tolist() == [1, regions]
    assert evaluation_mask(mask, DOWNSAMPLE, MPP, mode).labels.max() == regions


def test_regions_that_meet_at_a_corner_are_one():
    # A mask px of 100 um is its own dilation; the two meet at a corner.
    mask = np.zeros((4, 4), bool)
    mask[1, 1] = mask[2, 2] = True
    assert evaluation_mask(mask, 200, 0.5, "corrected").labels.max() == 1


@pytest.mark.parametrize("mode", MODES)
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_dilation_and_diameters_are_those_of_brute_force(mode, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((40, 50)) < 0.01
    mask[0, 0] = True
    radius_px, pixel_um = {"official": (37.5 / 7.776, 7.776), "corrected": (75 / 8, 8)}[mode]
    found = evaluation_mask(mask, DOWNSAMPLE, MPP, mode)
    dilated = brute_force_dilation(mask, radius_px)
    if mode == "official":
        around = label(np.pad(~dilated, 1, constant_values=True), connectivity=1)
        dilated = (around != around[0, 0])[1:-1, 1:-1]
    assert np.array_equal(found.labels, ndimage.label(dilated, np.ones((3, 3)))[0])
    for number, diameter_um in enumerate(found.diameter_um, start=1):
        pixels = np.argwhere(found.labels == number)
        covariance = np.cov(pixels.T, ddof=0)
        assert diameter_um == pytest.approx(
            4 * np.sqrt(np.linalg.eigvalsh(covariance)[-1]) * pixel_um
        )
    assert np.array_equal(found.counted, found.diameter_um >= 275)


def test_a_wide_exclusion_hole_is_filled_by_official_and_kept_by_corrected():
    # 30 px from the middle to the ring are 240 um: far beyond the dilation of either.
    mask = ring(30, 36)
    assert hits(mask, "official", [(60, 60)]).hit.tolist() == [1]
    corrected = hits(mask, "corrected", [(60, 60), (60, 60 + 21), (60, 60 + 20)])
    assert corrected.hit.tolist() == [0, 1, 0]  # 9 and 10 px from the ring
    assert corrected.lesions == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_gap_open_to_the_edge_is_no_hole(mode):
    mask = ring(30, 36)
    mask[60:] = False
    assert hits(mask, mode, [(60 + 30, 60)]).hit.tolist() == [0]


def test_an_empty_mask_makes_official_see_tumour_cells_in_the_corner():
    # SciPy measures to row -1, column 0: pixel (0, 4) is 4.1 of 4.8 px away, (4, 0) is 5.
    pixels = [(0, 0), (0, 4), (0, 5), (3, 0), (4, 0), (50, 50)]
    official = hits(blank(), "official", pixels)
    assert official.hit.tolist() == [-1, -1, 0, -1, 0, 0]
    assert (official.lesions, official.lesion_score.tolist()) == (0, [0])
    corrected = hits(blank(), "corrected", pixels)
    assert corrected.hit.tolist() == [0] * 6
    assert (corrected.lesions, len(corrected.lesion_score)) == (0, 0)


def test_official_masks_are_at_downsample_32():
    with pytest.raises(RunError, match="downsampled by 32, this one by 16"):
        evaluation_mask(blank(), 16, 0.5, "official")


def test_a_slide_without_resolution_has_no_evaluation_mask():
    with pytest.raises(RunError, match="mpp is 0"):
        evaluation_mask(blank(), 32, 0, "corrected")


# --- detections ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "never"), [("official", 0), ("corrected", -np.inf)])
def test_the_best_of_several_hits_counts_and_the_rest_are_no_false_positives(mode, never):
    mask = bar(20, mask=bar(80))
    found = hits(mask, mode, [(20, 50), (22, 60), (50, 50)], [0.25, 0.75, 0.5])
    assert found.hit.tolist() == [1, 1, 0]
    assert found.lesion_label.tolist() == [1, 2]
    assert found.lesion_score.tolist() == [0.75, never]
    assert found.fp_score.tolist() == [0.5]
    assert found.lesions == 2


@pytest.mark.parametrize(("mode", "entries"), [("official", [1, 2]), ("corrected", [2])])
def test_isolated_tumour_cells_are_neither_hit_nor_missed(mode, entries):
    mask = bar(80)
    mask[20, 50] = True  # dilated, 72 or 144 um across
    found = hits(mask, mode, [(20, 50), (80, 50)])
    assert found.hit.tolist() == [-1, 2]
    assert (found.lesions, len(found.fp_score)) == (1, 0)
    assert found.lesion_label.tolist() == entries
    assert found.lesion_score.tolist() == [0, 0.5][-len(entries) :]


def test_a_slide_without_mask_has_false_positives_only():
    found = detection_hits("s", [0.5, 0.25], [0, 9], [0, 9], None, mode="corrected")
    assert found.hit.tolist() == [0, 0]
    assert found.fp_score.tolist() == [0.5, 0.25]
    assert (found.lesions, len(found.lesion_score)) == (0, 0)


def test_official_goes_by_the_slides_names_where_any_says_tumor():
    labels = {"Tumor_1": 0, "tumor_2": 1, "Test_3": 1}
    assert official_labels(labels) == {"Tumor_1": 1, "tumor_2": 0, "Test_3": 0}
    assert official_labels({"a": 1, "b": 0, "c": -1}) == {"a": 1, "b": 0, "c": 0}


def test_a_place_belongs_to_the_pixel_that_holds_it():
    of_slide = evaluation_mask(bar(60), DOWNSAMPLE, MPP, "corrected")
    # The bar's dilation ends with column 88, which ends at 89 * 32 = 2848.
    found = detection_hits(
        "s", [0.5] * 2, [2847.9, 2848], [60 * 32] * 2, of_slide, mode="corrected"
    )
    assert found.hit.tolist() == [1, 0]


@pytest.mark.parametrize("place", [(-1, 5), (5, -1), (121 * 32, 5), (5, 121 * 32), (np.nan, 5)])
def test_a_detection_off_the_mask_is_refused(place):
    of_slide = evaluation_mask(bar(60), DOWNSAMPLE, MPP, "corrected")
    with pytest.raises(
        RunError, match=rf"s7: a detection at level-0 px x {place[0]}, y {place[1]}"
    ):
        detection_hits("s7", [0.5], [place[0]], [place[1]], of_slide, mode="corrected")


def test_a_detection_off_a_slide_without_tumour_is_refused():
    of_slide = {"mode": "corrected", "size_level0": (100, 50)}
    detection_hits("s", [0.5], [99], [49], None, **of_slide)
    with pytest.raises(RunError, match=r"x 50, y 99 lies off the slide of 100 x 50 px"):
        detection_hits("s", [0.5], [50], [99], None, **of_slide)


def test_a_confidence_that_is_no_number_is_refused():
    with pytest.raises(RunError, match="s: a detection's confidence is nan"):
        detection_hits("s", [0.5, np.nan], [0, 0], [0, 0], None, mode="corrected")


# --- cohorts ------------------------------------------------------------------------------------


def test_a_cohort_joins_its_slides():
    slides = [
        hits(bar(20, mask=bar(80)), "corrected", [(20, 50), (50, 50)], [0.75, 0.5]),
        detection_hits("normal", [0.25], [0], [0], None, mode="corrected"),
        detection_hits("empty", [], [], [], None, mode="corrected"),
    ]
    joined = detection_froc_hits("corrected", slides)
    assert joined.slide_ids == ("Tumor_001", "normal", "empty")
    assert joined.lesions.tolist() == [2, 0, 0]
    assert joined.averaged.tolist() == [True] * 3
    assert joined.lesion_slide.tolist() == [0, 0]
    assert joined.lesion_score.tolist() == [0.75, -np.inf]
    assert joined.fp_slide.tolist() == [0, 1]
    assert joined.fp_score.tolist() == [0.5, 0.25]


@pytest.mark.parametrize("mode", MODES)
def test_a_cohort_without_normal_slides_is_averaged_over_its_tumour_slides(mode):
    # Found at 0.75, and a false positive at 0.5; the far bar is never found.
    mask = bar(20, mask=bar(80))
    slide = hits(mask, mode, [(20, 50), (50, 50)], [0.75, 0.5])
    curve = froc_curve(detection_froc_hits(mode, [slide]))
    assert curve.table["average_fps"].tolist() == [0, 0, 1]
    assert curve.table["sensitivity"].tolist() == [0, 0.5, 0.5]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tumour", ["none", "cells", "empty"])
def test_a_cohort_without_counted_lesions_is_undefined(mode, tumour):
    cells = blank()
    cells[60, 60] = True
    slides = [detection_hits("Normal_001", [0.5], [0], [0], None, mode=mode)]
    if tumour != "none":
        slides.append(hits(cells if tumour == "cells" else blank(), mode, [(60, 60), (20, 20)]))
    curve = froc_curve(detection_froc_hits(mode, slides))
    assert "there is no lesion (ITC aside" in curve.undefined
    assert curve.slides_averaged == len(slides)


def test_no_slides_are_no_curve():
    assert "no lesion" in froc_curve(detection_froc_hits("corrected", [])).undefined


def test_a_slide_that_is_there_twice_is_refused():
    slide = detection_hits("a", [], [], [], None, mode="corrected")
    with pytest.raises(RunError, match=r"slides \['a'\] are there more than once"):
        detection_froc_hits("corrected", [slide, slide])


# --- annotated lesions and their regions --------------------------------------------------------


def test_annotated_lesions_find_their_regions():
    # Two that the dilation (300 level-0 px) merges, a thin one, and one from the next row down.
    lesions = [
        shapely.box(500, 500, 900, 900),
        shapely.box(1100, 500, 1500, 900),
        shapely.box(3000, 510, 3001, 511),
        shapely.box(500, 2500, 2500, 2600),
    ]
    mask = rasterise(lesions, (4000, 4000), 31, keep_thin=True)
    regions = evaluation_mask(mask, 31, 0.25, "corrected")
    assert lesion_labels(lesions, regions).tolist() == [1, 1, 2, 3]
    assert regions.counted.tolist() == [True, False, True]
    other = shapely.box(3500, 3500, 3600, 3600)
    assert lesion_labels([other], regions).tolist() == [0]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=25)
def test_every_annotated_lesion_has_a_region(seed):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 1900, (6, 2))
    sides = rng.choice([0.5, 3, 40, 90], (6, 2))
    lesions = [
        shapely.box(*corner, *(corner + side)) for corner, side in zip(corners, sides, strict=True)
    ]
    mask = rasterise(lesions, (2000, 2000), 31.1, keep_thin=True)
    assert (lesion_labels(lesions, evaluation_mask(mask, 31.1, 0.25, "corrected")) > 0).all()


def test_a_lesion_of_two_regions_belongs_to_the_larger():
    # A dumbbell whose neck, 1 px of level 0, holds no pixel centre.
    lesion = shapely.union_all(
        [shapely.box(0, 0, 320, 320), shapely.box(320, 1, 1500, 2), shapely.box(1500, 0, 2000, 320)]
    )
    regions = evaluation_mask(rasterise([lesion], (2100, 400), 32), 32, 0.25, "corrected")
    assert regions.labels.max() == 2
    assert lesion_labels([lesion], regions).tolist() == [2]
