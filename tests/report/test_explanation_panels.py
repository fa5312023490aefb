import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from shapely import box

from wsi_pipeline.geometry import Bounds
from wsi_pipeline.report.explanation_panels import (
    MethodPanel,
    _annotation_words,
    _colours,
    colour_limits,
    panels_figure,
)

PLACE, AROUND = Bounds(100, 200, 64, 64), Bounds(4, 104, 256, 256)
TISSUE = np.full((32, 32, 3), 200, np.uint8)


def figure(panels, lesions=()):
    data = panels_figure(
        TISSUE, PLACE, TISSUE, AROUND, lesions, panels, mpp=0.5, title="a title", subtitle="where"
    )
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG"
    return np.asarray(picture.convert("RGB")).astype(int)


def panel(values, **settings):
    return MethodPanel(np.asarray(values, np.float32), "Method", "what", "unit", **settings)


def yellow(pixels):
    return ((pixels[..., 0] > 230) & (pixels[..., 1] > 230) & (pixels[..., 2] < 60)).sum()


@pytest.mark.parametrize("number", [1, 3, 11])
def test_every_method_has_a_panel_and_no_global_state_is_left(number):
    backend = matplotlib.get_backend()
    rows = -(-(number + 2) // 4)
    found = figure([panel(np.eye(32))] * number)
    assert found.shape[0] > 250 * rows
    assert plt.get_fignums() == []
    assert matplotlib.get_backend() == backend


def test_the_annotation_is_outlined_over_the_place_and_over_each_map():
    lesion = box(110, 210, 150, 250)
    few, many = (figure([panel(np.zeros((32, 32)))] * n, [lesion]) for n in (1, 2))
    assert yellow(figure([panel(np.zeros((32, 32)))])) == 0
    assert yellow(many) > 1.2 * yellow(few) > 0  # the surroundings, the place and each map


def test_colours_end_where_the_map_does():
    values = np.zeros((32, 32))
    values[:8] = 2
    values[0, 0] = -4
    colors, scale = _colours(panel(values))
    assert (colors.name, scale.vmin, scale.vmax) == ("inferno", 0, 2)
    colors, scale = _colours(panel(values, signed=True))
    assert (colors.name, scale.vmin, scale.vmax) == ("RdBu_r", -2, 2)  # one of 1024 px is beyond
    single = np.zeros((32, 32))
    single[3, 3] = 5
    assert _colours(panel(single))[1].vmax == 5


def test_colour_limits_leave_out_what_is_no_number_and_never_coincide():
    values = np.array([[np.nan, np.inf, -3.0], [-3.0, 2.0, 2.0]])
    assert colour_limits(values, signed=True) == (-3, 3)
    assert colour_limits(values, signed=False) == (0, 2)
    for nothing in (np.full((2, 2), np.nan), np.zeros((2, 2)), np.full((2, 2), -1.0)):
        assert colour_limits(nothing, signed=False) == (0, 1)


@pytest.mark.parametrize(
    ("lesions", "words"),
    [
        ([], "no tumour is annotated here"),
        ([box(0, 0, 90, 90)], "no tumour is annotated here"),
        ([box(150, 0, 300, 300)], "annotated tumour outlined in yellow"),
        ([box(0, 0, 300, 300)], "all of it is annotated as tumour"),
    ],
)
def test_what_is_annotated_is_said_in_words(lesions, words):
    assert _annotation_words(lesions, PLACE) == words
