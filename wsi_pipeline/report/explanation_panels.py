"""A place on a slide with its explanations: one picture, a panel for each method."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from shapely import Polygon, box

from wsi_pipeline.geometry import Bounds
from wsi_pipeline.report.slide_pictures import draw_scale_bar, rings

COLUMNS = 4
PANEL_INCHES = 2.7
TITLES_INCHES = 0.55
HEADING_INCHES = 0.8
DPI = 110
LEVELS = matplotlib.colormaps["inferno"]
"""Of maps that are 0 or more: black for nothing, bright for much."""
SIGNS = matplotlib.colormaps["RdBu_r"]
"""Of maps of both signs: red for tumour, blue against it, 0 white."""
OPACITY = 0.6
BRIGHTEST = 99.5
"""Percentile of the map's magnitudes at which its colours end: single pixels would blacken it."""


@dataclass(frozen=True, eq=False)
class MethodPanel:
    """A method's map of a place.

    Parameters
    ----------
    values : float array, shape (H, W)
        A pixel for each pixel of the place's image, in the method's units.
    name, shows : str
        Title, and what is coloured.
    unit : str
        Of the values.
    signed : bool
        Both signs mean something; else what is negative is shown as 0.
    over_image : bool
        Drawn over the image in grey, for maps of regions; else by itself, for maps of details.
    """

    values: np.ndarray
    name: str
    shows: str
    unit: str
    signed: bool = False
    over_image: bool = False


