import io

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image
from shapely import Point, box

from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.render import annotation_outlines, heatmap_figure, heatmap_overlay


@pytest.fixture
def grid():
    # Cells of 16 working px = 64 level-0 px = 4 thumbnail px at downsample 16; 5 x 7 of them.
    return PatchGrid(Bounds(300, 900, 7 * 64, 5 * 64), 0.25, 4.0, 32, 16, 16)


@pytest.fixture
def thumbnail():
    return np.random.default_rng(0).integers(0, 256, (20, 28, 3), np.uint8)


def test_without_values_the_slide_stays_as_it_is(grid, thumbnail):
    nothing = np.full(grid.shape, np.nan, np.float32)
    np.testing.assert_array_equal(heatmap_overlay(thumbnail, 16.0, nothing, grid), thumbnail)


def test_each_cell_colours_exactly_its_own_inner_square(grid, thumbnail):
    values = np.full(grid.shape, np.nan, np.float32)
    values[1, 5] = 0.5
    picture = heatmap_overlay(thumbnail, 16.0, values, grid)
    changed = np.zeros((20, 28), bool)
    changed[4:8, 20:24] = True
    np.testing.assert_array_equal(picture[~changed], thumbnail[~changed])
    assert picture.dtype == np.uint8
    assert (picture != thumbnail).any(axis=2)[changed].mean() > 0.9


def test_a_cell_wins_where_it_is_the_nearest_of_overlapping_inner_squares(thumbnail):
    # Inner squares of 32 px every 16: the centre of cell 2 is at 48, so it is the nearest from
    # 40 to 56 working px, which are thumbnail px 10 to 14.
    grid = PatchGrid(Bounds(0, 0, 7 * 64, 5 * 64), 0.25, 4.0, 32, 16, 32)
    values = np.full(grid.shape, np.nan, np.float32)
    values[:, 2] = 1.0
    changed = (heatmap_overlay(thumbnail, 16.0, values, grid) != thumbnail).any(axis=(0, 2))
    assert np.flatnonzero(changed).tolist() == [10, 11, 12, 13]


def test_colours_have_a_fixed_scale(grid):
    white = np.full((20, 28, 3), 255, np.uint8)
    low = heatmap_overlay(white, 16.0, np.full(grid.shape, 0.2, np.float32), grid)
    mixed = np.full(grid.shape, 0.2, np.float32)
    mixed[0, 0] = 0.9
    np.testing.assert_array_equal(heatmap_overlay(white, 16.0, mixed, grid)[4:], low[4:])
    red, _, blue = low[0, 0].astype(int)
    assert blue > red
    red, _, blue = heatmap_overlay(white, 16.0, mixed, grid)[0, 0].astype(int)
    assert red > blue


def test_outlines_are_placed_in_the_thumbnail_and_include_holes(grid):
    ring = box(332, 932, 620, 1220) - box(396, 996, 460, 1060)
    outer, inner = annotation_outlines([ring], grid.bounds, 16.0)
    assert (outer.min(axis=0).tolist(), outer.max(axis=0).tolist()) == ([2, 2], [20, 20])
    assert (inner.min(axis=0).tolist(), inner.max(axis=0).tolist()) == ([6, 6], [10, 10])
    np.testing.assert_array_equal(outer[0], outer[-1])


@pytest.mark.parametrize(("height", "width"), [(200, 280), (900, 60), (60, 900)])
@pytest.mark.parametrize("lesions", [[], [Point(500, 1100).buffer(80)]])
def test_the_figure_is_a_png_and_leaves_no_global_state(height, width, lesions):
    grid = PatchGrid(Bounds(300, 900, width * 8, height * 8), 0.25, 1.0, 128, 64, 64)
    thumbnail = np.full((height, width, 3), 230, np.uint8)
    values = np.random.default_rng(0).random(grid.shape, np.float32)
    backend = matplotlib.get_backend()
    png = heatmap_figure(thumbnail, 8.0, lesions, values, grid, "tumor_001")
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert image.width == 1100
    assert plt.get_fignums() == []
    assert matplotlib.get_backend() == backend


def test_the_figure_shows_outline_and_heatmap_where_they_belong():
    grid = PatchGrid(Bounds(0, 0, 6400, 6400), 0.25, 1.0, 128, 64, 64)
    thumbnail = np.full((400, 400, 3), 255, np.uint8)
    lesion = box(4000, 800, 5600, 2400)
    values = np.full(grid.shape, np.nan, np.float32)
    values[13:37, 63:87] = 1.0

    def drawn(lesions, values):
        png = heatmap_figure(thumbnail, 16.0, lesions, values, grid, "slide")
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)

    plain = drawn([lesion], np.full(grid.shape, np.nan))
    picture = drawn([lesion], values)
    yellow = (picture[..., 0] > 200) & (picture[..., 1] > 200) & (picture[..., 2] < 80)
    yellow[:, picture.shape[1] // 2 :] = False
    coloured = (picture != plain).any(axis=2)
    assert not coloured[:, : picture.shape[1] // 2].any()
    (y, x), (v, u) = np.nonzero(yellow), np.nonzero(coloured)
    # The same square in both panels: equal height and size.
    assert abs(y.min() - v.min()) <= 4 and abs(y.max() - v.max()) <= 4
    assert abs(np.ptp(x) - np.ptp(u)) <= 6
