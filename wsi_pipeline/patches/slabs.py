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


def covered_px(grid: PatchGrid, rows, cols, width: int, height: int) -> int:
    """Working px under patches and inside the slide, each counted once.

    They are swept from the first row down: no part of the grid is in memory but the cells given.

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
    if not len(rows):
        return 0
    order = np.argsort(rows, kind="stable")
    rows, cols = np.asarray(rows, np.int64)[order], np.asarray(cols, np.int64)[order]
    firsts = np.append(0, np.flatnonzero(np.diff(rows)) + 1)  # of each row
    side, step, margin = grid.patch_px, grid.stride_px, grid.margin_px
    y = rows[firsts] * step - margin
    x = np.arange(cols.max() + 1) * step - margin + grid.working_length(grid.bounds.x)
    edges = np.union1d(y, y + side)
    width_px, height_px = grid.working_length(width), grid.working_length(height)
    heights = np.diff((edges + grid.working_length(grid.bounds.y)).clip(0, height_px))
    cols_at = dict(zip(y.tolist(), np.split(cols, firsts[1:]), strict=True))
    held = np.zeros(len(x), np.int64)  # patches of each column that the sweep is within
    area = 0.0
    for edge, strip in zip(edges[:-1].tolist(), heights.tolist(), strict=True):
        np.add.at(held, cols_at.get(edge, cols[:0]), 1)
        np.add.at(held, cols_at.get(edge - side, cols[:0]), -1)
        area += strip * _joint_length(x[held > 0], side, width_px)
    return round(area)


def _joint_length(starts: np.ndarray, length: int, limit: float) -> float:
    """Length from 0 to a limit under intervals of one length, ascending, that may overlap."""
    ends = (starts + length).clip(0, limit)
    begins = np.maximum(starts, np.append(0, ends[:-1]))
    return float((ends - begins).clip(0).sum())
