"""Pictures for people: a slide with its tissue mask; with its annotation beside its heatmaps.

Everything is drawn in level-0 px. Colours stand for 0 to 1 in every picture, so that pictures can
be compared.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image
from shapely import Polygon
from skimage.measure import find_contours

from wsi_pipeline.geometry import Bounds, PatchGrid, level0_to_um, raster_to_level0, um_to_level0
from wsi_pipeline.slides.tissue import TissueMask

COLORMAP = matplotlib.colormaps["RdYlBu_r"]
SCALE = Normalize(0, 1)
SHADES = COLORMAP(np.arange(256), bytes=True)[:, :3]
"""The colours of the map: uint8 red, green, blue, from 0 to 1."""
OPACITY = 0.6
JPEG_QUALITY = 85
DPI = 110
TISSUE_PX = 1024
"""Longer side of the picture of a tissue mask."""


@dataclass(frozen=True, eq=False)
class HeatmapPanel:
    """A heatmap, or a window in it, to be drawn.

    Parameters
    ----------
    title : str
    values : float array, shape (rows, cols)
        Of the heatmap's level 0, in [0, 1]; where it is NaN the slide stays as it is.
    grid : PatchGrid
        Of the whole heatmap.
    first_cell : tuple of int
        Row and column of the window's first value.
    """

    title: str
    values: np.ndarray
    grid: PatchGrid
    first_cell: tuple[int, int] = (0, 0)


def heatmap_figure(
    image: np.ndarray,
    shown: Bounds,
    lesions: Sequence[Polygon],
    heatmaps: Sequence[HeatmapPanel],
    *,
    outlined: str = "annotation",
    marks: Sequence[tuple[float, float]] = (),
    width_inches: float = 10.0,
) -> bytes:
    """Draw a part of a slide with its annotation beside the same part with each of its heatmaps.

    Each heatmap cell covers the square of one stride around its patch's centre; where an image
    pixel is coarser than that, the colour is the mean of the cells under it.

    Parameters
    ----------
    image : uint8 array, shape (h, w, 3)
        The part, at any resolution.
    shown : Bounds
        The part, level-0 px.
    lesions : sequence of Polygon
        Level-0 px; may be empty, or lie outside the part.
    heatmaps : sequence of HeatmapPanel
        One or more of the slide, from left to right.
    outlined : str
        What `lesions` are.
    marks : sequence of (x, y)
        Places to mark with a circle, level-0 px.
    width_inches : float

    Returns
    -------
    bytes
        A JPEG image, 110 px an inch.
    """
    panel_width = 0.92 * width_inches / (len(heatmaps) + 1)
    panel_height = np.clip(panel_width * shown.height / shown.width, 1.5, 1.75 * panel_width)
    # Figure, not pyplot: no state shared between the threads of a worker.
    figure = Figure(figsize=(width_inches, panel_height + 0.7), layout="constrained")
    panels = figure.subplots(1, len(heatmaps) + 1)
    left, *others = panels
    frame = (shown.x, shown.x + shown.width, shown.y + shown.height, shown.y)
    for axes in panels:
        axes.imshow(image, extent=frame, interpolation="antialiased")
    _outline(left, rings(lesions), "yellow")
    left.set_title(outlined if lesions else f"no {outlined}")
    for axes, heatmap in zip(others, heatmaps, strict=True):
        axes.imshow(
            np.ma.masked_invalid(heatmap.values), cmap=COLORMAP, norm=SCALE, alpha=OPACITY,
            extent=_heatmap_frame(heatmap), interpolation="antialiased",
        )  # fmt: skip
        axes.set_title(heatmap.title)
    figure.colorbar(
        ScalarMappable(SCALE, COLORMAP), ax=others[-1], label="probability of tumour", shrink=0.8,
        alpha=OPACITY,
    )  # fmt: skip
    draw_scale_bar(left, shown, heatmaps[0].grid.mpp)
    for axes in panels:
        for x, y in marks:
            axes.plot(x, y, "o", mfc="none", mec="black", mew=2.4, markersize=15)
            axes.plot(x, y, "o", mfc="none", mec="white", mew=1.1, markersize=15)
        axes.set(xlim=frame[:2], ylim=frame[2:])
        axes.set_axis_off()
    return _jpeg(figure)


def tissue_figure(tissue: TissueMask, lesions: Sequence[Polygon], mpp: float) -> bytes:
    """Draw a slide with the outlines of its tissue mask, cyan, and of its annotation, yellow.

    Parameters
    ----------
    tissue : TissueMask
        With the pixels that it was found in.
    lesions : sequence of Polygon
        Level-0 px; may be empty.
    mpp : float
        Micrometres per level-0 px.

    Returns
    -------
    bytes
        A JPEG image, its longer side 1024 px.
    """
    rows, cols = tissue.mask.shape
    pixels = tissue.pixels if tissue.pixels is not None else np.full((rows, cols, 3), 255, np.uint8)
    size = [max(1, round(side * TISSUE_PX / max(rows, cols))) for side in (cols, rows)]
    shown = Bounds(
        tissue.bounds.x, tissue.bounds.y,
        *(round(raster_to_level0(side, tissue.downsample)) for side in (cols, rows)),
    )  # fmt: skip
    figure = Figure(figsize=(size[0] / DPI, size[1] / DPI))
    axes = figure.add_axes((0, 0, 1, 1))
    frame = (shown.x, shown.x + shown.width, shown.y + shown.height, shown.y)
    image, share = (
        np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BILINEAR))
        for values in (pixels, tissue.mask.astype(np.float32))
    )
    axes.imshow(image, extent=frame, aspect="auto", interpolation="nearest")  # px for px
    # A margin without tissue closes outlines at the edge; px 0 of it has its centre at -0.5.
    step = shown.width / size[0], shown.height / size[1]
    contours = find_contours(np.pad(share, 1), 0.5)
    _outline(axes, [(c[:, ::-1] - 0.5) * step + (shown.x, shown.y) for c in contours], "cyan")
    _outline(axes, rings(lesions), "yellow")
    draw_scale_bar(axes, shown, mpp)
    axes.set(xlim=frame[:2], ylim=frame[2:])
    axes.set_axis_off()
    return _jpeg(figure)


def _jpeg(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="jpeg", dpi=DPI, pil_kwargs={"quality": JPEG_QUALITY})
    return picture.getvalue()


def _outline(axes, outlines: list[np.ndarray], colour: str) -> None:
    axes.add_collection(LineCollection(outlines, colors="black", linewidths=2.2))
    axes.add_collection(LineCollection(outlines, colors=colour, linewidths=1.1))


def _heatmap_frame(heatmap: HeatmapPanel) -> tuple[float, float, float, float]:
    """Left, right, bottom, top of the cells' squares, level-0 px."""
    left, top, right, bottom = heatmap.grid.heatmap_box(heatmap.first_cell, heatmap.values.shape)
    return left, right, bottom, top


