"""Pictures of a heatmap over its slide, at a chosen resolution: for people and for figures."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw

from wsi_pipeline.errors import ExportError
from wsi_pipeline.export.picture_legend import (
    BLACK,
    FONT_PX,
    WHITE,
    draw_circle,
    draw_outlines,
    font,
    with_legend,
)
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.geometry import PatchGrid, raster_size, um_to_level0
from wsi_pipeline.heatmaps.pyramid import block_means
from wsi_pipeline.heatmaps.regions import Region
from wsi_pipeline.report.slide_pictures import OPACITY, SHADES, rings, scale_bar, shade_numbers
from wsi_pipeline.slides.reader import Slide

MAX_PIXELS = 100_000_000
MAX_SIDE_PX = 65_000
"""JPEG's limit is 65,535 px on each side; the legend takes some."""
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg"}
JPEG_QUALITY = 90
STRIP_PX = 256
"""Rows that are coloured at a time."""
UNIT_PX = 1000
"""Lines, circles and letters are in proportion to the picture's longer side."""


def picture_frame(slide: Slide, picture_mpp: float) -> PatchGrid:
    """The pixels of a picture of the slide's scanned bounds.

    Parameters
    ----------
    slide : Slide
    picture_mpp : float
        Micrometres per pixel of the picture.

    Returns
    -------
    PatchGrid
        A cell for each pixel of the picture.

    Raises
    ------
    ExportError
        If the resolution is finer than the slide's, or the picture would have more than 100
        million pixels or more than 65,000 px on a side.
    """
    if not picture_mpp >= slide.mpp:
        raise ExportError(
            f"A picture at {picture_mpp:g} um per px is finer than the slide {slide.path}, which"
            f" has {slide.mpp:.4g}. Choose {slide.mpp:.4g} or more."
        )
    bounds = slide.bounds
    downsample = slide.as_read(um_to_level0(picture_mpp, slide.mpp))
    width_px, height_px = raster_size((bounds.width, bounds.height), downsample)
    excess = max(width_px * height_px / MAX_PIXELS, (max(width_px, height_px) / MAX_SIDE_PX) ** 2)
    if excess > 1:
        raise ExportError(
            f"A picture of {slide.path} at {picture_mpp:g} um per px has {width_px} x {height_px}"
            f" px. The limits are {MAX_PIXELS // 10**6} million pixels and {MAX_SIDE_PX} px on a"
            f" side. Choose a coarser resolution: {_coarser(picture_mpp, excess):g} um per px."
        )
    return PatchGrid.of_pixels(bounds.x, bounds.y, width_px, height_px, slide.mpp, downsample)


def _coarser(picture_mpp: float, excess: float) -> float:
    """A resolution that fits, in two digits."""
    least = 1.01 * picture_mpp * excess**0.5
    digit = 10.0 ** (np.floor(np.log10(least)) - 1)
    return float(np.ceil(least / digit) * digit)


def read_picture(slide: Slide, frame: PatchGrid) -> np.ndarray:
    """The slide's pixels of a picture.

    Parameters
    ----------
    slide : Slide
    frame : PatchGrid
        Of `picture_frame`.

    Returns
    -------
    uint8 array, shape (height, width, 3)

    Raises
    ------
    SlideReadError
        If a part cannot be decoded.
    """
    height_px, width_px = frame.shape
    return slide.read(frame.bounds.x, frame.bounds.y, width_px, height_px, frame.downsample)


