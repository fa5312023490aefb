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
