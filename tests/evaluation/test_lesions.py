"""Tables of single lesions, worked by hand. A mask pixel is 32 px of 0.25 um: 8 um."""

import numpy as np
import pandas as pd
import pytest
from shapely import Polygon, box

from wsi_pipeline.evaluation.detection_hits import detection_froc_hits, detection_hits
from wsi_pipeline.evaluation.evaluation_mask import evaluation_mask
from wsi_pipeline.evaluation.froc import froc_curve
from wsi_pipeline.evaluation.lesion_pixels import rasterise
from wsi_pipeline.evaluation.lesions import annotated_lesions, found_or_missed, mask_lesions

MPP, DOWNSAMPLE, SIZE = 0.25, 32, (8000, 8000)
LARGE = box(800, 800, 2800, 1600)  # 500 x 200 um
NEAR = box(2800 + 400, 800, 2800 + 800, 1600)  # 100 um from it: the 75 um of both meet
TINY = box(6400, 6400, 6464, 6464)  # 16 um across, dilated 166: isolated tumour cells
HOLED = Polygon(
    box(800, 4800, 2400, 6400).exterior.coords, [box(1200, 5200, 2000, 6000).exterior.coords]
)  # 400 x 400 um, less 200 x 200
LESIONS = [LARGE, NEAR, HOLED, TINY]


def slide(detections, lesions=LESIONS):
    score, x, y = np.array(detections, float).reshape(-1, 3).T
    pixels = rasterise(lesions, SIZE, DOWNSAMPLE, keep_thin=True)
    mask = evaluation_mask(pixels, DOWNSAMPLE, MPP, "corrected")
    return pixels, mask, detection_hits("s", score, x, y, mask, mode="corrected")


def test_size_region_and_confidence_of_each_annotated_lesion():
    _, mask, hits = slide([(0.75, 1000, 1000), (0.5, 3300, 1000), (0.9, 6432, 6432)])
    table = annotated_lesions(LESIONS, MPP, mask, hits)
    assert table["lesion_id"].tolist() == [1, 2, 3, 4]
    assert table["region"].tolist() == [1, 1, 2, 3]  # the first two are merged
    assert table["area_mm2"].tolist() == pytest.approx([0.1, 0.02, 0.12, 0.000256])
    assert table["longest_diameter_um"].tolist() == pytest.approx(
        [np.hypot(500, 200), np.hypot(100, 200), np.hypot(400, 400), np.hypot(16, 16)]
    )
    assert table["itc"].tolist() == [False, False, False, True]
    assert table["confidence"].tolist() == [0.75, 0.75, -np.inf, -np.inf]
    assert table.loc[0, ["x0", "y0", "x1", "y1"]].tolist() == [800, 800, 2800, 1600]


def test_a_slide_without_lesions_has_an_empty_table():
    _, mask, hits = slide([(0.5, 100, 100)], lesions=[])
    table = annotated_lesions([], MPP, mask, hits)
    assert len(table) == 0
    assert {"lesion_id", "confidence", "itc"} <= set(table)


def test_lesions_of_a_mask_are_its_regions():
    pixels, mask, hits = slide([(0.75, 1000, 1000)])
    table = mask_lesions(pixels, MPP, mask, hits)
    assert table["lesion_id"].tolist() == [1, 2, 3]
    # 62 or 63 x 25 pixels and 12 or 13 x 25 of 8 x 8 um, by where their centres lie.
    assert table["area_mm2"].tolist() == pytest.approx([0.12, 0.12, 0.000256], rel=0.04)
    assert table["confidence"].tolist() == [0.75, -np.inf, -np.inf]
    assert table["itc"].tolist() == [False, False, True]


def test_missed_lesions_come_first_and_found_ones_have_a_price():
    # Two slides. At 0.75, LARGE's confidence, there is one false positive in two slides; HOLED is
    # found at 0.25 only, where there are five: more than 2 a slide, so it is missed.
    far = [(0.8, 5000, 200), *((0.5, 5000, y) for y in (300, 400, 500, 600))]
    _, mask, hits = slide([(0.75, 1000, 1000), (0.25, 1000, 5000), *far])
    normal = detection_hits("n", [], [], [], None, mode="corrected")
    curve = froc_curve(detection_froc_hits("corrected", [hits, normal]))
    lesions = annotated_lesions(LESIONS, MPP, mask, hits).assign(slide_id="s")
    found = found_or_missed(lesions, curve, most_fps=2)
    assert found["lesion_id"].tolist() == [3, 1, 2, 4]
    assert found["status"].tolist() == ["missed", "found", "found", "ITC"]
    np.testing.assert_array_equal(found["average_fps"], [2.5, 0.5, 0.5, np.nan])


def test_without_any_lesion_there_is_nothing_to_miss():
    normal = detection_hits("n", [0.5], [0], [0], None, mode="corrected")
    curve = froc_curve(detection_froc_hits("corrected", [normal]))
    _, mask, hits = slide([], lesions=[])
    empty = annotated_lesions([], MPP, mask, hits).assign(slide_id=pd.Series(dtype=str))
    assert found_or_missed(empty, curve, most_fps=8).empty
