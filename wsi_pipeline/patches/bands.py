"""Reading patches that overlap: each pixel once, in bands that move down a slab."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import numpy as np

from wsi_pipeline.errors import SlideReadError
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.patches.slabs import Slab
from wsi_pipeline.slides.threads import in_threads

BAND_PX = 32 << 20
"""About as many pixels of a slab are in memory at a time, 100 MB."""
MOVED_PX = 2048
"""Of a row, at a time."""
_SPARE: list[np.ndarray] = []
"""The memory of a band that ended, for the next one."""


class UnreadPatch(NamedTuple):
    """A patch, or block of them, that cannot be decoded: upper left level-0 px, and why."""

    x: int
    y: int
    reason: str


def read_patch(
    slide, grid: PatchGrid, x: float, y: float, out: np.ndarray | None = None
) -> np.ndarray:
    """Pixels of one patch.

    Parameters
    ----------
    slide : Slide
    grid : PatchGrid
    x, y : float
        Its upper left corner, level-0 px. Training takes those of the patch index: whole numbers.
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


def readable_patches(
    slide, grid: PatchGrid, slab: Slab, unread: list[UnreadPatch], *, as_indexed: bool = False
) -> Iterator[tuple[int, np.ndarray]]:
    """Read a slab's patches, each pixel once; where that fails, those left one by one.

    Parameters
    ----------
    slide : Slide
    grid : PatchGrid
    slab : Slab
    unread : list of UnreadPatch
        Those that cannot be decoded are appended.
    as_indexed : bool
        Whether patches must be, in every bit, what `read_patch` gives at their corners in the patch
        index, which are rounded. Resampled ones are then read one by one from the start, since
        they differ a little with where a read begins. Those stored at a whole-number downsample
        have whole corners and are the same in any case.

    Yields
    ------
    position : int
        Among the slab's cells; ascending.
    pixels : uint8 array, shape (patch_px, patch_px, 3)
        Holds until the next is asked for.
    """
    indexed = np.stack(grid.patch_origins(slab.rows, slab.cols), axis=1).tolist()
    corners, done = indexed, 0
    if not as_indexed or _is_stored(slide, grid.downsample):
        corners = np.stack(_patch_corner(grid, slab.rows, slab.cols), axis=1).tolist()
        try:
            for positions, patches in read_patches(slide, grid, slab):
                yield from zip(range(positions.start, positions.stop), patches, strict=True)
                done = positions.stop
        except SlideReadError:
            pass  # one by one, only those over the damaged tiles are lost
    for position in range(done, len(corners)):
        try:
            yield position, read_patch(slide, grid, *corners[position])
        except SlideReadError as error:
            unread.append(UnreadPatch(*indexed[position], str(error)))


def _is_stored(slide, downsample: float) -> bool:
    """Whether pixels come as stored, each from a whole level-0 px on."""
    return downsample in slide.level_downsamples and downsample == int(downsample)


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


def _patch_corner(grid: PatchGrid, row, col) -> tuple:
    """Upper left x and y of patches, level-0 px, not rounded: `PatchGrid.patch_origins` rounds."""
    x_px = col * grid.stride_px - grid.margin_px
    y_px = row * grid.stride_px - grid.margin_px
    return grid.bounds.x + x_px * grid.downsample, grid.bounds.y + y_px * grid.downsample
