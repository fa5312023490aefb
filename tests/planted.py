"""Heatmaps with a planted lesion, on slides of three geometries, for tests of exports."""

import numpy as np

from wsi_pipeline.geometry import Bounds, PatchGrid

GRIDS = {
    "plain": PatchGrid(Bounds(0, 0, 9000, 7000), 0.5, 1.0, 64, 48, 48),
    "bounds": PatchGrid(Bounds(1234, 567, 9000, 7000), 0.25, 2.0, 64, 32, 48),
    "downsample": PatchGrid(Bounds(0, 0, 9000, 7000), 0.2431, 2.37, 64, 40, 40),
}
"""A plain slide, one whose scanned part begins elsewhere (MRXS), one that is resampled."""
SLIDE_SIZES = {"plain": (9000, 7000), "bounds": (12000, 8000), "downsample": (9000, 7000)}

ROWS, COLS = slice(20, 24), slice(30, 33)
"""Heatmap pixels of the lesion, with probability 0.9375 (exact in float32 and decimal)."""
LESION = 0.9375


def planted(grid: PatchGrid) -> np.ndarray:
    """Low probabilities, no tissue in the first 5 rows, and the lesion."""
    values = np.random.default_rng(0).uniform(0, 0.25, grid.shape).astype(np.float32)
    values[:5] = np.nan
    values[ROWS, COLS] = LESION
    return values


def lesion_box(grid: PatchGrid) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of the lesion, level-0 px: worked from the grid's definition.

    A heatmap pixel is the square of one stride around its patch's centre, which is the centre of
    its inner square; the inner square of cell (row, col) begins at working px
    (col * stride, row * stride).
    """
    first = (
        np.array([COLS.start, ROWS.start]) * grid.stride_px + (grid.inner_px - grid.stride_px) / 2
    )
    size = np.array([COLS.stop - COLS.start, ROWS.stop - ROWS.start]) * grid.stride_px
    corner = np.array([grid.bounds.x, grid.bounds.y])
    x0, y0 = corner + first * grid.downsample
    x1, y1 = corner + (first + size) * grid.downsample
    return x0, y0, x1, y1
