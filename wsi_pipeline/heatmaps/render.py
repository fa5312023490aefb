"""Pictures for the report: a slide with its annotation beside its heatmap.

All of it in the thumbnail's frame: the slide's bounds at `downsample` level-0 px a pixel, corner
convention. Colours stand for 0 to 1 on every slide, so that pictures can be compared.
"""

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from shapely import Polygon

from wsi_pipeline.geometry import Bounds, PatchGrid

COLORMAP = matplotlib.colormaps["RdYlBu_r"]
OPACITY = 0.6


def heatmap_overlay(
    thumbnail: np.ndarray, downsample: float, values: np.ndarray, grid: PatchGrid
) -> np.ndarray:
    """Lay a heatmap over the slide's thumbnail; each pixel takes the nearest cell's colour.

    Parameters
    ----------
    thumbnail : uint8 array, shape (h, w, 3)
        The slide's bounds.
    downsample : float
        Level-0 px per thumbnail px.
    values : float array, shape `grid.shape`
        Level 0 of the heatmap, in [0, 1]; where it is NaN the slide stays as it is.
    grid : PatchGrid

    Returns
    -------
    uint8 array, shape (h, w, 3)
    """
    rows = _nearest_cells(thumbnail.shape[0], downsample, values.shape[0], grid)
    cols = _nearest_cells(thumbnail.shape[1], downsample, values.shape[1], grid)
    shown = values[np.ix_(rows, cols)]
    blended = (1 - OPACITY) * thumbnail + OPACITY * 255 * COLORMAP(shown)[..., :3]
    return np.where(np.isnan(shown)[..., np.newaxis], thumbnail, blended.round()).astype(np.uint8)


def _nearest_cells(pixels: int, downsample: float, cells: int, grid: PatchGrid) -> np.ndarray:
    """Along one axis: the cell whose centre is nearest to each thumbnail pixel's centre."""
    centres_px = (np.arange(pixels) + 0.5) * downsample / grid.downsample
    nearest = np.floor((centres_px - grid.inner_px / 2) / grid.stride_px + 0.5)
    return np.clip(nearest, 0, cells - 1).astype(int)


def annotation_outlines(
    lesions: Sequence[Polygon], bounds: Bounds, downsample: float
) -> list[np.ndarray]:
    """Outer and inner rings of the lesions in the thumbnail's frame.

    Parameters
    ----------
    lesions : sequence of Polygon
        Level-0 px.
    bounds : Bounds
        The part of the slide that the thumbnail shows.
    downsample : float
        Level-0 px per thumbnail px.

    Returns
    -------
    list of float64 arrays, shape (N, 2)
        x, y of each ring's corners, the first repeated at the end.
    """
    rings = [ring for lesion in lesions for ring in (lesion.exterior, *lesion.interiors)]
    corner = (bounds.x, bounds.y)
    return [(np.array(ring.coords)[:, :2] - corner) / downsample for ring in rings]


def heatmap_figure(
    thumbnail: np.ndarray,
    downsample: float,
    lesions: Sequence[Polygon],
    values: np.ndarray,
    grid: PatchGrid,
    title: str,
) -> bytes:
    """Draw the slide with its annotation beside the slide with its heatmap.

    Parameters
    ----------
    thumbnail, downsample, values, grid
        As for `heatmap_overlay`.
    lesions : sequence of Polygon
        Level-0 px; may be empty.
    title : str

    Returns
    -------
    bytes
        A PNG image, 10 inches wide.
    """
    height, width = thumbnail.shape[:2]
    # Figure, not pyplot: no state shared between the threads of a worker.
    panel_height = np.clip(4.6 * height / width, 1.5, 8)
    figure = Figure(figsize=(10, panel_height + 0.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title)
    frame = (0, width, height, 0)
    left.imshow(thumbnail, extent=frame)
    outlines = annotation_outlines(lesions, grid.bounds, downsample)
    left.add_collection(LineCollection(outlines, colors="black", linewidths=2.2))
    left.add_collection(LineCollection(outlines, colors="yellow", linewidths=1.1))
    left.set_title(f"annotation ({len(lesions)} lesion{'' if len(lesions) == 1 else 's'})")
    right.imshow(heatmap_overlay(thumbnail, downsample, values, grid), extent=frame)
    right.set_title("heatmap")
    scale = ScalarMappable(matplotlib.colors.Normalize(0, 1), COLORMAP)
    figure.colorbar(scale, ax=right, label="probability of tumour", shrink=0.8, alpha=OPACITY)
    _draw_scale_bar(left, width, height, downsample * grid.mpp / 1000)
    for axes in (left, right):
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    return png.getvalue()


def _draw_scale_bar(axes, width_px: int, height_px: int, mm_per_px: float) -> None:
    """Draw the longest bar of 1, 2 or 5 x 10^n mm that is under a quarter of the width."""
    longest = width_px * mm_per_px / 4
    decade = 10.0 ** np.floor(np.log10(longest))
    length = max(step * decade for step in (1, 2, 5) if step * decade <= longest)
    x, y = 0.04 * width_px, 0.95 * height_px
    axes.plot(
        [x, x + length / mm_per_px], [y, y], color="black", linewidth=3, solid_capstyle="butt"
    )
    axes.annotate(f"{length:g} mm", (x, y), xytext=(0, 4), textcoords="offset points", fontsize=9)
