"""Detections: the places of a heatmap where tumour is most likely, as candidates for FROC.

A detection is a confidence and a place on the slide. Its place is the level-0 pixel at the centre
of a cell's inner square, so every detection lies on the slide and in whole px, as the CAMELYON16
organisers' script reads them.
"""

from typing import Literal

import numpy as np
import pandas as pd
from scipy import ndimage

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.geometry import PatchGrid

FIRST_NEIGHBOURS = 4
"""The nearest cells are compared first: they tell most cells that they are no peak."""
RADIUS_TOLERANCE = 1e-9
"""Relative: a radius that is a whole number of cells reaches the last one in spite of rounding."""


def find_detections(
    values: np.ndarray,
    grid: PatchGrid,
    *,
    method: Literal["peaks", "components"],
    radius_um: float,
    min_probability: float,
) -> pd.DataFrame:
    """Detections by one of the two methods; reports and exports both take them from here.

    Parameters
    ----------
    values, grid, radius_um, min_probability
        As for `peak_detections`; components need no radius.
    method : {"peaks", "components"}

    Returns
    -------
    DataFrame
        As `peak_detections` or `component_detections` gives it.
    """
    if method == "components":
        return component_detections(values, grid, min_probability=min_probability)
    return peak_detections(values, grid, radius_um=radius_um, min_probability=min_probability)


def peak_detections(
    values: np.ndarray, grid: PatchGrid, *, radius_um: float, min_probability: float
) -> pd.DataFrame:
    """Non-maximum suppression: the highest cell of each neighbourhood.

    The definition is greedy: keep the highest cell, drop all others within `radius_um` of it
    (centre to centre, the distance `radius_um` included), go on with the highest that is left.
    Of equal cells the first by row, then column, counts as the higher. A cell on the slope of a
    peak is therefore kept too, once it is further than the radius from every kept one.

    Parameters
    ----------
    values : float array, shape `grid.shape`
        Level 0 of the heatmap, in [0, 1]; NaN (no tissue) is never a detection.
    grid : PatchGrid
    radius_um : float
        0 or more; below the step of the grid every cell is kept.
    min_probability : float
        Cells from here on are candidates.

    Returns
    -------
    DataFrame
        ``probability`` in [0, 1], ``x``, ``y`` (level-0 px, whole numbers), all float64, ordered
        by falling probability, then row, then column.

    Raises
    ------
    ConfigError
        If `radius_um` is negative or not a number.
    RunError
        If `values` are not of the grid's shape.
    """
    if not radius_um >= 0:
        raise ConfigError(f"radius_um is {radius_um}: it must be 0 or more")
    values = _checked(values, grid)
    cells = _highest_first(np.flatnonzero(values >= min_probability), values)
    kept = _greedy(cells, values.shape, radius_um / grid.pixel_spacing_um())
    return _detections(cells[kept], values, grid)


def component_detections(
    values: np.ndarray, grid: PatchGrid, *, min_probability: float
) -> pd.DataFrame:
    """One detection for each 8-connected component of the cells from `min_probability` on.

    Its confidence is the component's largest value, its place that of the cell which has it (of
    equal cells the first by row, then column).

    Parameters
    ----------
    values, grid, min_probability
        As for `peak_detections`.

    Returns
    -------
    DataFrame
        As `peak_detections` gives it.

    Raises
    ------
    RunError
        If `values` are not of the grid's shape.
    """
    values = _checked(values, grid)
    component, _ = ndimage.label(values >= min_probability, structure=np.ones((3, 3)))
    cells = _highest_first(np.flatnonzero(component), values)
    _, first = np.unique(component.flat[cells], return_index=True)
    return _detections(cells[np.sort(first)], values, grid)


def _checked(values: np.ndarray, grid: PatchGrid) -> np.ndarray:
    """Float64, so that a threshold is never rounded to the heatmap's float32."""
    grid.check_shape(values)
    return np.asarray(values, np.float64)


