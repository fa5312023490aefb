import numpy as np
import pytest
from slide_files import ArraySlide, write_mrxs

from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.predict import predict_slab
from wsi_pipeline.patches.slabs import slabs
from wsi_pipeline.slides.reader import Slide


def mean_red(patches):
    return (patches[..., 0].mean(axis=(1, 2)) / 255).astype(np.float32)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (100, 170, 3), np.uint8)


@pytest.fixture
def grid(pixels):
    height, width = pixels.shape[:2]
    return PatchGrid(Bounds(0, 0, width, height), 0.5, 1.0, patch_px=32, stride_px=16, inner_px=16)


def all_cells(grid):
    return np.divmod(np.arange(np.prod(grid.shape)), grid.shape[1])


def heatmap_of(slide, grid, rows, cols, chunk, batch_size):
    values = np.full(grid.shape, np.nan, np.float32)
    unread = []
    for slab in slabs(grid, rows, cols, chunk):
        values[slab.rows, slab.cols], failed = predict_slab(
            slide, grid, slab, mean_red, batch_size=batch_size
        )
        unread += failed
    return values, unread


def test_each_patch_gets_the_value_of_its_own_pixels(pixels, grid):
    rows, cols = all_cells(grid)
    values, unread = heatmap_of(ArraySlide(pixels), grid, rows, cols, chunk=4, batch_size=5)
    white = np.pad(pixels, ((8, 64), (8, 64), (0, 0)), constant_values=255)
    for row, col in zip(rows, cols, strict=True):
        patch = white[row * 16 : row * 16 + 32, col * 16 : col * 16 + 32]
        assert values[row, col] == np.float32(patch[..., 0].mean() / 255)
    assert unread == []


@pytest.mark.parametrize(("chunk", "batch_size"), [(1, 1), (2, 3), (5, 4), (64, 1000)])
def test_values_do_not_depend_on_chunk_or_batch(pixels, grid, chunk, batch_size):
    rows, cols = all_cells(grid)
    reference, _ = heatmap_of(ArraySlide(pixels), grid, rows, cols, chunk=16, batch_size=32)
    values, _ = heatmap_of(ArraySlide(pixels), grid, rows[::-1], cols[::-1], chunk, batch_size)
    np.testing.assert_array_equal(values, reference)


@pytest.mark.parametrize("resolution", [{"level": 0}, {"level": 1}, {"mpp": 0.3}, {"mpp": 0.7}])
def test_values_from_a_real_slide_do_not_depend_on_the_chunk(tmp_path, resolution):
    scanned = np.random.default_rng(2).integers(0, 256, (600, 800, 3), np.uint8)
    with Slide(write_mrxs(tmp_path / "slide.mrxs", scanned, 300, 500, levels=2)) as slide:
        # An odd corner lies between the pixels of level 1.
        bounds = Bounds(slide.bounds.x + 1, slide.bounds.y + 1, 799, 599)
        grid = PatchGrid(bounds, slide.mpp, slide.downsample(**resolution), 32, 17, 16)
        cells = all_cells(grid)
        reference, _ = heatmap_of(slide, grid, *cells, chunk=1, batch_size=1)
        values, _ = heatmap_of(slide, grid, *cells, chunk=16, batch_size=32)
    if "level" in resolution:
        np.testing.assert_array_equal(values, reference)
    else:  # resampled pixels may round to the neighbouring grey level
        np.testing.assert_allclose(values, reference, atol=0.5 / 255)


def test_a_slab_is_one_read_of_the_box_around_its_patches(pixels, grid):
    slide = ArraySlide(pixels)
    (slab,) = slabs(grid, [2, 3, 3], [5, 3, 4], chunk=16)
    predict_slab(slide, grid, slab, mean_red, batch_size=2)
    # Columns 3 to 5: from 3 * 16 - 8 on, 2 strides and a patch wide; rows 2 and 3.
    assert slide.reads == [(40, 24, 64, 48)]


def test_the_read_is_placed_by_bounds_and_downsample():
    grid = PatchGrid(Bounds(1000, 500, 400, 400), 0.5, 2.5, 32, 16, 16)
    calls = []

    class Slide:
        def as_read(self, downsample):
            return downsample

        def row_edges(self, y, width_px, height_px, downsample):
            return np.array([0, height_px])

        def read_under(self, *call):
            *_, out = call
            calls.append(call)
            out[:] = 0
            return {}

    (slab,) = slabs(grid, [1], [2], chunk=4)
    predict_slab(Slide(), grid, slab, mean_red, batch_size=1)
    # Working px (2 * 16 - 8, 1 * 16 - 8) = (24, 8), times 2.5, from (1000, 500).
    ((x, y, boxes, downsample, out),) = calls
    assert (x, y, downsample, out.shape) == (1060.0, 520.0, 2.5, (32, 32, 3))
    assert boxes.tolist() == [[0, 0, 32, 32]]


def test_batches_are_no_larger_than_asked(pixels, grid):
    sizes = []

    def predict(patches):
        sizes.append(len(patches))
        assert patches.dtype == np.uint8 and patches.shape[1:] == (32, 32, 3)
        return mean_red(patches)

    (slab,) = slabs(grid, *all_cells(grid), chunk=16)
    predict_slab(ArraySlide(pixels), grid, slab, predict, batch_size=32)
    assert sizes == [32, 32, 13]


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_damage_costs_only_the_patches_over_it_and_each_is_reported(pixels, grid, batch_size):
    rows, cols = all_cells(grid)
    sound, _ = heatmap_of(ArraySlide(pixels), grid, rows, cols, chunk=4, batch_size=4)
    damaged = ArraySlide(pixels, unreadable=(60, 40, 62, 42))

    values, unread = heatmap_of(damaged, grid, rows, cols, chunk=4, batch_size=batch_size)

    # Patch (row, col) covers 16 * col - 8 to 16 * col + 24: px 60 to 62 lie in columns 3 and 4
    # (40 to 72, 56 to 88), px 40 to 42 in rows 2 (24 to 56) and 3 (but not 1: 8 to 40).
    lost = np.zeros(grid.shape, bool)
    lost[2:4, 3:5] = True
    np.testing.assert_array_equal(np.isnan(values), lost)
    np.testing.assert_array_equal(values[~lost], sound[~lost])
    # Two slabs hold a column of lost patches each.
    assert [(x, y) for x, y, _ in unread] == [(40, 24), (40, 40), (56, 24), (56, 40)]
    assert {reason for *_, reason in unread} == {"tile (3, 1) is damaged"}


def test_a_slab_without_a_readable_patch_is_all_nan(pixels, grid):
    damaged = ArraySlide(pixels, unreadable=(0, 0, 170, 100))
    (slab,) = slabs(grid, [1, 1], [1, 2], chunk=16)
    values, unread = predict_slab(damaged, grid, slab, mean_red, batch_size=8)
    assert np.isnan(values).all()
    assert len(unread) == 2
