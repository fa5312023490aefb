import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_pipeline.geometry import Bounds, pixel_centres
from wsi_pipeline.raster import fill


def test_fill_takes_the_pixels_whose_centres_lie_inside():
    triangle = shapely.Polygon([(0, 0), (4, 0), (0, 4)])
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    # Centres on the slope (x + y == 4) belong to the other side: half-open, as pixels are.
    assert fill(triangle, Bounds(0, 0, 4, 4)).astype(int).tolist() == expected
    assert fill(triangle, Bounds(1, 0, 2, 1)).tolist() == [[True, True]]
    square = shapely.box(0, 0, 5, 5).difference(shapely.box(1, 1, 4, 4))
    assert fill(square, Bounds(0, 2, 5, 1)).tolist() == [[True, False, False, False, True]]


def test_a_centre_on_an_edge_is_in_one_of_the_neighbours_or_in_none():
    """Centres at 0.5, 1.5, ...: the edge between the boxes runs through those of column 2."""
    left, right = shapely.box(0, 0, 2.5, 3), shapely.box(2.5, 0, 5, 3)
    row = Bounds(0, 1, 5, 1)
    assert fill(left, row).tolist() == [[True, True, False, False, False]]
    assert fill(right, row).tolist() == [[False, False, True, True, True]]
    assert fill(right, row, on_edge="outside").tolist() == [[False, False, False, True, True]]
    # An edge along a row of centres, at 1.5: on the half-open rule it is the first row inside.
    upper = shapely.box(0, 1.5, 5, 3)
    assert fill(upper, row).all()
    assert not fill(upper, row, on_edge="outside").any()


def test_pixels_of_a_raster_are_as_wide_as_its_downsample():
    """Of 4 level-0 px: centres at 2, 6, 10, 14; the box holds 6 and 10 in x, 6 in y."""
    found = fill(shapely.box(3, 5, 12, 9), Bounds(0, 0, 4, 3), 4.0, on_edge="outside")
    expected = [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert found.astype(int).tolist() == expected


@pytest.mark.parametrize("on_edge", ["half-open", "outside"])
@pytest.mark.parametrize("downsample", [1.0, 4.0])
def test_a_window_is_a_part_of_the_whole(downsample, on_edge):
    shape = shapely.Point(30.2, 41.7).buffer(25.1).difference(shapely.box(20.1, 30.3, 33.3, 60.1))
    whole = fill(shape, Bounds(0, 0, 70, 80), downsample, on_edge=on_edge)
    part = fill(shape, Bounds(3, 5, 20, 19), downsample, on_edge=on_edge)
    assert 0 < part.sum() < part.size
    np.testing.assert_array_equal(part, whole[5:24, 3:23])


@given(
    points=st.lists(
        st.tuples(st.floats(-8, 60), st.floats(-8, 60)), min_size=3, max_size=9, unique=True
    ),
    downsample=st.sampled_from([1.0, 2.0, 7.776]),
)
@settings(max_examples=60, deadline=None)
def test_the_rules_differ_on_edges_alone(points, downsample):
    shape = shapely.MultiPoint(points).convex_hull.buffer(0.1)
    window = Bounds(-2, 1, 23, 17)
    first, second = (fill(shape, window, downsample, on_edge=r) for r in ("half-open", "outside"))
    rows, cols = np.nonzero(first != second)
    x, y = pixel_centres(cols - 2, downsample), pixel_centres(rows + 1, downsample)
    assert (shapely.distance(shape.boundary, shapely.points(x, y)) < 1e-9).all()
