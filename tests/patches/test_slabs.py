import pickle
import tracemalloc

import numpy as np
import pytest

from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.patches.slabs import covered_px, slabs


@pytest.fixture
def grid():
    return PatchGrid(Bounds(0, 0, 170, 100), 0.5, 1.0, patch_px=32, stride_px=16, inner_px=16)


def all_cells(grid):
    return np.divmod(np.arange(np.prod(grid.shape)), grid.shape[1])


def test_slabs_hold_each_indexed_cell_once_under_its_own_chunk(grid):
    shuffled = np.random.default_rng(1).permutation(77)[:40]
    rows, cols = np.divmod(shuffled, 11)

    found = slabs(grid, rows, cols, chunk=3)

    by_chunk = {}
    for row, col in sorted(zip(rows.tolist(), cols.tolist(), strict=True)):
        by_chunk.setdefault((row // 3, col // 3), []).append((row, col))
    assert [slab.chunk for slab in found] == sorted(by_chunk)
    for slab in found:
        pairs = list(zip(slab.rows.tolist(), slab.cols.tolist(), strict=True))
        assert pairs == by_chunk[slab.chunk]


def test_an_empty_index_has_no_slabs(grid):
    assert slabs(grid, [], [], chunk=16) == []


@pytest.mark.parametrize(("row", "col"), [(7, 0), (0, 11), (-1, 3)])
def test_a_cell_outside_the_grid_is_refused_by_name(grid, row, col):
    assert grid.shape == (7, 11)
    with pytest.raises(RunError, match=f"row {row}, column {col} .* 7 x 11"):
        slabs(grid, [0, row], [0, col], chunk=16)


def test_a_slab_of_the_default_chunk_travels_in_a_few_kilobytes():
    grid = PatchGrid(Bounds(0, 0, 8192, 8192), 0.25, 1.0)
    (slab, *_) = slabs(grid, *all_cells(grid), chunk=16)
    assert len(slab.rows) == 256
    copy = pickle.loads(pickle.dumps(slab))
    assert copy.chunk == (0, 0)
    assert len(pickle.dumps(slab)) < 8192


def test_pixels_under_patches_count_once_and_only_inside_the_slide(grid):
    assert covered_px(grid, [], [], 170, 100) == 0
    # Patches start 8 px before their cell: 24 x 24 px of the first are inside; (1, 1) is 8 to 40,
    # of which 16 x 16 are the first's; (6, 10) is x 152 to 184 and y 88 to 120, cut at 170 and 100.
    assert covered_px(grid, [0], [0], 170, 100) == 24 * 24
    assert covered_px(grid, [1, 0, 0], [1, 0, 0], 170, 100) == 24 * 24 + 32 * 32 - 16 * 16
    assert covered_px(grid, [6], [10], 170, 100) == 18 * 12
    assert covered_px(grid, *all_cells(grid), 170, 100) == 170 * 100


@pytest.mark.parametrize("stride_px", [5, 16, 40])
def test_pixels_under_patches_are_those_of_a_painted_mask(stride_px):
    """Bounds within a larger frame: patches at their edge reach into the rest of it."""
    grid = PatchGrid(Bounds(60, 40, 340, 200), 0.5, 2.0, 32, stride_px, 16)
    rng = np.random.default_rng(3)
    rows, cols = (rng.integers(0, count, 30) for count in grid.shape)
    mask = np.zeros((150, 210), bool)  # a frame of 420 x 300 level-0 px
    for row, col in zip(rows, cols, strict=True):
        y, x = 20 + row * stride_px - 8, 30 + col * stride_px - 8
        mask[max(y, 0) : y + 32, max(x, 0) : x + 32] = True
    assert covered_px(grid, rows, cols, 420, 300) == mask.sum()


def test_counting_px_takes_no_memory_for_the_grid_between_cells():
    grid = PatchGrid(Bounds(0, 0, 105_185, 221_772), 0.25, 1.0, 512, 32, 32)  # margin 240
    # Patches (2i, i), from px (16, 272) on and at steps of (32, 64). The last, i = 3270, ends at px
    # (3270 * 32 - 240 + 512, 6540 * 32 - 240 + 512) = (104_912, 209_552): all are inside. Each
    # shares 480 x 448 px with the one before, and what it shares with others lies within that.
    cols = np.arange(8, 3271)
    assert grid.shape == (6931, 3288)
    tracemalloc.start()
    try:
        found = covered_px(grid, 2 * cols, cols, 105_185, 221_772)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == 3263 * 512 * 512 - 3262 * 480 * 448
    assert peak_bytes < 4e6  # a byte for each cell between them takes 3263 * 6525 = 21 MB
