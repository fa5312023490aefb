"""What an annotation's coordinates count from, seen from where its lesions come to lie."""

from collections.abc import Callable

import numpy as np
import shapely
from shapely.affinity import affine_transform

from wsi_pipeline.slides.annotation_origin import FrameOrigin, Matrix, file_to_level0
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue import TissueMask

POINTS = 16
"""Each way, over a polygon's bounding box: where tissue is looked up."""
GOOD = 0.5
"""A way of reading a file is named where at least this share of its lesions comes to lie well."""


def ways_of_reading(slide: Slide) -> dict[str, Matrix]:
    """Ways to take a file's coordinates, by the setting or the fault that each stands for.

    Returns
    -------
    dict of str to tuple
        As `file_to_level0`.
    """
    scales = {"1": 1.0} | {f"{d:g}": d for d in slide.level_downsamples if d > 1}
    scales["um"] = 1 / slide.mpp
    cropped = (slide.bounds.x, slide.bounds.y) != (0, 0)
    origins: tuple[FrameOrigin, ...] = ("slide", "bounds", "lower left")
    origins = origins if cropped else ("slide", "lower left")
    ways = {
        f"catalog.annotation.origin: {origin}, scale: {name}": file_to_level0(
            origin, scale, bounds=slide.bounds, size=slide.size
        )
        for name, scale in scales.items()
        for origin in origins
    }
    ways["x and y exchanged in the file"] = (0, 1, 1, 0, 0, 0)
    ways["the file mirrored, left for right"] = (-1, 0, 0, 1, slide.size[0], 0)
    return ways


def better_ways(
    drawn: shapely.Geometry, slide: Slide, share: Callable[[shapely.Geometry], float]
) -> dict[str, float]:
    """Ways of reading by which most of a file's lesions would lie well, the best first.

    Parameters
    ----------
    drawn : shapely.Geometry
        In the file's own coordinates.
    slide : Slide
    share : callable
        What share of a geometry in level-0 px lies well, see `share_on_tissue`, `share_scanned`.

    Returns
    -------
    dict of str to float
        Name and share, of those that reach `GOOD`.
    """
    shares = {
        way: share(affine_transform(drawn, matrix))
        for way, matrix in ways_of_reading(slide).items()
    }
    best_first = sorted(shares.items(), key=lambda item: -item[1])
    return {way: found for way, found in best_first if found >= GOOD}


def share_on_tissue(geometry: shapely.Geometry, mask: TissueMask) -> float:
    """Share of an area that is tissue, from points spread over each polygon.

    Parameters
    ----------
    geometry : shapely.Geometry
        Polygons in level-0 px.
    mask : TissueMask

    Returns
    -------
    float in [0, 1]
        What lies outside the mask counts as none; so does an empty geometry.
    """
    shares, areas = [], []
    steps = (np.arange(POINTS) + 0.5) / POINTS
    for polygon in shapely.get_parts(geometry):
        x0, y0, x1, y1 = polygon.bounds
        x, y = np.meshgrid(x0 + steps * (x1 - x0), y0 + steps * (y1 - y0))
        inside = shapely.contains_xy(polygon, x, y)
        if not inside.any():
            x, y = shapely.get_coordinates(polygon.representative_point()).T
            inside = np.ones(1, bool)
        shares.append(_is_tissue(mask, x[inside], y[inside]).mean())
        areas.append(polygon.area)
    return float(np.average(shares, weights=areas)) if areas else 0.0


def share_scanned(geometry: shapely.Geometry, slide: Slide) -> float:
    """Share of an area in level-0 px that lies within what was scanned."""
    area = slide.bounds
    scanned = shapely.box(area.x, area.y, area.x + area.width, area.y + area.height)
    return geometry.intersection(scanned).area / geometry.area if geometry.area else 0.0


def _is_tissue(mask: TissueMask, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    column = np.floor((x - mask.bounds.x) / mask.downsample).astype(int)
    row = np.floor((y - mask.bounds.y) / mask.downsample).astype(int)
    height, width = mask.mask.shape
    within = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return within & mask.mask[row.clip(0, height - 1), column.clip(0, width - 1)]
