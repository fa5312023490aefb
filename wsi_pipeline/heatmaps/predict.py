"""A model over the indexed patches of a slide, slab by slab.

A slab is the part of a slide under one chunk of its heatmap: the unit of reading, of work and of
writing. Its pixels are read once; overlapping patches are cut from memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from wsi_pipeline.errors import RunError, SlideReadError
from wsi_pipeline.geometry import PatchGrid

Predict = Callable[[np.ndarray], np.ndarray]
"""uint8 (N, H, W, 3) -> float32 (N,), probabilities: all that heatmaps know of a model."""


@dataclass(frozen=True, eq=False)
class Slab:
    """Cells that belong to one heatmap chunk: small and picklable.

    Parameters
    ----------
    chunk : tuple of int
        Row and column of the chunk among the heatmap's chunks.
    rows, cols : int64 arrays, shape (N,)
        Cells of a grid, in row-major order; N >= 1.
    """

    chunk: tuple[int, int]
    rows: np.ndarray
    cols: np.ndarray


class UnreadPatch(NamedTuple):
    """A patch, or block of them, that cannot be decoded: upper left level-0 px, and why."""

    x: int
    y: int
    reason: str


def slabs(grid: PatchGrid, rows, cols, chunk: int) -> list[Slab]:
    """Group indexed cells by the heatmap chunk they lie in.

    Parameters
    ----------
    grid : PatchGrid
    rows, cols : array_like of int, shape (N,)
        The indexed cells, in any order.
    chunk : int
        Side of a chunk, cells.

    Returns
    -------
    list of Slab
        In row-major order of the chunks; chunks without an indexed cell have none.

    Raises
    ------
    RunError
        If a cell lies outside the grid.
    """
    rows, cols = np.asarray(rows, np.int64), np.asarray(cols, np.int64)
    outside = (rows < 0) | (cols < 0) | (rows >= grid.shape[0]) | (cols >= grid.shape[1])
    if outside.any():
        first = int(np.argmax(outside))
        raise RunError(
            f"the indexed patch in row {rows[first]}, column {cols[first]} lies outside its grid"
            f" of {grid.shape[0]} x {grid.shape[1]} cells"
        )
    return list(by_chunk(rows // chunk, cols // chunk, rows, cols))


def by_chunk(chunk_rows, chunk_cols, rows, cols) -> Iterator[Slab]:
    """Group cells by the chunk given for each, in row-major order of the chunks.

    Parameters
    ----------
    chunk_rows, chunk_cols, rows, cols : int64 arrays, shape (N,)
    """
    order = np.lexsort((cols, rows, chunk_cols, chunk_rows))
    changes = np.diff(chunk_rows[order]) | np.diff(chunk_cols[order])
    ends = [*(np.flatnonzero(changes) + 1), len(order)]
    start = 0
    for end in ends if len(order) else ():
        part, start = order[start:end], end
        chunk = int(chunk_rows[part[0]]), int(chunk_cols[part[0]])
        yield Slab(chunk, rows[part], cols[part])


def predict_slab(
    slide, grid: PatchGrid, slab: Slab, predict: Predict, *, batch_size: int
) -> tuple[np.ndarray, list[UnreadPatch]]:
    """Predict each patch of a slab from a single read of the slide.

    Where that read fails, the patches are read one by one, so that only those over the damaged
    tiles are lost. With 512 px patches at a stride of 256 px, the pixels of a slab of 16 x 16
    cells take 57 MB; of the patches themselves only one batch is in memory.

    How a slide is divided into slabs leaves its values as they are, up to how far `Slide.read`
    depends on where a read begins: not at all on level 0 and levels of whole-number downsample.

    Parameters
    ----------
    slide : Slide
    grid : PatchGrid
    slab : Slab
    predict : callable
        uint8 (N, patch_px, patch_px, 3) -> float32 (N,), in [0, 1].
    batch_size : int
        Largest N.

    Returns
    -------
    values : float32 array, shape (N,)
        In the order of the slab's cells; NaN where the patch could not be read.
    unread : list of UnreadPatch
    """
    values = np.full(len(slab.rows), np.nan, np.float32)
    unread: list[UnreadPatch] = []
    try:
        batches = _cut(read_slab(slide, grid, slab), grid, slab, batch_size)
    except SlideReadError:
        batches = _read_singly(slide, grid, slab, batch_size, unread)
    for positions, patches in batches:
        values[positions] = predict(patches)
    return values, unread


def _read(slide, grid: PatchGrid, row: int, col: int, rows: int = 1, cols: int = 1) -> np.ndarray:
    """Pixels under `rows` x `cols` patches, the first of them at cell (row, col)."""
    x_px = col * grid.stride_px - grid.margin_px
    y_px = row * grid.stride_px - grid.margin_px
    return slide.read(
        grid.bounds.x + x_px * grid.downsample,
        grid.bounds.y + y_px * grid.downsample,
        (cols - 1) * grid.stride_px + grid.patch_px,
        (rows - 1) * grid.stride_px + grid.patch_px,
        grid.downsample,
    )


def read_slab(slide, grid: PatchGrid, slab: Slab) -> np.ndarray:
    """Pixels of the box around a slab's patches: uint8 (height, width, 3).

    Raises
    ------
    SlideReadError
        If a part of it cannot be decoded.
    """
    row, col = int(slab.rows.min()), int(slab.cols.min())
    rows, cols = int(slab.rows.max()) - row + 1, int(slab.cols.max()) - col + 1
    return _read(slide, grid, row, col, rows, cols)


def _cut(
    pixels: np.ndarray, grid: PatchGrid, slab: Slab, batch_size: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Batches of overlapping patches: positions in the slab, uint8 (N, H, W, 3)."""
    x = (slab.cols - slab.cols.min()) * grid.stride_px
    y = (slab.rows - slab.rows.min()) * grid.stride_px
    side = grid.patch_px
    for start in range(0, len(x), batch_size):
        batch = slice(start, start + batch_size)
        corners = zip(x[batch], y[batch], strict=True)
        yield batch, np.stack([pixels[y0 : y0 + side, x0 : x0 + side] for x0, y0 in corners])


def _read_singly(
    slide, grid: PatchGrid, slab: Slab, batch_size: int, unread: list[UnreadPatch]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Batches of the patches that can be read; the others are appended to `unread`."""
    positions, patches = [], []
    for position, (row, col) in enumerate(zip(slab.rows, slab.cols, strict=True)):
        try:
            patches.append(_read(slide, grid, int(row), int(col)))
            positions.append(position)
        except SlideReadError as error:
            x, y = grid.patch_origins(row, col)
            unread.append(UnreadPatch(int(x), int(y), str(error)))
        if len(patches) == batch_size:
            yield positions, np.stack(patches)
            positions, patches = [], []
    if patches:
        yield positions, np.stack(patches)
