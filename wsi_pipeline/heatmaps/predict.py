"""A model over the indexed patches of a slide, slab by slab."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from wsi_pipeline.errors import SlideReadError
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.patches.slabs import Slab, read_cells, read_slab, slab_patches

Predict = Callable[[np.ndarray], np.ndarray]
"""uint8 (N, H, W, 3) -> float32 (N,), probabilities: all that heatmaps know of a model."""


class UnreadPatch(NamedTuple):
    """A patch, or block of them, that cannot be decoded: upper left level-0 px, and why."""

    x: int
    y: int
    reason: str


def predict_slab(
    slide, grid: PatchGrid, slab: Slab, predict: Predict, *, batch_size: int
) -> tuple[np.ndarray, list[UnreadPatch]]:
    """Predict each patch of a slab from a single read of the slide.

    Where that read fails, the patches are read one by one, so that only those over the damaged
    tiles are lost. With 512 px patches at a stride of 256 px, the pixels of a slab of 16 x 16
    cells take 57 MB, of 32 x 32 214 MB; of the patches themselves only one batch is in memory.

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
        pixels = read_slab(slide, grid, slab)
        batches = _batched(slab_patches(pixels, grid, slab), batch_size)
    except SlideReadError:
        batches = _read_singly(slide, grid, slab, batch_size, unread)
    for positions, patches in batches:
        values[positions] = predict(patches)
    return values, unread


def _batched(patches: list[np.ndarray], batch_size: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Batches of patches: positions in the slab, uint8 (N, H, W, 3)."""
    for start in range(0, len(patches), batch_size):
        batch = slice(start, start + batch_size)
        yield batch, np.stack(patches[batch])


def _read_singly(
    slide, grid: PatchGrid, slab: Slab, batch_size: int, unread: list[UnreadPatch]
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Batches of the patches that can be read; the others are appended to `unread`."""
    positions, patches = [], []
    for position, (row, col) in enumerate(zip(slab.rows, slab.cols, strict=True)):
        try:
            patches.append(read_cells(slide, grid, int(row), int(col)))
            positions.append(position)
        except SlideReadError as error:
            x, y = grid.patch_origins(row, col)
            unread.append(UnreadPatch(int(x), int(y), str(error)))
        if len(patches) == batch_size:
            yield positions, np.stack(patches)
            positions, patches = [], []
    if patches:
        yield positions, np.stack(patches)
