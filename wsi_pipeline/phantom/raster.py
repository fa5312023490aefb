"""Polygons to pixels, one window of the slide at a time."""

import numpy as np
import shapely
from scipy.ndimage import uniform_filter

from wsi_pipeline.geometry import Bounds


def window_box(window: Bounds, margin_px: float = 0) -> shapely.Polygon:
    """The window as a polygon, `margin_px` larger on each side."""
    return shapely.box(
        window.x - margin_px,
        window.y - margin_px,
        window.x + window.width + margin_px,
        window.y + window.height + margin_px,
    )


def fill(geometry: shapely.Geometry, window: Bounds) -> np.ndarray:
    """Pixels of the window whose centres lie in the polygons.

    By the even-odd rule: each edge toggles, in every row of pixel centres that it crosses, all
    pixels to its right. The cost is that of the edges and the pixels, not of their product, which
    `skimage.draw.polygon` takes.

    Parameters
    ----------
    geometry : shapely.Polygon or MultiPolygon
        Level-0 px.
    window : Bounds

    Returns
    -------
    bool array, shape (window.height, window.width)
    """
    toggles = np.zeros((window.height, window.width), np.uint8)
    box = window_box(window)
    near = [part for part in shapely.get_parts(geometry) if part.intersects(box)]
    for ring in shapely.get_rings(near):
        x, y = np.asarray(ring.coords).T - [[window.x + 0.5], [window.y + 0.5]]
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


def feather(geometry: shapely.Geometry, window: Bounds, radius_px: int) -> np.ndarray:
    """As `fill`, with an edge that rises over ``2 * radius_px + 1`` pixels.

    Returns
    -------
    float32 array, shape (window.height, window.width)
        0 to 1; a pixel's value does not depend on the window it is in.
    """
    pad = radius_px + 1
    wide = Bounds(window.x - pad, window.y - pad, window.width + 2 * pad, window.height + 2 * pad)
    hard = fill(geometry, wide)
    inner = (slice(pad, -pad), slice(pad, -pad))
    if hard.all() or not hard.any():
        return hard[inner].astype(np.float32)
    counts = uniform_filter(hard * np.float32(255), 2 * radius_px + 1, mode="nearest")
    return np.round(counts[inner]) / np.float32(255)
