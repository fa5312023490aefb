"""Boxes of pixels, int64 (N, 4): left, upper, right and lower edge of each, px from one corner."""

from itertools import product

import numpy as np


def clip_boxes(
    boxes: np.ndarray, frame: tuple[int, int, int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cut boxes to a frame.

    Parameters
    ----------
    boxes : int64 array, shape (N, 4)
    frame : (int, int, int, int)
        Edges in the order of a box's.

    Returns
    -------
    positions : int64 array, shape (M,)
        Of the boxes that have px in the frame.
    parts : int64 array, shape (M, 4)
        What the frame holds of them.
    """
    left, upper, right, lower = frame
    clipped = boxes.clip([left, upper, left, upper], [right, lower, right, lower])
    held = np.flatnonzero((clipped[:, :2] < clipped[:, 2:]).all(1))
    return held, clipped[held]


def bounding_box(boxes: np.ndarray) -> tuple[int, int, int, int]:
    """Edges of the smallest box that holds all boxes; N >= 1."""
    return (*boxes[:, :2].min(0).tolist(), *boxes[:, 2:].max(0).tolist())


def cells_touched(boxes: np.ndarray, cell: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows and columns of the cells of a grid that boxes touch, in row-major order.

    Parameters
    ----------
    boxes : int64 array, shape (N, 4)
        Px from the grid's corner.
    cell : (int, int)
        Width and height of a cell, px.
    """
    cells: set[tuple[int, int]] = set()
    ends = np.hstack([boxes[:, :2] // cell, -(-boxes[:, 2:] // cell)])
    for left, upper, right, lower in ends.tolist():
        cells.update(product(range(upper, lower), range(left, right)))
    return sorted(cells)
