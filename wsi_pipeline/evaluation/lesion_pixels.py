"""Lesions as pixels: outlines rasterised, or read from one of the challenge's mask TIFFs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import shapely
import tifffile

from wsi_pipeline.errors import RunError
from wsi_pipeline.geometry import Bounds, raster_places, raster_size, um_to_level0
from wsi_pipeline.raster import fill

OFFICIAL_LEVEL = 5
OFFICIAL_PIXEL_UM = 0.243 * 2**OFFICIAL_LEVEL
DOWNSAMPLE_TOLERANCE = 0.01


def raster_downsample(mpp: float) -> float:
    """Level-0 px per mask px that make a mask pixel 7.776 um wide, as the organisers' is.

    At least 1: a slide coarser than that gets masks of its own pixels.
    """
    return max(1.0, um_to_level0(OFFICIAL_PIXEL_UM, mpp))


def rasterise(
    lesions: Sequence[shapely.Polygon],
    size_level0: tuple[float, float],
    downsample: float,
    *,
    keep_thin: bool = False,
) -> np.ndarray:
    """Mask pixels whose centres lie inside a lesion; holes are respected.

    Parameters
    ----------
    lesions : sequence of shapely.Polygon
        Level-0 px, within the slide.
    size_level0 : (int, int)
        Width and height of the slide, level-0 px.
    downsample : float
        Level-0 px per mask px.
    keep_thin : bool
        Whether a lesion that holds no pixel centre gets the pixel of a point inside it, so that
        no annotated lesion is lost. Corrected masks are made so.

    Returns
    -------
    bool array, shape (ceil(height / downsample), ceil(width / downsample))

    Raises
    ------
    RunError
        If a lesion lies off the slide.
    """
    width, height = raster_size(size_level0, downsample)
    mask = np.zeros((height, width), bool)
    for lesion in lesions:
        window, inside = pixels_inside(lesion, mask.shape, downsample, keep_thin)
        mask[window] |= inside
    return mask


def pixels_inside(
    lesion: shapely.Polygon, shape: tuple[int, int], downsample: float, keep_thin: bool
) -> tuple[tuple[slice, slice], np.ndarray]:
    """A lesion's window of the mask, and the pixels in it whose centres the lesion holds."""
    x0, y0, x1, y1 = raster_places(lesion.bounds, downsample)
    rows = slice(max(0, int(np.floor(y0))), min(shape[0], int(np.ceil(y1))))
    cols = slice(max(0, int(np.floor(x0))), min(shape[1], int(np.ceil(x1))))
    if rows.start >= rows.stop or cols.start >= cols.stop:
        raise RunError(
            f"a lesion at level-0 px x {lesion.bounds[0]:.0f}, y {lesion.bounds[1]:.0f} lies off"
            f" its slide's mask of {shape[1]} x {shape[0]} px of {downsample:g} level-0 px"
        )
    box = Bounds(cols.start, rows.start, cols.stop - cols.start, rows.stop - rows.start)
    inside = fill(lesion, box, downsample, on_edge="outside")
    if keep_thin and not inside.any():
        [(x, y)] = raster_places(lesion.representative_point().coords, downsample).astype(int)
        inside[y - rows.start, x - cols.start] = True
    return (rows, cols), inside


def read_mask(path: str | Path, level: int = OFFICIAL_LEVEL) -> np.ndarray:
    """Lesion pixels of one of the challenge's mask TIFFs, at downsample ``2 ** level``.

    Lesion is 255 in the first channel; values below it do not count, as in the organisers'
    script. In files of 0 and 1 lesion is 1 (the script sees no lesion in them). A pyramid
    without the level is sampled, tile by tile, at the middles of the level's pixels, from the
    next finer one of which it is a whole multiple.

    Parameters
    ----------
    path : path-like
        A TIFF, tiled or not, with or without reduced levels; its first image is level 0.
    level : int

    Returns
    -------
    bool array, shape (h, w)

    Raises
    ------
    RunError
        If the file is no TIFF that can be decoded, or holds other values: what its 2 means, say,
        is not known.
    """
    try:
        with tifffile.TiffFile(path) as file:
            first, *others = (page.aspage() for page in file.pages)
            others += [page.aspage() for page in first.pages or []]
            page, step = _nearest_level([first, *(p for p in others if p.is_reduced)], 2**level)
            values = _sampled(page, step)
    except (OSError, ValueError, RuntimeError, tifffile.TiffFileError) as error:
        # The RuntimeErrors are imagecodecs'.
        raise RunError(f"{path}: cannot be read as a mask: {error}") from error
    top = values.max(initial=0)
    if top not in (0, 1, 255):
        raise RunError(
            f"{path}: its largest value is {top}: a mask's lesions are 255, or 1 where there is"
            " only 0 and 1"
        )
    return values == (255 if top == 255 else 1)


def _nearest_level(
    pages: Sequence[tifffile.TiffPage], downsample: int
) -> tuple[tifffile.TiffPage, int]:
    """The coarsest level of which `downsample` is a whole multiple, and that multiple."""
    width, height = pages[0].imagewidth, pages[0].imagelength
    stored = {(width / p.imagewidth + height / p.imagelength) / 2: p for p in pages}
    steps = {d: round(downsample / d) for d in stored}
    fitting = [
        d for d, step in steps.items() if abs(step * d / downsample - 1) <= DOWNSAMPLE_TOLERANCE
    ]
    return stored[max(fitting)], steps[max(fitting)]


def _sampled(page: tifffile.TiffPage, step: int) -> np.ndarray:
    """First channel of every `step`-th pixel, a tile in memory at a time."""
    size = page.imagelength, page.imagewidth
    # Middles of the steps; where the last is cut short, the level's last pixel.
    at = [np.minimum(np.arange(0, side, step) + step // 2, side - 1) for side in size]
    values = np.zeros((len(at[0]), len(at[1])), page.dtype)
    for tile, position, shape in page.segments():
        if tile is None or any(position[:2]):  # never written (0), or of another plane
            continue
        corner, extent = position[2:4], shape[1:3]
        (top, bottom), (left, right) = (
            np.searchsorted(axis, (start, start + length))
            for axis, start, length in zip(at, corner, extent, strict=True)
        )
        rows, cols = at[0][top:bottom] - corner[0], at[1][left:right] - corner[1]
        values[top:bottom, left:right] = tile[0, rows[:, np.newaxis], cols, 0]
    return values