def write_overlay(
    path,
    *,
    image: np.ndarray,
    frame: PatchGrid,
    values: np.ndarray,
    grid: PatchGrid,
    regions: Sequence[Region],
    detections: pd.DataFrame,
    model: str,
    slide_id: str,
) -> None:
    """Write a picture of the heatmap on the slide with a scale bar and a legend, whole or not.

    Regions are outlined, detections are circles, all in proportion to the picture. The slide
    begins at the picture's upper left corner, the legend is below it.

    Parameters
    ----------
    path : path-like
        Ends in ``.png``, ``.jpg`` or ``.jpeg``.
    image : uint8 array, shape (height, width, 3)
        The slide, of `read_picture`.
    frame : PatchGrid
        Of `picture_frame`.
    values : float array, shape `grid.shape`
        Level 0 of the heatmap, in [0, 1]; where it is NaN (no tissue) the slide stays as it is.
        Where a pixel of the picture covers several heatmap pixels, the colour is their mean's.
    grid : PatchGrid
    regions : sequence of Region
        Of one threshold or several.
    detections : DataFrame
        ``probability`` in [0, 1], ``x``, ``y`` (level-0 px), one row for each detection.
    model, slide_id : str
        Named in the legend.

    Raises
    ------
    ExportError
        If the name has another ending, or an array does not have its grid's shape.
    """
    path = Path(path)
    _check(path, FORMATS, values, grid)
    if image.shape != (*frame.shape, 3):
        raise ExportError(f"The slide's image has the shape {image.shape}, not {frame.shape}.")
    pixels = image.copy()
    for rows, shades, known in _coloured(values, grid, frame):
        blend = (1 - OPACITY) * pixels[rows] + OPACITY * SHADES[shades]
        pixels[rows][known] = np.round(blend[known]).astype(np.uint8)
    picture = Image.fromarray(pixels)
    unit = max(1.0, max(picture.size) / UNIT_PX)
    draw = ImageDraw.Draw(picture)
    # Pillow's coordinates name the centres of pixels; it drops what follows the decimal point.
    outlines = rings([region.polygon for region in regions])
    lines = [np.round(frame.heatmap_places(ring) - 0.5).ravel().tolist() for ring in outlines]
    draw_outlines(draw, lines, unit)
    for x, y in (frame.heatmap_places(detections[["x", "y"]]) - 0.5).tolist():
        draw_circle(draw, x, y, unit)
    _scale_bar(draw, picture.size, frame, unit)
    thresholds = sorted({region.threshold for region in regions})
    picture = with_legend(picture, f"{slide_id}, model {model}", thresholds, len(detections), unit)
    with replace_atomically(path) as part:
        picture.save(part, FORMATS[path.suffix.lower()], quality=JPEG_QUALITY)


def write_bare_overlay(path, *, frame: PatchGrid, values: np.ndarray, grid: PatchGrid) -> None:
    """Write the heatmap's colours alone, whole or not at all: for figures, over another picture.

    Parameters
    ----------
    path : path-like
        Ends in ``.png``.
    frame, values, grid
        As for `write_overlay`. The picture has the pixels of `frame`, without a legend; red,
        green, blue and opacity, which is 0 where nothing was predicted.

    Raises
    ------
    ExportError
        If the name has another ending, or `values` are not of the grid's shape.
    """
    path = Path(path)
    _check(path, {".png": "png"}, values, grid)
    pixels = np.zeros((*frame.shape, 4), np.uint8)
    for rows, shades, known in _coloured(values, grid, frame):
        pixels[rows, :, :3][known] = SHADES[shades[known]]
        pixels[rows, :, 3][known] = round(OPACITY * 255)
    with replace_atomically(path) as part:
        Image.fromarray(pixels).save(part, "png")


def _check(path: Path, formats, values: np.ndarray, grid: PatchGrid) -> None:
    if path.suffix.lower() not in formats:
        raise ExportError(f"{path}: a picture ends in {', '.join(formats)}. Rename it.")
    grid.check_shape(values)


def _coloured(
    values: np.ndarray, grid: PatchGrid, frame: PatchGrid
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Strips of a picture: rows; of each pixel the number of its shade, and whether it has one."""
    reduction = max(1, int(frame.pixel_spacing_um() / grid.pixel_spacing_um()))
    # A margin without values: all that lies off the heatmap.
    shown = np.pad(block_means(values, reduction), 1, constant_values=np.nan)
    height_px, width_px = frame.shape
    centres = np.repeat(np.arange(max(frame.shape))[:, np.newaxis] + 0.5, 2, axis=1)
    places = np.floor(grid.heatmap_places(frame.heatmap_points(centres)) / reduction)
    # x and y of the same number; of a place the margin's nearest cell where it is off the heatmap.
    cols, rows = np.clip(places + 1, 0, np.array(shown.shape)[::-1] - 1).astype(int).T
    for first in range(0, height_px, STRIP_PX):
        strip = slice(first, min(first + STRIP_PX, height_px))
        found = shown[np.ix_(rows[strip], cols[:width_px])]
        yield strip, shade_numbers(found), np.isfinite(found)


def _scale_bar(draw, size: tuple[int, int], frame: PatchGrid, unit: float) -> None:
    """A bar in a white box, in the lower left corner."""
    width, height = size
    length_um, label = scale_bar(width / 4 * frame.pixel_spacing_um())
    letters, length = font(unit), length_um / frame.pixel_spacing_um()
    pad, line = 6 * unit, max(1.0, 4 * unit)
    box_width = max(length, draw.textlength(label, letters)) + 2 * pad
    left, top = pad, height - (FONT_PX * 1.3 * unit + line + 4 * pad)
    draw.rectangle([left, top, left + box_width, height - pad], fill=WHITE)
    draw.text((left + pad, top + pad), label, fill=BLACK, font=letters)
    bar_top = height - 2 * pad - line
    draw.rectangle([left + pad, bar_top, left + pad + length, bar_top + line], fill=BLACK)