def _highest_first(cells: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Flat positions by falling value; `cells` come in order, so ties stay by row and column."""
    return cells[np.argsort(-values.flat[cells], kind="stable")]


def _detections(cells: np.ndarray, values: np.ndarray, grid: PatchGrid) -> pd.DataFrame:
    x, y = grid.centre_pixels(*np.divmod(cells, values.shape[1]))
    table = {"probability": values.flat[cells], "x": x, "y": y}
    return pd.DataFrame(table, dtype=np.float64)


def _greedy(cells: np.ndarray, shape: tuple[int, int], radius_cells: float) -> np.ndarray:
    """Ranks of the cells that greedy suppression keeps, in rounds instead of one by one.

    A cell that outranks all other candidates within the radius is kept whatever happens
    elsewhere, and what lies within the radius of a kept cell is dropped; so a round keeps all
    such cells at once, and by induction the rounds keep what the loop over ranks keeps. After a
    round, only cells that had a candidate dropped within the radius can newly outrank the rest:
    they lie within twice the radius of a cell just kept. Kept cells being further apart than the
    radius, all rounds together visit a fixed multiple of the cells, whatever the radius.

    Parameters
    ----------
    cells : int array, shape (N,)
        Flat positions of the candidates, the highest first: rank = position here.
    shape : (int, int)
    radius_cells : float

    Returns
    -------
    int32 array, shape (K,)
        Rising.
    """
    radius_cells = min(radius_cells, sum(shape))  # no two cells are further apart
    pad = [int(min(2 * radius_cells + 1, side)) for side in shape]
    width = shape[1] + 2 * pad[1]
    none = len(cells)  # the rank of what is no candidate, or not any more
    padded = np.full((shape[0] + 2 * pad[0], width), none, np.int32)
    padded[pad[0] : pad[0] + shape[0], pad[1] : pad[1] + shape[1]].flat[cells] = np.arange(none)
    rank = padded.ravel()
    reach = radius_cells**2 * (1 + RADIUS_TOLERANCE)
    disc, ring = _offsets(0, reach, pad, width), _offsets(reach, 4 * reach, pad, width)
    stamp = np.empty_like(rank)
    doubtful, kept = np.flatnonzero(rank < none).astype(np.int32), []
    while len(doubtful):
        peaks = _peaks(doubtful, rank, disc)
        kept.append(rank[peaks])
        rank[peaks] = none
        rank[np.add.outer(peaks, disc)] = none
        near = np.add.outer(peaks, ring).ravel()
        near = near[rank[near] < none]
        stamp[near] = order = np.arange(len(near), dtype=np.int32)
        doubtful = near[stamp[near] == order]  # each once
    return np.sort(np.concatenate(kept)) if kept else np.empty(0, np.int32)


def _peaks(cells: np.ndarray, rank: np.ndarray, disc: np.ndarray) -> np.ndarray:
    """Those cells of which no candidate on the disc is higher.

    Neighbours are compared from near to far, twice as many each time: what is still a peak within
    some distance is sparser than it, so that each time costs about the same.
    """
    start, count = 0, FIRST_NEIGHBOURS
    while start < len(disc):
        neighbours = rank[np.add.outer(cells, disc[start : start + count])]
        cells = cells[rank[cells] < neighbours.min(axis=1)]
        start, count = start + count, 2 * count
    return cells


def _offsets(above: float, up_to: float, pad: list[int], width: int) -> np.ndarray:
    """Steps in a flat map to the cells whose squared distance is in (above, up_to]: the near first.

    Steps over the padding are left out: there is no cell.
    """
    rows, cols = np.ogrid[-pad[0] : pad[0] + 1, -pad[1] : pad[1] + 1]
    distance = rows**2 + cols**2
    chosen = np.flatnonzero((distance > above) & (distance <= up_to))
    chosen = chosen[np.argsort(distance.flat[chosen], kind="stable")]
    return (rows * width + cols).flat[chosen].astype(np.int32)
