import pickle

import numpy as np
import pytest

from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.patches.slabs import slabs


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
