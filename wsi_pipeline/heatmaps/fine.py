"""A dense model on the part of a slide that a coarser grid points to, chunk by chunk.

The fine heatmap's pixels are the cells of a grid of small patches (`PatchGrid.finer`). Those are
wanted whose centres lie in chosen inner squares of the coarse grid: of its suspicious cells, or of
all indexed ones. A chunk's task gets the coarse cells that touch it and finds its pixels itself.
"""

from collections.abc import Callable, Iterator

import numpy as np

from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.patches.overlapping_reads import UnreadPatch, readable_boxes
from wsi_pipeline.patches.slabs import Slab, by_chunk, slabs

DensePredict = Callable[[np.ndarray], np.ndarray]
"""uint8 (H, W, 3) -> float32 (rows, cols), probabilities of the patches that lie in the image, one
every stride from its upper left corner on: all that fine heatmaps know of a model."""

BLOCK = 32
"""Side of the squares in which a chunk is read and evaluated, heatmap px; those without a wanted
pixel are left out."""


def coarse_slabs(
    grid: PatchGrid, coarse: PatchGrid, rows: np.ndarray, cols: np.ndarray, chunk: int
) -> Iterator[Slab]:
    """Group coarse cells by the chunks of the fine heatmap that they touch.

    Parameters
    ----------
    grid : PatchGrid
        The fine heatmap's.
    coarse : PatchGrid
        Of the same bounds and downsample.
    rows, cols : int64 arrays, shape (N,)
        Cells of the coarse grid.
    chunk : int
        Side of a chunk, fine heatmap px.

    Yields
    ------
    Slab
        A chunk of the fine heatmap with its coarse cells, of which each has a pixel in it; in
        row-major order of the chunks. A cell may be in several.

    Raises
    ------
    ConfigError
        If the grids are not of the same area and resolution.
    """
    spans = grid.cells_centred_in(coarse, rows, cols)
    held = (spans[:, 0] < spans[:, 1]) & (spans[:, 2] < spans[:, 3])
    rows, cols, spans = rows[held], cols[held], spans[held]
    first_row, last_row, first_col, last_col = ((spans - [0, 1, 0, 1]) // chunk).T
    across = last_col - first_col + 1
    counts = (last_row - first_row + 1) * across
    cell = np.repeat(np.arange(len(rows)), counts)
    number = np.arange(len(cell)) - np.repeat(np.cumsum(counts) - counts, counts)
    row, col = np.divmod(number, across[cell])
    yield from by_chunk(first_row[cell] + row, first_col[cell] + col, rows[cell], cols[cell])


def wanted_pixels(grid: PatchGrid, coarse: PatchGrid, slab: Slab, chunk: int) -> Slab:
    """Turn the coarse cells of a chunk into its wanted pixels.

    Parameters
    ----------
    grid, coarse : PatchGrid
    slab : Slab
        From `coarse_slabs`.
    chunk : int

    Returns
    -------
    Slab
        Cells of the fine grid within the chunk, each once.
    """
    first = chunk * np.array(slab.chunk)
    wanted = np.zeros((chunk, chunk), bool)
    spans = grid.cells_centred_in(coarse, slab.rows, slab.cols) - np.repeat(first, 2)
    for row, end_row, col, end_col in spans.clip(0, chunk):
        wanted[row:end_row, col:end_col] = True
    rows, cols = np.nonzero(wanted)
    return Slab(slab.chunk, rows + first[0], cols + first[1])


def predict_pixels(
    slide, grid: PatchGrid, slab: Slab, predict: DensePredict
) -> tuple[np.ndarray, list[UnreadPatch]]:
    """Predict the pixels of a chunk, the slide's pixels read once.

    The wanted pixels of a block (see `BLOCK`) are predicted together, from the box around their
    patches. Boxes are read in bands (see `read_boxes`): tiles under none of them are not decoded,
    and memory does not grow with the chunk's height. Boxes over what cannot be decoded are left
    out.

    A pixel's value depends on its patch alone: how the slide is divided into chunks and blocks
    changes it by the rounding of float32 at the most, as far as `Slide.read` does not depend on
    where a read begins (not at all on level 0 and levels of whole-number downsample).

    Parameters
    ----------
    slide : Slide
    grid : PatchGrid
    slab : Slab
        From `wanted_pixels`.
    predict : callable
        See `DensePredict`; of the grid's `patch_px` and `stride_px`.

    Returns
    -------
    values : float32 array, shape (N,)
        In the order of the slab's cells; NaN where the block could not be read.
    unread : list of UnreadPatch
        The boxes that could not be read: their corner.
    """
    first_row, first_col = int(slab.rows.min()), int(slab.cols.min())
    values = np.full((slab.rows.max() - first_row + 1, slab.cols.max() - first_col + 1), np.nan)
    blocks = slabs(grid, slab.rows, slab.cols, BLOCK)
    boxes = np.array([_box(grid, block) for block in blocks])
    unread: list[UnreadPatch] = []
    for position, pixels in readable_boxes(slide, grid, boxes, unread):
        block = blocks[position]
        found = predict(pixels)[block.rows - block.rows.min(), block.cols - block.cols.min()]
        values[block.rows - first_row, block.cols - first_col] = found
    return values[slab.rows - first_row, slab.cols - first_col].astype(np.float32), unread


def _box(grid: PatchGrid, block: Slab) -> list[int]:
    """Around the patches of a block: x, y, width and height, working px."""
    col, row = int(block.cols.min()), int(block.rows.min())
    sizes = int(block.cols.max()) - col, int(block.rows.max()) - row
    return [
        *(first * grid.stride_px - grid.margin_px for first in (col, row)),
        *(more * grid.stride_px + grid.patch_px for more in sizes),
    ]
