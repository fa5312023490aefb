import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.geometry import (
    Bounds,
    PatchGrid,
    level0_box,
    level0_to_um,
    pixel_centres,
    raster_places,
    raster_size,
    raster_to_level0,
    um_to_level0,
)


def grid(width=2220, height=2967, x=0, y=0, downsample=1.0, mpp=0.5, **sizes):
    return PatchGrid(Bounds(x, y, width, height), mpp, downsample, **sizes)


@pytest.mark.parametrize(
    ("width", "height", "downsample", "shape"),
    [
        (2220, 2967, 1.0, (12, 9)),  # 2967/256 = 11.6, 2220/256 = 8.7
        (512, 256, 1.0, (1, 2)),  # exact multiples add no empty row
        (100, 100, 1.0, (1, 1)),  # smaller than one inner square
        (105_185, 221_772, 1.0, (867, 411)),  # the lecture's largest slide
        (1024, 1024, 4.0, (1, 1)),
        (1025, 1024, 4.0, (1, 2)),  # one level-0 px more needs another column
    ],
)
def test_shape_counts_the_inner_squares_that_cover_the_slide(width, height, downsample, shape):
    assert grid(width, height, downsample=downsample).shape == shape


def test_first_inner_square_starts_at_the_bounds_and_its_patch_before_them():
    a_grid = grid(x=1000, y=3000, downsample=2.0)
    x, y = a_grid.patch_origins([0, 1], [0, 2])
    # margin (512 - 256) / 2 = 128 working px = 256 level-0 px; a step is 512 level-0 px
    assert x.tolist() == [744, 1768]
    assert y.tolist() == [2744, 3256]
    assert a_grid.inner_boxes([0, 1], [0, 2]).tolist() == [
        [1000, 3000, 1512, 3512],
        [2024, 3512, 2536, 4024],
    ]


def test_centre_pixels_are_those_that_hold_the_centres():
    a_grid = grid(x=1000, y=3000, downsample=2.0)
    # 1000..1512 has its centre at 1256, the corner at which pixel 1256 begins; so 2024..2536
    x, y = a_grid.centre_pixels([0, 1], [0, 2])
    assert x.tolist() == [1256, 2280]
    assert y.tolist() == [3256, 3768]
    odd = grid(patch_px=33, stride_px=33, inner_px=33)
    assert odd.centre_pixels([1], [0])[0].tolist() == [16]  # 16.5, the middle of pixel 16
    assert odd.centre_pixels([1], [0])[1].tolist() == [49]  # 33 + 16.5


def test_centre_pixels_stay_on_the_slide():
    a_grid = grid(300, 700, x=10, y=20)
    # Column 1 is 266..522, row 2 is 532..788: their centres are at 394 and 660; the slide's last
    # pixels are 309 and 719.
    assert [int(v[0]) for v in a_grid.centre_pixels([2], [1])] == [309, 660]
    tiny = grid(3, 2)
    assert [int(v[0]) for v in tiny.centre_pixels([0], [0])] == [2, 1]


def test_patches_without_overlap_and_with_full_inner_square():
    a_grid = grid(100, 70, patch_px=32, stride_px=32, inner_px=32)
    assert a_grid.shape == (3, 4)
    assert a_grid.patch_origins([2], [3])[0].tolist() == [96]


@given(
    downsample=st.floats(1, 40),
    x=st.integers(0, 10_000),
    width=st.integers(1, 250_000),
    sizes=st.sampled_from([(512, 256, 256), (512, 512, 512), (64, 32, 32), (96, 40, 64)]),
)
def test_cells_are_found_again_from_their_patch_origins(downsample, x, width, sizes):
    patch_px, stride_px, inner_px = sizes
    a_grid = grid(
        width, 50_000, x, 17, downsample, patch_px=patch_px, stride_px=stride_px, inner_px=inner_px
    )
    rows = np.arange(a_grid.shape[0])[:50]
    cols = np.arange(a_grid.shape[1])[-50:]
    rows, cols = (a.ravel() for a in np.meshgrid(rows, cols))
    found_rows, found_cols = a_grid.cells_at(*a_grid.patch_origins(rows, cols))
    assert (found_rows == rows).all()
    assert (found_cols == cols).all()


@given(downsample=st.floats(1, 40), width=st.integers(1, 250_000), height=st.integers(1, 250_000))
def test_inner_squares_cover_the_bounds_and_the_last_ones_are_needed(downsample, width, height):
    a_grid = grid(width, height, downsample=downsample)
    rows, cols = a_grid.shape
    last = a_grid.inner_boxes([rows - 1], [cols - 1])[0]
    slack = 1.0 * downsample  # a working px of the ragged edge is counted whole
    assert last[2] >= width - 1e-3
    assert last[3] >= height - 1e-3
    assert last[0] < width + slack
    assert last[1] < height + slack


