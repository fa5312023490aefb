"""Slabs: patches of a slide that are read together, since they overlap.

A slab is the part of a slide under one chunk of a store: the unit of reading, of work and of
writing. Its pixels are read once, and its overlapping patches are views of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import numpy as np

from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.slides.threads import in_threads

BAND_PX = 32 << 20
"""About as many pixels of a slab are in memory at a time, 100 MB."""
MOVED_PX = 2048
"""Of a row, at a time."""
_SPARE: list[np.ndarray] = []
"""The memory of a band that ended, for the next one."""


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
    slide, grid: PatchGrid, row: int, col: int, rows: int = 1, cols: int = 1
) -> np.ndarray:
    """Pixels under `rows` x `cols` patches, the first of them at cell (row, col).

    Parameters
    ----------
    slide : Slide
    grid : PatchGrid
    row, col, rows, cols : int

    Returns
    -------
    uint8 array, shape (h, w, 3)
        h = (rows - 1) * stride_px + patch_px, w alike; white outside the slide.

    Raises
    ------
    SlideReadError
        If a part of it cannot be decoded.
    """
    x, y = _patch_corner(grid, row, col)
    width, height = ((count - 1) * grid.stride_px + grid.patch_px for count in (cols, rows))
    return slide.read(x, y, width, height, grid.downsample)


def read_patch(slide, grid: PatchGrid, x: int, y: int, out: np.ndarray | None = None) -> np.ndarray:
    """Pixels of one patch, as training gets them.

    Parameters
    ----------
    slide : Slide
    grid : PatchGrid
    x, y : int
        Its upper left corner, level-0 px, as in the patch index: whole numbers, where `read_cells`
        is exact.
    out : uint8 array, shape (patch_px, patch_px, 3), optional
        Filled and returned.

    Returns
    -------
    uint8 array, shape (patch_px, patch_px, 3)

    Raises
    ------
    SlideReadError
        If a part of it cannot be decoded.
    """
    return slide.read(x, y, grid.patch_px, grid.patch_px, grid.downsample, out=out)


def read_slab(slide, grid: PatchGrid, slab: Slab) -> np.ndarray:
    """Pixels of the box around a slab's patches, as `read_cells` gives them.

    Raises
    ------
    SlideReadError
        If a part of it cannot be decoded.
    """
    row, col = int(slab.rows.min()), int(slab.cols.min())
    rows, cols = int(slab.rows.max()) - row + 1, int(slab.cols.max()) - col + 1
    return read_cells(slide, grid, row, col, rows, cols)


def covered_px(grid: PatchGrid, rows, cols, width: int, height: int) -> int:
    """Working px under patches and inside the slide, each counted once.

    Parameters
    ----------
    grid : PatchGrid
    rows, cols : array_like of int, shape (N,)
        The patches' cells.
    width, height : int
        Of the slide's level-0 frame, level-0 px.

    Returns
    -------
    int
        The area of their union; exact where the frame ends on whole working px.
    """
    x, y = (np.asarray(cells) * grid.stride_px - grid.margin_px for cells in (cols, rows))
    columns, lines = (np.union1d(starts, starts + grid.patch_px) for starts in (x, y))
    covered = _parts_under(x, y, grid.patch_px, columns, lines)
    across, down = (
        np.diff(np.clip(edges, -start / grid.downsample, (end - start) / grid.downsample))
        for edges, start, end in (
            (columns, grid.bounds.x, width),
            (lines, grid.bounds.y, height),
        )
    )
    return round(float(down @ covered @ across))


def read_patches(slide, grid: PatchGrid, slab: Slab) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Read a slab's patches from top to bottom, each pixel under them once.

    A band as wide as the slab moves down over it; what patches further down need of its pixels is
    kept. It ends on edges of the slide's tiles, and only tiles under a patch are read: within a
    slab none is decoded twice. Whatever the slab's size, some `BAND_PX` pixels are in memory.

    Parameters
    ----------
    slide : Slide
    grid : PatchGrid
    slab : Slab

    Yields
    ------
    positions : slice
        Of the slab's cells, in their order.
    patches : list of uint8 arrays, shape (patch_px, patch_px, 3)
        Views of the band: they hold until the next are asked for, the last ones until another
        slab is read.

    Raises
    ------
    SlideReadError
        While iterating: a part of the slab cannot be decoded.
    """
    side, step = grid.patch_px, grid.stride_px
    y, x = ((cells - cells.min()) * step for cells in (slab.rows, slab.cols))
    height, width = int(y.max()) + side, int(x.max()) + side
    left, upper = _patch_corner(grid, int(slab.rows.min()), int(slab.cols.min()))
    columns, rows = slide.tile_edges(left, upper, width, height, grid.downsample)
    needed = _parts_under(x, y, side, columns, rows)
    px = slide.as_read(grid.downsample)
    least = side + step + int(np.diff(rows).max())  # so that it can end on an edge
    band_rows = min(height, max(BAND_PX // width, least))
    with _memory(band_rows, width, 3) as band:
        first = top = end = 0  # the band holds the slab's px rows top to end
        while first < len(y):
            down, top = int(y[first]) - top, int(y[first])
            if top < end:
                _, kept = _between(rows, needed, top, end)
                _move_up(band, down, end - top, columns, kept.any(0))
            start, end = max(top, end), _last(rows, top + side, top + len(band))
            if start < end:
                lines, new = _between(rows, needed, start, end)
                corner = left, upper + start * px
                slide.read_parts(
                    *corner, columns, lines, new, px, out=band[start - top : end - top]
                )
            held = slice(first, int(np.searchsorted(y, end - side, side="right")))
            corners = zip((y[held] - top).tolist(), x[held].tolist(), strict=True)
            yield held, [band[row : row + side, col : col + side] for row, col in corners]
            first = held.stop


@contextmanager
def _memory(*shape: int) -> Iterator[np.ndarray]:
    """A uint8 array, in the memory of the last one where that is enough: new pages take time."""
    try:
        memory = _SPARE.pop()
    except IndexError:
        memory = np.empty(0, np.uint8)
    if len(memory) < prod(shape):
        memory = np.empty(prod(shape), np.uint8)
    try:
        yield memory[: prod(shape)].reshape(shape)
    finally:
        _SPARE[:] = [memory]


def _parts_under(x, y, side: int, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which parts lie under a patch: bool, one for each pair of row and column."""
    corners = np.zeros((len(rows), len(columns)), np.int64)
    upper, left = (np.searchsorted(*p, side="right") - 1 for p in ((rows, y), (columns, x)))
    lower, right = (np.searchsorted(*p) for p in ((rows, y + side), (columns, x + side)))
    for row, col, count in (
        (upper, left, 1), (upper, right, -1), (lower, left, -1), (lower, right, 1)
    ):  # fmt: skip
        np.add.at(corners, (row, col), count)
    return corners.cumsum(0).cumsum(1)[:-1, :-1] > 0


def _last(edges: np.ndarray, lowest: int, highest: int) -> int:
    """The last edge from `lowest` to `highest`; the former if there is none."""
    return max(int(edges[np.searchsorted(edges, highest, side="right") - 1]), lowest)


def _between(
    rows: np.ndarray, needed: np.ndarray, start: int, end: int
) -> tuple[np.ndarray, np.ndarray]:
    """Edges of the parts between two px rows, from `start` on, and which of them are needed."""
    first, stop = np.searchsorted(rows, start, side="right") - 1, np.searchsorted(rows, end)
    return rows[first : stop + 1].clip(start, end) - start, needed[first:stop]


def _move_up(
    band: np.ndarray, down: int, height: int, columns: np.ndarray, needed: np.ndarray
) -> None:
    """Move `height` rows of the band from `down` to its top, in the columns that are needed."""

    def move(part: slice) -> None:
        band[:height, part] = band[down : down + height, part]

    ends = columns[np.flatnonzero(np.diff(needed, prepend=False, append=False))]
    in_threads(
        move,
        [
            slice(left, min(left + MOVED_PX, right))
            for start, right in ends.reshape(-1, 2).tolist()
            for left in range(start, right, MOVED_PX)
        ],
    )


def _patch_corner(grid: PatchGrid, row: int, col: int) -> tuple[float, float]:
    """Upper left corner of a patch, level-0 px, not rounded: `PatchGrid.patch_origins` rounds."""
    x_px = col * grid.stride_px - grid.margin_px
    y_px = row * grid.stride_px - grid.margin_px
    return grid.bounds.x + x_px * grid.downsample, grid.bounds.y + y_px * grid.downsample
