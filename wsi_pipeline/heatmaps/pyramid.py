"""Coarser levels of a heatmap."""

import numpy as np


def block_means(values: np.ndarray, side: int = 2) -> np.ndarray:
    """Means of blocks of `side` x `side` heatmap pixels, NaN left out.

    Parameters
    ----------
    values : float array, shape (rows, cols)
    side : int

    Returns
    -------
    array of the same dtype, shape (rows / side, cols / side), rounded up
        NaN where all pixels of a block are NaN. Blocks at the lower and right edges may be cut.
    """
    if side == 1:
        return values
    rows, cols = values.shape
    whole = np.pad(values, ((0, -rows % side), (0, -cols % side)), constant_values=np.nan)
    blocks = whole.reshape(whole.shape[0] // side, side, whole.shape[1] // side, side)
    known = np.isfinite(blocks).sum(axis=(1, 3))
    total = np.nansum(blocks, axis=(1, 3))
    return np.divide(total, known, out=np.full_like(total, np.nan), where=known > 0)