def panels_figure(
    image: np.ndarray,
    shown: Bounds,
    around: np.ndarray,
    around_shown: Bounds,
    lesions: Sequence[Polygon],
    panels: Sequence[MethodPanel],
    *,
    mpp: float,
    title: str,
    subtitle: str,
) -> bytes:
    """Draw the surroundings of a place, the place with its annotation, and each method's map.

    The annotation is outlined in yellow in every panel. Each map has a colour scale of its own,
    in the method's units: colours of different methods do not compare.

    Parameters
    ----------
    image, around : uint8 arrays, shapes (H, W, 3) and (h, w, 3)
        The place, and more of the slide around it.
    shown, around_shown : Bounds
        Where these two lie, level-0 px.
    lesions : sequence of Polygon
        Level-0 px; may be empty, or lie outside the place.
    panels : sequence of MethodPanel
        In the order to be drawn.
    mpp : float
        Micrometres per level-0 px.
    title, subtitle : str
        What kind of place it is; where, and what the model says.

    Returns
    -------
    bytes
        A PNG image, 110 px an inch.
    """
    columns = min(COLUMNS, len(panels) + 2)
    rows = -(-(len(panels) + 2) // columns)
    shape = float(np.clip(shown.height / shown.width, 0.4, 2.5))
    height = rows * (PANEL_INCHES * shape + TITLES_INCHES) + HEADING_INCHES
    # Figure, not pyplot: no state shared between the threads of a worker.
    figure = Figure(figsize=(columns * (PANEL_INCHES + 0.5), height), layout="constrained")
    figure.suptitle(f"{title}\n{subtitle}", x=0.01, ha="left", fontsize=11)
    first, second, *others = figure.subplots(rows, columns, squeeze=False).ravel()
    outlines = rings(lesions)
    _draw_image(first, around, around_shown, outlines)
    _draw_box(first, shown)
    draw_scale_bar(first, around_shown, mpp)
    _set_titles(first, "Surroundings", "the place is the white box")
    _draw_image(second, image, shown, outlines)
    draw_scale_bar(second, shown, mpp)
    _set_titles(second, "The place", _annotation_words(lesions, shown))
    for axes, panel in zip(others, panels, strict=False):
        _draw_image(axes, _grey(image), shown, outlines)
        _draw_map(figure, axes, panel, shown)
    for axes in others[len(panels) :]:
        axes.set_axis_off()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    return picture.getvalue()


def colour_limits(values: np.ndarray, *, signed: bool) -> tuple[float, float]:
    """The values at which a map's colours begin and end, in pictures and in viewers.

    Parameters
    ----------
    values : float array
        In the method's units; NaN and infinities are left out.
    signed : bool
        Both signs mean something: 0 lies in the middle. Else colours begin at 0.

    Returns
    -------
    low, high : float
        They end at the percentile `BRIGHTEST` of the magnitudes, at the largest where few are not
        0, and at 1 where all are.
    """
    known = values[np.isfinite(values)]
    magnitude = np.abs(known) if signed else np.maximum(known, 0)
    if not magnitude.any():
        end = 1.0
    else:
        end = float(np.percentile(magnitude, BRIGHTEST)) or float(magnitude.max())
    return (-end if signed else 0.0), end


def _draw_image(axes: Axes, image: np.ndarray, shown: Bounds, outlines: list[np.ndarray]) -> None:
    axes.imshow(image, extent=_frame(shown), interpolation="antialiased")
    axes.add_collection(LineCollection(outlines, colors="black", linewidths=2.4, zorder=3))
    axes.add_collection(LineCollection(outlines, colors="yellow", linewidths=1.2, zorder=3))
    left, right, bottom, top = _frame(shown)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.set_axis_off()


def _draw_box(axes: Axes, shown: Bounds) -> None:
    for color, width in (("black", 2.6), ("white", 1.2)):
        outline = Rectangle((shown.x, shown.y), shown.width, shown.height, fill=False)
        outline.set(edgecolor=color, linewidth=width, zorder=4)
        axes.add_patch(outline)


def _draw_map(figure: Figure, axes: Axes, panel: MethodPanel, shown: Bounds) -> None:
    """Colours over what is there, and their scale beside it."""
    _set_titles(axes, panel.name, panel.shows)
    if not (panel.values.any() if panel.signed else (panel.values > 0).any()):
        axes.text(
            0.5, 0.5, "nothing found", transform=axes.transAxes, ha="center", va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip
        return
    colors, scale = _colours(panel)
    opacity = OPACITY if panel.over_image else 1.0
    axes.imshow(
        panel.values, extent=_frame(shown), cmap=colors, norm=scale, alpha=opacity,
        interpolation="antialiased",
    )  # fmt: skip
    bar = figure.colorbar(ScalarMappable(scale, colors), ax=axes, shrink=0.8, alpha=opacity)
    bar.set_label(panel.unit, fontsize=8)
    bar.ax.ticklabel_format(axis="y", scilimits=(-2, 3))
    bar.ax.tick_params(labelsize=7)
    bar.ax.yaxis.get_offset_text().set_fontsize(7)


def _colours(panel: MethodPanel) -> tuple[matplotlib.colors.Colormap, Normalize]:
    low, high = colour_limits(panel.values, signed=panel.signed)
    return SIGNS if panel.signed else LEVELS, Normalize(low, high)


def _set_titles(axes: Axes, name: str, shows: str) -> None:
    axes.set_title(shows, fontsize=8, color="#4B5563", pad=4)
    axes.annotate(
        name, (0.5, 1), xycoords="axes fraction", xytext=(0, 16), textcoords="offset points",
        ha="center", fontsize=10, fontweight="bold",
    )  # fmt: skip


def _annotation_words(lesions: Sequence[Polygon], shown: Bounds) -> str:
    place = box(shown.x, shown.y, shown.x + shown.width, shown.y + shown.height)
    if any(lesion.contains(place) for lesion in lesions):
        return "all of it is annotated as tumour"
    if any(lesion.intersects(place) for lesion in lesions):
        return "annotated tumour outlined in yellow"
    return "no tumour is annotated here"


def _grey(image: np.ndarray) -> np.ndarray:
    """The image without its colours, as RGB: what is laid over it has them."""
    return np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)


def _frame(shown: Bounds) -> tuple[float, float, float, float]:
    """Left, right, bottom, top, level-0 px."""
    return shown.x, shown.x + shown.width, shown.y + shown.height, shown.y