def test_heatmap_pixels_lie_at_the_centres_of_the_inner_squares():
    a_grid = grid(x=1000, y=0, downsample=2.0, mpp=0.25)
    # the first inner square is level-0 px 1000..1512, its centre edge 1256, pixel centre 1255.5
    assert a_grid.first_pixel_um() == (1255.5 * 0.25, 255.5 * 0.25)
    assert a_grid.pixel_spacing_um() == 128.0
    # two cells a pixel: inner squares 1000..2024, centre 1512
    assert a_grid.first_pixel_um(2) == (1511.5 * 0.25, 511.5 * 0.25)
    assert a_grid.pixel_spacing_um(2) == 256.0


def test_grid_survives_a_file():
    a_grid = grid(x=7, downsample=3.97)
    assert PatchGrid.from_dict(a_grid.to_dict()) == a_grid


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"inner_px": 600}, "inner_px is 600"),
        ({"inner_px": 255}, "inner_px is 255"),
        ({"stride_px": 0}, "stride_px is 0"),
        ({"mpp": float("nan")}, "mpp is nan"),
        ({"downsample": -1.0}, "downsample is -1"),
    ],
)
def test_impossible_grids_are_refused_by_name(values, named):
    with pytest.raises(ConfigError, match=named):
        grid(**values)


@pytest.mark.parametrize(
    ("patch_px", "stride_px", "inner_px"),
    [
        (31, 8, 9),  # 31 - 8 is odd
        (31, 1, 1),
        (16, 8, 8),
        (16, 1, 2),
        (11, 32, 11),  # steps wider than the patch
    ],
)
def test_a_finer_grid_has_its_own_patches_over_the_same_area(patch_px, stride_px, inner_px):
    coarse = grid(x=1000, y=3000, downsample=2.0)
    found = coarse.finer(patch_px, stride_px)
    assert (found.patch_px, found.stride_px, found.inner_px) == (patch_px, stride_px, inner_px)
    assert (found.bounds, found.mpp, found.downsample) == (coarse.bounds, 0.5, 2.0)


def test_finer_cells_are_told_by_their_centres():
    coarse = grid(100, 70, patch_px=32, stride_px=24, inner_px=24)
    fine = coarse.finer(17, 8)
    # Inner squares of 9 px every 8 px: centres at 4.5, 12.5, 20.5 | 28.5, ...; squares of 24 px.
    assert fine.cells_centred_in(coarse, [0, 2], [1, 0]).tolist() == [[0, 3, 3, 6], [6, 9, 0, 3]]
    # Row 2 ends at 72 px, column 4 at 120: the fine grid's last rows and columns come before.
    assert fine.shape == (9, 13)
    assert fine.cells_centred_in(coarse, [2], [4]).tolist() == [[6, 9, 12, 13]]


def test_a_centre_on_a_border_is_in_the_later_square():
    coarse = grid(64, 64, patch_px=4, stride_px=4, inner_px=4)
    fine = coarse.finer(16, 8)  # centres at 4, 12, 20, ...: every second border
    assert fine.cells_centred_in(coarse, [0, 1, 2], [0, 1, 3]).tolist() == [
        [0, 0, 0, 0], [0, 1, 0, 1], [1, 1, 1, 2],
    ]  # fmt: skip


@given(
    sizes=st.sampled_from([(512, 256, 256), (64, 40, 32), (32, 24, 24), (96, 32, 64)]),
    patch_px=st.integers(1, 31),
    stride_px=st.integers(1, 40),
)
def test_finer_cells_are_those_that_a_comparison_of_all_centres_finds(sizes, patch_px, stride_px):
    patch, stride, inner = sizes
    coarse = grid(700, 300, patch_px=patch, stride_px=stride, inner_px=inner)
    fine = coarse.finer(patch_px, stride_px)
    rows, cols = (a.ravel() for a in np.indices(coarse.shape))
    x_px = np.arange(fine.shape[1]) * stride_px + fine.inner_px / 2
    for col, (*_, first, end) in zip(
        cols, fine.cells_centred_in(coarse, rows, cols).tolist(), strict=True
    ):
        inside = (x_px >= col * stride) & (x_px < col * stride + inner)
        assert np.flatnonzero(inside).tolist() == list(range(first, end))


def test_grids_of_other_areas_or_resolutions_do_not_mix():
    for other in (grid(x=1), grid(downsample=2.0)):
        with pytest.raises(ConfigError, match="must be of the same area and resolution"):
            grid().finer(17, 8).cells_centred_in(other, [0], [0])


def test_cells_over_a_box_are_those_whose_squares_meet_it():
    a_grid = grid(x=1000, y=3000, downsample=2.0, patch_px=64, stride_px=32, inner_px=32)
    # Squares of 64 level-0 px from (1000, 3000): x 1100 to 1200 meets columns 1 (1064) to 3.
    assert a_grid.cells_over(Bounds(1100, 2900, 100, 164)) == (slice(0, 1), slice(1, 4))
    assert a_grid.cells_over(Bounds(1064, 3064, 64, 65)) == (slice(1, 3), slice(1, 2))
    fine = a_grid.finer(17, 8)  # inner squares of 9 px: heatmap pixels from 0.5 working px on
    assert fine.cells_over(Bounds(1000, 3001, 17, 16)) == (slice(0, 1), slice(0, 1))
    assert fine.cells_over(Bounds(1000, 3001, 18, 17)) == (slice(0, 2), slice(0, 2))


