"""Polygons to pixels: the only rasteriser of the package, by two rules for centres on an edge."""

from typing import Literal

import numpy as np
import shapely

from wsi_pipeline.geometry import Bounds, pixel_centres, raster_places


def fill(
    geometry: shapely.Geometry,
    window: Bounds,
    downsample: float = 1.0,
    *,
    on_edge: Literal["half-open", "outside"] = "half-open",
) -> np.ndarray:
    """Pixels of a window whose centres lie in the polygons; holes are respected.

    Parameters
    ----------
    geometry : shapely.Polygon or MultiPolygon
        Level-0 px.
    window : Bounds
        In pixels of the raster, which starts at the slide's level-0 corner: level-0 px where
        `downsample` is 1.
    downsample : float
        Level-0 px per pixel.
    on_edge : "half-open" or "outside"
        Where a centre on an edge belongs. "half-open": to the polygon on the right of the edge or
        below it, so polygons that share an edge share no pixel; the phantom's tissue is drawn so.
        "outside": to none; exact, as `shapely.contains_xy` is. Masks of lesions are made so.

    Returns
    -------
    bool array, shape (window.height, window.width)
    """
    if on_edge == "outside":
        x = pixel_centres(np.arange(window.width) + window.x, downsample)
        y = pixel_centres(np.arange(window.height) + window.y, downsample)
        shapely.prepare(geometry)
        return shapely.contains_xy(geometry, x[np.newaxis], y[:, np.newaxis])
    return _swept(geometry, window, downsample)


def _swept(geometry: shapely.Geometry, window: Bounds, downsample: float) -> np.ndarray:
    """Fill by the even-odd rule: each edge toggles, in every row, all centres to its right.

    The cost is that of the edges and the pixels, not of their product: the phantom fills large
    windows.
    """
    toggles = np.zeros((window.height, window.width), np.uint8)
    left, top, width, height = (
        side * downsample for side in (window.x, window.y, window.width, window.height)
    )
    box = shapely.box(left, top, left + width, top + height)
    near = [part for part in shapely.get_parts(geometry) if part.intersects(box)]
    for ring in shapely.get_rings(near):
        # The window's first centre is at (0, 0).
        x, y = raster_places(ring.coords, downsample).T - [[window.x + 0.5], [window.y + 0.5]]
        rows, columns = _crossings(x, y, window.height)
        columns = np.maximum(columns, 0)
        hit = columns < window.width
        np.bitwise_xor.at(toggles, (rows[hit], columns[hit]), 1)
    return np.bitwise_xor.accumulate(toggles, axis=1).astype(bool)


def _crossings(x: np.ndarray, y: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a closed ring crosses the rows 0 to height - 1: rows, and columns from there on."""
    first = np.ceil(np.minimum(y[:-1], y[1:])).clip(0, height).astype(int)
    last = np.ceil(np.maximum(y[:-1], y[1:])).clip(0, height).astype(int)
    count = last - first
    edge = np.repeat(np.arange(len(count)), count)
    rows = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    slope = np.diff(x) / np.where(np.diff(y) == 0, 1, np.diff(y))
    return rows, np.ceil(x[edge] + (rows - y[edge]) * slope[edge]).astype(int)
