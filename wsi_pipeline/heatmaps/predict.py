"""A model over the indexed patches of a slide, slab by slab."""

from collections.abc import Callable, Iterator

import numpy as np

from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.patches.overlapping_reads import UnreadPatch, readable_patches
from wsi_pipeline.patches.slabs import Slab

Predict = Callable[[np.ndarray], np.ndarray]
"""uint8 (N, H, W, 3) -> float32 (N,), probabilities: all that heatmaps know of a model."""


def predict_slab(
    slide, grid: PatchGrid, slab: Slab, predict: Predict, *, batch_size: int
) -> tuple[np.ndarray, list[UnreadPatch]]:
    """Predict each patch of a slab, its pixels read once.

    Patches over what cannot be decoded are left out. In memory are a band of the slab (see
    `read_patches`) and one batch.

    How a slide is divided into slabs leaves its values as they are, up to how far `Slide.read`
    depends on where a read begins: not at all on level 0 and levels of whole-number downsample.

    Parameters
    ----------
    slide : Slide
    grid : PatchGrid
    slab : Slab
    predict : callable
        uint8 (N, patch_px, patch_px, 3) -> float32 (N,), in [0, 1]. The patches' memory is used
        again once it has returned.
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
    for positions, patches in _batches(readable_patches(slide, grid, slab, unread), batch_size):
        values[positions] = predict(patches)
    return values, unread


def _batches(
    patches: Iterator[tuple[int, np.ndarray]], batch_size: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Positions and pixels of a batch at a time: uint8 (N, H, W, 3), in the memory of the last."""
    positions: list[int] = []
    batch = np.empty(0, np.uint8)
    for position, patch in patches:
        if not batch.size:
            batch = np.empty((batch_size, *patch.shape), np.uint8)
        batch[len(positions)] = patch
        positions.append(position)
        if len(positions) == batch_size:
            yield positions, batch
            positions = []
    if positions:
        yield positions, batch[: len(positions)]
