import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from skimage.measure import label, regionprops

from wsi_pipeline.errors import ConfigError, RunError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.detect import component_detections, peak_detections

NAN = np.nan
SPACING_UM = 16.0  # exact in binary, as is every distance along a row or column
HEATMAPS = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=14),
    elements=st.sampled_from([NAN, 0.0, 0.05, 0.1, 0.5, 0.6, 0.7, 1.0]),  # ties are the rule
)
# 80 um is 5 cells, or 3 and 4: on the circle both ways.
RADII_UM = st.sampled_from([0.0, 15.9, 16.0, 22.7, 32.0, 36.0, 48.0, 80.0, 1e4, np.inf])


def a_grid(shape, x=0, y=0, **sizes):
    """16 working px a cell at 4 level-0 px a working px and 0.25 um a level-0 px: 16 um."""
    sizes = {
        "mpp": 0.25,
        "downsample": 4.0,
        "patch_px": 32,
        "stride_px": 16,
        "inner_px": 16,
    } | sizes
    step = int(sizes["stride_px"] * sizes["downsample"])
    return PatchGrid(Bounds(x, y, shape[1] * step, shape[0] * step), **sizes)


def greedy_loop(values, radius_um, min_probability, spacing_um=SPACING_UM):
    """The definition, cell by cell: the cells kept, in order."""
    cells = [cell for cell in np.ndindex(values.shape) if values[cell] >= min_probability]
    cells.sort(key=lambda cell: (-values[cell], cell))
    kept = []
    for row, col in cells:
        distances = (np.hypot(row - r, col - c) * spacing_um for r, c in kept)
        if all(distance > radius_um for distance in distances):
            kept.append((row, col))
    return kept


def cells_of(detections, grid):
    """Back from places to cells: 64 level-0 px each."""
    step = grid.stride_px * grid.downsample
    rows = (detections["y"] - grid.bounds.y) // step
    cols = (detections["x"] - grid.bounds.x) // step
    return list(zip(rows.astype(int), cols.astype(int), strict=True))


@settings(max_examples=300)
@given(values=HEATMAPS, radius_um=RADII_UM)
@example(values=np.ones((14, 14), np.float32), radius_um=36.0)  # one tie: ranks run along rows
@example(values=np.arange(196, dtype=np.float32).reshape(14, 14) / 196, radius_um=22.7)
def test_peaks_are_those_of_the_greedy_loop(values, radius_um):
    grid = a_grid(values.shape)
    found = peak_detections(values, grid, radius_um=radius_um, min_probability=0.1)
    assert cells_of(found, grid) == greedy_loop(values.astype(float), radius_um, 0.1)


@pytest.mark.parametrize("radius_um", [20.0, 50.0, 150.0, 400.0])
def test_peaks_are_those_of_the_greedy_loop_on_larger_maps(radius_um):
    rng = np.random.default_rng(int(radius_um))
    values = rng.random((40, 60)).astype(np.float32).round(2)
    values[rng.random(values.shape) < 0.2] = NAN
    grid = a_grid(values.shape)
    found = peak_detections(values, grid, radius_um=radius_um, min_probability=0.3)
    assert cells_of(found, grid) == greedy_loop(values.astype(float), radius_um, 0.3)


def test_hand_worked_peaks():
    # At 16 um only the next cells of the row and column are within the radius. 0.9 drops the 0.8
    # below it and the 0.7 beside it; 0.6 is diagonal to it (22.6 um) and stays, as does the first
    # of the two 0.5 in a row. 0.05 is below the least, NaN is no tissue.
    values = np.array(
        [
            [0.9, 0.7, 0.05, NAN],
            [0.8, 0.6, NAN, NAN],
            [NAN, NAN, 0.5, 0.5],
        ]
    )
    grid = a_grid(values.shape, x=1000, y=200)
    found = peak_detections(values, grid, radius_um=16.0, min_probability=0.1)
    # A cell is 64 level-0 px: the centres are 32, 96 and 160 px into the bounds.
    expected = pd.DataFrame(
        {"probability": [0.9, 0.6, 0.5], "x": [1032.0, 1096.0, 1160.0], "y": [232.0, 296.0, 360.0]}
    )
    pd.testing.assert_frame_equal(found, expected)