def test_lengths_go_from_working_to_level0_px_and_back():
    a_grid = grid(x=1000, y=3000, downsample=2.5, mpp=0.25)
    assert a_grid.working_mpp == 0.625
    assert a_grid.level0_length(6) == 15
    assert a_grid.working_length(15) == 6


def test_points_of_the_working_frame_are_measured_from_the_corner_of_the_bounds():
    a_grid = grid(x=1000, y=3000, downsample=2.5)
    # 1000 + 2.5 * 3 and 3000 - 2.5 * 1, which is before the bounds
    assert a_grid.level0_points([[3, -1], [0, 0]]).tolist() == [[1007.5, 2997.5], [1000, 3000]]
    assert a_grid.level0_points((3, -1)).tolist() == [1007.5, 2997.5]


def test_micrometres_and_level0_px_are_inverse():
    assert level0_to_um(400, 0.25) == 100
    assert um_to_level0(100, 0.25) == 400
    assert level0_to_um(np.array([4, 8]), 0.5).tolist() == [2, 4]


def test_a_box_read_at_the_working_resolution_covers_its_px_times_the_downsample():
    assert level0_box(10, -20, 4, 6, 2.5) == (10, -20, 20, -5)


@pytest.mark.parametrize(
    ("downsample", "bounds"),
    [
        (1.0, Bounds(7, -9, 3, 2)),
        (4.0, Bounds(7, -9, 9, 5)),  # a px more than 2 * 4 and 1 * 4: the third and second begin
        (2.5, Bounds(7, -9, 6, 3)),  # 5 + 1, and the whole part of 2.5, + 1
    ],
)
def test_a_grid_of_pixels_has_a_cell_for_each(downsample, bounds):
    a_grid = PatchGrid.of_pixels(7, -9, 3, 2, 0.5, downsample)
    assert (a_grid.bounds, a_grid.mpp, a_grid.shape) == (bounds, 0.5, (2, 3))
    assert a_grid.level0_points((2, 1)).tolist() == [7 + 2 * downsample, -9 + downsample]


def test_a_block_of_heatmap_pixels_is_where_its_cells_squares_are():
    """Stride 2, inner square 4, downsample 3: a pixel's square starts 3 level-0 px into it."""
    a_grid = grid(60, 60, x=100, y=200, downsample=3.0, patch_px=6, stride_px=2, inner_px=4)
    # A step is 6 level-0 px: 100 + 3 + 2 * 6 for the third column, 200 + 3 + 6 for the second row.
    assert a_grid.heatmap_box((1, 2), (4, 5)) == (115, 209, 145, 233)
    assert a_grid.cells_over(Bounds(115, 209, 30, 24)) == (slice(1, 5), slice(2, 7))


def test_a_raster_starts_at_the_level0_corner():
    """Pixels of 4 level-0 px: pixel 2 is 8..12, its centre 10; place 9 is a quarter into it."""
    assert pixel_centres([0, 2], 4).tolist() == [2, 10]
    assert raster_places([[9, 0]], 4).tolist() == [[2.25, 0]]
    assert raster_to_level0(2.25, 4) == 9
    assert raster_size((8, 9), 4) == (2, 3)
    assert raster_size((3 * 7.776, 4 * 7.776), 7.776) == (3, 4)  # rounding adds no pixel


def test_heatmap_places_are_the_inverse_of_heatmap_points():
    a_grid = grid(x=100, y=300, downsample=2.37, patch_px=64, stride_px=40, inner_px=44)
    points = np.array([[0.0, 0.0], [3.5, 7.25], [-1.0, 2.0]])
    np.testing.assert_allclose(
        a_grid.heatmap_places(a_grid.heatmap_points(points)), points, atol=1e-12
    )
    # Worked by hand: the first heatmap pixel begins 2 working px, 4.74 px, within the bounds.
    np.testing.assert_allclose(
        a_grid.heatmap_places([104.74 + 94.8, 304.74 + 47.4]), [1, 0.5], atol=1e-12
    )


def test_places_of_pixels_in_a_picture_are_their_places_in_its_raster():
    picture = PatchGrid.of_pixels(1000, 500, 30, 20, 0.25, 3.5)
    np.testing.assert_allclose(picture.heatmap_places([1000, 507]), [0, 2])


def test_points_in_bounds_count_from_the_corner_of_the_scanned_part():
    np.testing.assert_array_equal(
        grid(x=1000, y=3000, downsample=2.0).points_in_bounds([[1000, 3000], [1010.5, 2999]]),
        [[0, 0], [10.5, -1]],
    )
