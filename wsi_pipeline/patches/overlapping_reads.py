"""Reading boxes that overlap, patches most often: each pixel once, in bands that move down."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import numpy as np

from wsi_pipeline.errors import SlideReadError
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.patches.slabs import Slab
from wsi_pipeline.slides.boxes import clip_boxes
from wsi_pipeline.slides.threads import in_threads

BAND_PX = 32 << 20
"""About as many pixels of a slab are in memory at a time, 100 MB."""
MOVED_PX = 2048
"""Of a row, at a time."""
_SPARE: list[np.ndarray] = []
"""The memory of a band that ended, for the next one."""


class UnreadPatch(NamedTuple):
    """A patch, or a box around several, that cannot be decoded: upper left level-0 px, and why."""

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


def read_patches(
    slide, grid: PatchGrid, slab: Slab
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Read a slab's patches from top to bottom, each pixel under them once: see `read_boxes`.

    Raises
    ------
    SlideReadError
        While iterating: a part of them cannot be decoded.
    """
    lost: dict[int, str] = {}
    for band in read_boxes(slide, grid, _patch_boxes(grid, slab), lost):
        if lost:
            raise SlideReadError(next(iter(lost.values())))
        yield band


def read_boxes(
    slide, grid: PatchGrid, boxes: np.ndarray, lost: dict[int, str]
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Read boxes from top to bottom, each pixel under them once.

    A band as wide as all of them moves down; what boxes further down need of its pixels is kept. It
    ends on edges of the slide's tiles, and only tiles under a box are read, none of them twice.
    However far down they reach, some `BAND_PX` pixels are in memory.

    Parameters
    ----------
    slide : Slide
    grid : PatchGrid
    boxes : int64 array, shape (N, 4)
        x, y, width and height, working px from the corner of the grid's bounds; N >= 1.
    lost : dict of int to str
        Gets the positions of the boxes that cannot be decoded, and why.

    Yields
    ------
    positions : int64 array
        Among the boxes; over all yields, in the order of their y, all that are not lost.
    pixels : list of uint8 arrays, shape (height, width, 3)
        Views of the band: they hold until the next are asked for, the last ones until boxes are
        read anew.
    """
    order = _downwards(boxes)
    corner = boxes[order, :2].min(0)
    edges = np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])[order] - np.tile(corner, 2)
    y, bottom = edges[:, 1], edges[:, 3]
    (width, height), tallest = edges[:, 2:].max(0).tolist(), int(boxes[:, 3].max())
    left, upper = grid.level0_points(corner).tolist()
    rows = slide.row_edges(upper, width, height, grid.downsample)
    px = slide.as_read(grid.downsample)
    least = tallest + int(np.diff(rows).max())  # so that it can end on an edge
    band_rows = min(height, max(BAND_PX // width, least))
    reached = np.maximum.accumulate(bottom)
    with _memory(band_rows, width, 3) as band:
        first = top = end = 0  # the band holds px rows top to end
        while first < len(y):
            down, top = int(y[first]) - top, int(y[first])
            if top < end:
                _, kept = clip_boxes(edges[first:], (0, top, width, end))
                _move_up(band, down, end - top, kept)
            lowest = min(top + tallest, height)
            start, end = max(top, end), _last(rows, lowest, top + len(band))
            if start < end:
                met, parts = clip_boxes(edges, (0, start, width, end))
                wanted = ~np.isin(order[met], list(lost))
                met, parts = met[wanted], parts[wanted]
                at, out = (left, upper + start * px), band[start - top : end - top]
                failed = slide.read_under(*at, parts - np.array([0, start, 0, start]), px, out)
                lost.update((int(order[met[box]]), why) for box, why in failed.items())
            stop = int(np.searchsorted(reached, end, side="right"))
            whole = [number for number in range(first, stop) if int(order[number]) not in lost]
            views = (edges[whole] - np.array([0, top, 0, top])).tolist()
            yield order[whole], [band[b:d, a:c] for a, b, c, d in views]
            first = stop


def readable_patches(
    slide, grid: PatchGrid, slab: Slab, unread: list[UnreadPatch], *, as_indexed: bool = False
) -> Iterator[tuple[int, np.ndarray]]:
    """Read a slab's patches as `readable_boxes` does.

    Parameters
    ----------
    as_indexed : bool
        Whether patches must be, in every bit, what `read_patch` gives at their corners in the patch
        index, which are rounded. Resampled ones are then read one by one from the start, since
        they differ a little with where a read begins. Those stored at a whole-number downsample
        have whole corners and are the same in any case.
    """
    boxes, singly = _patch_boxes(grid, slab), as_indexed and not _is_stored(slide, grid.downsample)
    return readable_boxes(slide, grid, boxes, unread, singly=singly)


def readable_boxes(
    slide, grid: PatchGrid, boxes: np.ndarray, unread: list[UnreadPatch], *, singly: bool = False
) -> Iterator[tuple[int, np.ndarray]]:
    """Read boxes, each pixel once; those over what cannot be decoded are left out.

    Parameters
    ----------
    slide : Slide
    grid : PatchGrid
    boxes : int64 array, shape (N, 4)
        As for `read_boxes`.
    unread : list of UnreadPatch
        Those that cannot be decoded are appended.
    singly : bool
        One by one from the start, each from its corner rounded to whole level-0 px.

    Yields
    ------
    position : int
        Among the boxes, in the order of their y.
    pixels : uint8 array, shape (height, width, 3)
        Holds until the next is asked for.
    """
    origins = np.round(grid.level0_points(boxes[:, :2])).astype(np.int64).tolist()
    lost: dict[int, str] = {}
    if singly:
        yield from _one_by_one(slide, grid, boxes, origins, lost)
    else:
        for positions, pixels in read_boxes(slide, grid, boxes, lost):
            yield from zip(positions.tolist(), pixels, strict=True)
    for position, why in sorted(lost.items()):
        x, y = origins[position]
        unread.append(UnreadPatch(x, y, why))


def _one_by_one(slide, grid, boxes, origins, lost) -> Iterator[tuple[int, np.ndarray]]:
    for position in _downwards(boxes).tolist():
        size = boxes[position, 2:].tolist()
        try:
            pixels = slide.read(*origins[position], *size, grid.downsample)
        except SlideReadError as error:
            lost[position] = str(error)
        else:
            yield position, pixels


def _patch_boxes(grid: PatchGrid, slab: Slab) -> np.ndarray:
    corners = np.stack([slab.cols, slab.rows], axis=1) * grid.stride_px - grid.margin_px
    return np.hstack([corners, np.full_like(corners, grid.patch_px)])


def _downwards(boxes: np.ndarray) -> np.ndarray:
    """Positions of boxes in the order of their y."""
    return np.argsort(boxes[:, 1], kind="stable")


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


def _last(edges: np.ndarray, lowest: int, highest: int) -> int:
    """The last edge from `lowest` to `highest`; the former if there is none."""
    return max(int(edges[np.searchsorted(edges, highest, side="right") - 1]), lowest)


def _move_up(band: np.ndarray, down: int, height: int, boxes: np.ndarray) -> None:
    """Move `height` rows of the band from `down` to its top, in the columns under boxes."""

    def move(part: slice) -> None:
        band[:height, part] = band[down : down + height, part]

    under = np.zeros(band.shape[1], bool)
    for left, _, right, _ in boxes.tolist():
        under[left:right] = True
    ends = np.flatnonzero(np.diff(under, prepend=False, append=False))
    in_threads(
        move,
        [
            slice(left, min(left + MOVED_PX, right))
            for start, right in ends.reshape(-1, 2).tolist()
            for left in range(start, right, MOVED_PX)
        ],
    )