def test_a_radius_of_whole_cells_reaches_the_last_in_spite_of_rounding():
    # A step is 3 px of 0.1 um, in floating point 0.30000000000000004 um: 0.9 um is 2.99... of it.
    grid = a_grid((1, 5), mpp=0.1, downsample=1.0, patch_px=3, stride_px=3, inner_px=3)
    assert 0.9 / grid.pixel_spacing_um() < 3
    found = peak_detections(np.ones((1, 5)), grid, radius_um=0.9, min_probability=0.5)
    assert found["x"].tolist() == [1, 13]  # pixels 0 to 2, and 12 to 14


def test_threshold_is_compared_in_full_precision():
    grid = a_grid((1, 2))
    values = np.array([[0.7, 0.75]], np.float32)  # float32(0.7) = 0.69999998...
    found = peak_detections(values, grid, radius_um=0.0, min_probability=0.7)
    assert found["probability"].tolist() == [0.75]


def test_where_inner_squares_overlap_a_place_is_the_centre_of_its_own():
    # Inner squares of 32 working px every 16: that of column 1 is 16..48, its centre at 32
    # working px, which is 128 level-0 px; that of row 0 is 0..32, its centre at 16, which is 64.
    grid = a_grid((3, 3), patch_px=64, inner_px=32)
    found = peak_detections(
        np.array([[NAN, 0.5], [NAN, NAN]]), grid, radius_um=0.0, min_probability=0.1
    )
    assert found[["x", "y"]].to_numpy().tolist() == [[128, 64]]


@settings(max_examples=200)
@given(values=HEATMAPS, min_probability=st.sampled_from([0.05, 0.1, 0.6, 1.0]))
def test_components_are_those_of_scikit_image(values, min_probability):
    grid = a_grid(values.shape)
    found = component_detections(values, grid, min_probability=min_probability)
    values = values.astype(float)
    best = [
        min((-values[tuple(cell)], *cell) for cell in region.coords)
        for region in regionprops(label(values >= min_probability, connectivity=2))
    ]
    assert cells_of(found, grid) == [(row, col) for _, row, col in sorted(best)]
    assert found["probability"].tolist() == [-height for height, _, _ in sorted(best)]


def test_hand_worked_components():
    # Two components from 0.5 on: 0.6 - 0.9 - 0.9 touch by corners (the first 0.9 is the place),
    # 0.7 stands apart behind 0.4 and NaN.
    values = np.array(
        [
            [0.6, 0.4, 0.4, NAN, 0.7],
            [NAN, 0.9, 0.4, NAN, NAN],
            [NAN, NAN, 0.9, 0.4, NAN],
        ]
    )
    found = component_detections(values, a_grid(values.shape), min_probability=0.5)
    expected = pd.DataFrame({"probability": [0.9, 0.7], "x": [96.0, 288.0], "y": [96.0, 32.0]})
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize("values", [np.full((3, 4), NAN), np.full((3, 4), 0.05)])
def test_nothing_high_enough_gives_an_empty_table(values):
    grid = a_grid(values.shape)
    for found in (
        peak_detections(values, grid, radius_um=50.0, min_probability=0.1),
        component_detections(values, grid, min_probability=0.1),
    ):
        assert found.dtypes.to_dict() == dict.fromkeys(("probability", "x", "y"), np.float64)
        assert len(found) == 0


def test_values_of_another_grid_are_refused():
    with pytest.raises(RunError, match=r"shape \(3, 4\), its grid \(4, 3\)"):
        peak_detections(np.ones((3, 4)), a_grid((4, 3)), radius_um=50.0, min_probability=0.1)
    with pytest.raises(RunError, match=r"shape \(12,\)"):
        component_detections(np.ones(12), a_grid((4, 3)), min_probability=0.1)


@pytest.mark.parametrize("radius_um", [-1.0, NAN])
def test_a_radius_that_is_none_is_refused(radius_um):
    with pytest.raises(ConfigError, match="radius_um is"):
        peak_detections(np.ones((2, 2)), a_grid((2, 2)), radius_um=radius_um, min_probability=0.1)
