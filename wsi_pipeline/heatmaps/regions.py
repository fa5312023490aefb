"""Regions: the areas of a heatmap where the probability reaches a threshold.

Reports and exports both take them from here, so that they agree.
"""

from dataclasses import dataclass

import numpy as np
import shapely
from scipy import ndimage

from wsi_pipeline.geometry import PatchGrid, level0_area_to_mm2


@dataclass(frozen=True, eq=False)
class Region:
    """A connected area of heatmap pixels with a probability >= a threshold.

    Parameters
    ----------
    polygon : shapely.Polygon
        Outline and holes, level-0 px. Valid; it ends at the slide's scanned bounds.
    threshold : float
    highest, mean : float
        Largest and mean probability of its heatmap pixels.
    area_mm2 : float
        Area of the polygon, square millimetres.
    """

    polygon: shapely.Polygon
    threshold: float
    highest: float
    mean: float
    area_mm2: float


def heatmap_regions(values: np.ndarray, grid: PatchGrid, threshold: float) -> list[Region]:
    """Outline the heatmap pixels with a probability >= a threshold.

    Pixels that share an edge are one region; pixels that share only a corner are two. A heatmap
    pixel is the square of one stride around its patch's centre.

    Parameters
    ----------
    values : float array, shape `grid.shape`
        Level 0 of the heatmap, in [0, 1]. NaN (no tissue) is in no region.
    grid : PatchGrid
    threshold : float

    Returns
    -------
    list of Region
        By falling `highest`, then by the row and column of the first pixel.

    Raises
    ------
    RunError
        If `values` are not of the grid's shape.
    """
    grid.check_shape(values)
    values = np.asarray(values, np.float64)
    numbered, _ = ndimage.label(values >= threshold)  # pixels that share an edge
    bounds = grid.bounds
    slide = shapely.box(bounds.x, bounds.y, bounds.x + bounds.width, bounds.y + bounds.height)
    regions = []
    for number, window in enumerate(ndimage.find_objects(numbered), start=1):
        inside = numbered[window] == number
        outline = shapely.transform(_outline(inside, window), grid.heatmap_points)
        found = values[window][inside]
        for polygon in shapely.get_parts(shapely.intersection(outline, slide)):
            area = float(level0_area_to_mm2(polygon.area, grid.mpp))
            stated = threshold, float(found.max()), float(found.mean()), area
            if polygon.geom_type == "Polygon":
                regions.append(Region(polygon, *stated))
    return sorted(regions, key=lambda region: -region.highest)  # is stable


def _outline(inside: np.ndarray, window: tuple[slice, slice]) -> shapely.Polygon:
    """The outline of a mask's pixels in heatmap px, where the mask is a window of the heatmap."""
    steps = np.diff(np.pad(inside, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    _, ends = np.nonzero(steps == -1)
    top, left = window[0].start, window[1].start
    runs = shapely.box(starts + left, rows + top, ends + left, rows + top + 1)
    return shapely.simplify(shapely.union_all(runs), 0)  # without corners on straight lines
