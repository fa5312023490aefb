"""Regions of a heatmap: areas worked by hand, and pixels against a brute-force look-up."""

import numpy as np
import pytest
import shapely

from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.regions import heatmap_regions


def grid(width=400, height=300, x=0, y=0, downsample=1.0, stride=100, inner=100):
    return PatchGrid(Bounds(x, y, width, height), 0.5, downsample, 200, stride, inner)


def test_a_ring_of_pixels_is_one_polygon_with_a_hole():
    values = np.full((3, 4), 0.9)
    values[1, 1] = 0.2
    values[:, 3] = np.nan
    (found,) = heatmap_regions(values, grid(), 0.5)
    expected = shapely.box(0, 0, 300, 300) - shapely.box(100, 100, 200, 200)
    assert found.polygon.equals(expected) and len(found.polygon.interiors) == 1
    assert len(found.polygon.exterior.coords) == 5  # no corner on a straight line
    assert found.area_mm2 == pytest.approx(80_000 * 0.25e-6)
    assert (found.highest, found.mean, found.threshold) == (0.9, pytest.approx(0.9), 0.5)


def test_the_threshold_is_included_and_the_highest_region_comes_first():
    values = np.array([[0.5, 0.0, 0.7, 0.6], [0.0, 0.0, 0.0, 0.0], [0.49, 0.0, 0.0, 1.0]])
    found = heatmap_regions(values, grid(), 0.5)
    assert [region.highest for region in found] == [1.0, 0.7, 0.5]
    assert found[1].mean == pytest.approx(0.65)


def test_pixels_that_share_only_a_corner_are_two_valid_polygons():
    values = np.zeros((3, 4))
    values[0, 0] = values[1, 1] = 1
    found = heatmap_regions(values, grid(), 0.5)
    assert [region.polygon.bounds for region in found] == [(0, 0, 100, 100), (100, 100, 200, 200)]


def test_regions_count_from_the_bounds_and_end_with_them():
    cut = grid(width=350, height=300, x=1000, y=-20, downsample=1.0)
    (found,) = heatmap_regions(np.ones(cut.shape), cut, 0.5)
    assert found.polygon.bounds == (1000, -20, 1350, 280)


@pytest.mark.parametrize("downsample", [1.0, 2.5, 3.0000001])
def test_each_pixel_at_or_above_the_threshold_is_covered_and_no_other(downsample):
    of = PatchGrid(Bounds(7, 9, 3000, 2000), 0.25, downsample, 64, 32, 48)
    values = np.random.default_rng(0).random(of.shape)
    values[values < 0.1] = np.nan
    found = heatmap_regions(values, of, 0.6)
    assert all(region.polygon.is_valid for region in found)
    together = shapely.union_all([region.polygon for region in found])
    for row, col in np.ndindex(of.shape):
        x0, y0, x1, y1 = of.heatmap_box((row, col), (1, 1))
        centre = shapely.Point(min((x0 + x1) / 2, 3006), min((y0 + y1) / 2, 2008))
        assert together.contains(centre) == bool(values[row, col] >= 0.6)
    assert together.area == pytest.approx(sum(region.polygon.area for region in found))


def test_values_of_another_grid_are_refused():
    with pytest.raises(RunError, match=r"shape \(2, 2\), its grid \(3, 4\)"):
        heatmap_regions(np.ones((2, 2)), grid(), 0.5)
