"""Polygons with soft edges, one window of the slide at a time."""

import numpy as np
import shapely
from scipy.ndimage import uniform_filter

from wsi_pipeline.geometry import Bounds
from wsi_pipeline.raster import fill


def window_box(window: Bounds, margin_px: float = 0) -> shapely.Polygon:
    """The window as a polygon, `margin_px` larger on each side."""
    return shapely.box(
        window.x - margin_px,
        window.y - margin_px,
        window.x + window.width + margin_px,
        window.y + window.height + margin_px,
    )


def feather(geometry: shapely.Geometry, window: Bounds, radius_px: int) -> np.ndarray:
    """As `wsi_pipeline.raster.fill`, with an edge that rises over ``2 * radius_px + 1`` pixels.

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
