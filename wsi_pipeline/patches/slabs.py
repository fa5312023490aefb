"""Slabs: patches of a slide that are read together, since they overlap.

A slab is the part of a slide under one chunk of a store: the unit of reading, of work and of
writing. Its pixels are read once, and its overlapping patches are views of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import PatchGrid


@dataclass(frozen=True, eq=False)
class Slab:
    """Cells that belong to one chunk of a store: small and picklable.

    Parameters
    ----------
    chunk : tuple of int
        Row and column of the chunk among the store's chunks.
    rows, cols : int64 arrays, shape (N,)
        Cells of a grid, in row-major order; N >= 1.
    """

    chunk: tuple[int, int]
    rows: np.ndarray
    cols: np.ndarray


def slabs(grid: PatchGrid, rows, cols, chunk: int) -> list[Slab]:
    """Group indexed cells by the chunk they lie in.

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


def read_cells(
    slide,
    grid: PatchGrid,
    row: int,
    col: int,
    rows: int = 1,
    cols: int = 1,
    needed: np.ndarray | None = None,
) -> np.ndarray:
    """Pixels under `rows` x `cols` patches, the first of them at cell (row, col).

    Parameters
    ----------
    slide : Slide
    grid : PatchGrid
    row, col, rows, cols : int
    needed : int array, shape (N, 4), optional
        See `Slide.read`.

    Returns
    -------
    uint8 array, shape (h, w, 3)
        h = (rows - 1) * stride_px + patch_px, w alike; white outside the slide.

    Raises
    ------
    SlideReadError
        If a part of it cannot be decoded.
    """
    x_px = col * grid.stride_px - grid.margin_px
    y_px = row * grid.stride_px - grid.margin_px
    return slide.read(
        grid.bounds.x + x_px * grid.downsample,
        grid.bounds.y + y_px * grid.downsample,
        (cols - 1) * grid.stride_px + grid.patch_px,
        (rows - 1) * grid.stride_px + grid.patch_px,
        grid.downsample,
        needed,
    )


def read_slab(slide, grid: PatchGrid, slab: Slab) -> np.ndarray:
    """Pixels of the box around a slab's patches, as `read_cells` gives them.

    What lies under none of them may be white: tissue is ragged, and its box half empty.

    Raises
    ------
    SlideReadError
        If a part of it cannot be decoded.
    """
    row, col = int(slab.rows.min()), int(slab.cols.min())
    rows, cols = int(slab.rows.max()) - row + 1, int(slab.cols.max()) - col + 1
    x, y = (slab.cols - col) * grid.stride_px, (slab.rows - row) * grid.stride_px
    needed = np.stack([x, y, x + grid.patch_px, y + grid.patch_px], axis=1)
    return read_cells(slide, grid, row, col, rows, cols, needed)


def covered_px(grid: PatchGrid, rows, cols, width: float, height: float) -> int:
    """Working px under patches and inside the slide, each counted once.

    Parameters
    ----------
    grid : PatchGrid
    rows, cols : array_like of int, shape (N,)
        The patches' cells.
    width, height : float
        Of the slide's level-0 frame, level-0 px.

    Returns
    -------
    int
        The area of their union, exactly where the frame ends on whole working px.
    """
    # Union of rectangles by coordinate compression: between neighbouring edges all is covered or
    # nothing, and sums over the corners, counted with their signs, tell which.
    (top, bottom, y_edges), (left, right, x_edges) = (
        _edges(np.asarray(cells) * grid.stride_px - grid.margin_px, grid.patch_px, *span)
        for cells, span in (
            (rows, (-grid.bounds.y / grid.downsample, (height - grid.bounds.y) / grid.downsample)),
            (cols, (-grid.bounds.x / grid.downsample, (width - grid.bounds.x) / grid.downsample)),
        )
    )
    corners = np.zeros((len(y_edges), len(x_edges)), np.int64)
    for y, x, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        np.add.at(corners, (y, x), sign)
    covered = corners.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0
    return round(float(np.diff(y_edges) @ covered @ np.diff(x_edges)))


def _edges(starts, side: int, low: float, high: float):
    """Where intervals start and end among all their ends, cut to a span; and these ends."""
    ends, places = np.unique(np.clip([starts, starts + side], low, high), return_inverse=True)
    return *places.reshape(2, -1), ends


def slab_patches(pixels: np.ndarray, grid: PatchGrid, slab: Slab) -> list[np.ndarray]:
    """Cut a slab's patches from its pixels, without copying any.

    Parameters
    ----------
    pixels : uint8 array, shape (h, w, 3)
        From `read_slab`.
    grid : PatchGrid
    slab : Slab

    Returns
    -------
    list of uint8 arrays, shape (patch_px, patch_px, 3)
        Views of `pixels`, in the order of the slab's cells.
    """
    x = ((slab.cols - slab.cols.min()) * grid.stride_px).tolist()
    y = ((slab.rows - slab.rows.min()) * grid.stride_px).tolist()
    side = grid.patch_px
    return [pixels[y0 : y0 + side, x0 : x0 + side] for x0, y0 in zip(x, y, strict=True)]