def rings(lesions: Sequence[Polygon]) -> list[np.ndarray]:
    """Outer and inner rings: x, y of the corners, shape (N, 2) each."""
    rings = (ring for lesion in lesions for ring in (lesion.exterior, *lesion.interiors))
    return [np.asarray(ring.coords)[:, :2] for ring in rings]


def shade_numbers(values: np.ndarray) -> np.ndarray:
    """Which of `SHADES` stands for each value.

    Parameters
    ----------
    values : float array
        In [0, 1]; NaN gets any number.

    Returns
    -------
    uint8 array, of the same shape
    """
    return np.clip(np.nan_to_num(values) * 256, 0, 255).astype(np.uint8)


def scale_bar(longest_um: float) -> tuple[float, str]:
    """The longest bar of 1, 2 or 5 x 10^n um that is no longer than this: um, and its label."""
    decade = 10.0 ** np.floor(np.log10(longest_um))
    length_um = max(step * decade for step in (1, 2, 5) if step * decade <= longest_um)
    return length_um, f"{length_um / 1000:g} mm" if length_um >= 1000 else f"{length_um:g} um"


def draw_scale_bar(axes, shown: Bounds, mpp: float) -> None:
    """Draw the longest bar of 1, 2 or 5 x 10^n um that is under a quarter of the width."""
    length_um, label = scale_bar(level0_to_um(shown.width, mpp) / 4)
    x, y = shown.x + 0.04 * shown.width, shown.y + 0.95 * shown.height
    ends = [x, x + um_to_level0(length_um, mpp)]
    axes.plot(ends, [y, y], color="white", lw=5, solid_capstyle="butt")
    axes.plot(ends, [y, y], color="black", lw=3, solid_capstyle="butt")
    axes.annotate(
        label, (x, y), xytext=(0, 5), textcoords="offset points", fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1},
    )  # fmt: skip
