"""Masks of a slide that were made elsewhere: polygons, or an image at any scale."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import shapely
import tifffile
from PIL import Image, UnidentifiedImageError
from shapely.affinity import affine_transform, translate

from wsi_pipeline.errors import AnnotationError, MaskError
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.raster import fill
from wsi_pipeline.slides.annotation_files import recognise
from wsi_pipeline.slides.annotation_origin import FrameOrigin, file_to_level0, stated_origin

IMAGE_SUFFIXES = frozenset((".png", ".tif", ".tiff"))
MASK_SUFFIXES = IMAGE_SUFFIXES | {".geojson", ".json", ".xml"}
ROUNDING_PX = 1  # of each side of an image: tools round sizes up or down
MOST_OUTSIDE = 0.01  # share of the polygons' area that may lie off the frame
LARGEST_PX = 10**9
Origin = FrameOrigin | Literal["auto"]


@dataclass(frozen=True)
class MaskGrid:
    """The pixels that a mask is wanted for.

    Parameters
    ----------
    bounds : Bounds
        The scanned part of the slide; the first pixel begins at its corner.
    size : (int, int)
        Width and height of the slide's frame, level-0 px.
    downsample : float
        Level-0 px per pixel.
    shape_px : (int, int)
        Width and height.
    """

    bounds: Bounds
    size: tuple[int, int]
    downsample: float
    shape_px: tuple[int, int]


def read_mask(
    path,
    grid: MaskGrid,
    *,
    values: Sequence[int] | None = None,
    origin: Origin = "auto",
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read a mask onto a grid.

    An image (PNG or TIFF, one channel or grey) covers the slide's level-0 frame or its scanned
    bounds, at any scale: its aspect ratio tells which, to within a pixel of each side. A pixel of
    the grid is in the mask if at least half of it is. All other files are annotation files
    (GeoJSON and the formats that lesions are read from): every polygon in them counts, whatever
    its class.

    Parameters
    ----------
    path : path-like
    grid : MaskGrid
    values : sequence of int, optional
        Pixel values of an image that are in the mask; all but 0 by default.
    origin : "auto", "slide", "bounds" or "lower left"
        What coordinates of polygons count from, see `file_to_level0` and `stated_origin` of
        `wsi_pipeline.slides.annotation_origin`.

    Returns
    -------
    mask : bool array
        Of the grid.
    notes : tuple of str

    Raises
    ------
    MaskError
        If the file cannot be read, holds no area, or does not fit the slide.
    """
    path = Path(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        image = _read_image(path, grid, classes=values is not None)
        frame, notes = _frame_of_image(path, image.shape[::-1], grid)
        inside = image != 0 if values is None else np.isin(image, values)
        return _resampled(inside, frame, grid), notes
    return _polygons(path, grid, origin), ()


def _read_image(path: Path, grid: MaskGrid, *, classes: bool) -> np.ndarray:
    """Pixels as a 2-D array: of the coarsest level of a pyramid that is as fine as the grid."""
    try:
        if path.suffix.lower() == ".png":
            with Image.open(path) as file:
                # Indices of a palette are classes; without these, its colours count.
                image = np.asarray(file if classes or file.mode != "P" else file.convert("L"))
        else:
            with tifffile.TiffFile(path) as file:
                levels = file.series[0].levels
                least_px = min(grid.size) / grid.downsample
                fine = [level for level in levels if min(level.shape[:2]) >= least_px]
                level = fine[-1] if fine else levels[0]
                if np.prod(level.shape, dtype=float) > LARGEST_PX:
                    raise MaskError(
                        f"{path}: the mask has {' x '.join(map(str, level.shape))} px, more than"
                        f" {LARGEST_PX:,}. Give a coarser one, or a pyramidal TIFF."
                    )
                image = level.asarray()
                if file.pages[0].aspage().photometric == tifffile.PHOTOMETRIC.MINISWHITE:
                    # Of one bit, tifffile writes True so unless told otherwise.
                    image = image if image.dtype == bool else image.max() - image
    except (
        OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError,
        tifffile.TiffFileError,
    ) as error:  # fmt: skip
        raise MaskError(f"{path}: cannot be read as an image: {error}") from error
    if image.ndim == 3 and image.shape[2] in (2, 4):  # the last is opacity
        if np.ptp(image[..., -1]):
            raise MaskError(
                f"{path}: its opacity varies, so what it means is not clear. Save it without alpha."
            )
        image = image[..., :-1] if image.shape[2] == 4 else image[..., 0]
    if image.dtype.kind == "f" and not np.isin(image, (0, 1)).all():
        raise MaskError(f"{path}: has values between 0 and 1. A mask says yes or no.")
    if image.ndim == 3 and (image[..., :3] == image[..., :1]).all():
        image = image[..., 0]
    if image.ndim != 2:
        raise MaskError(
            f"{path}: has the shape {image.shape} and is coloured. A mask has one channel: a class"
            " for each pixel."
        )
    return image


def _frame_of_image(path: Path, size_px, grid: MaskGrid) -> tuple[Bounds, tuple[str, ...]]:
    """What an image covers, level-0 px; a note if its aspect ratio fits two frames."""
    whole = Bounds(0, 0, *grid.size)
    fits = [frame for frame in (whole, grid.bounds) if _fits(size_px, frame)]
    (width, height), (frame_width, frame_height) = size_px, grid.size
    bounds = f"{grid.bounds.width} x {grid.bounds.height} px"
    if not fits:
        also = "" if grid.bounds == whole else f" nor the one of its scanned bounds, {bounds}"
        raise MaskError(
            f"{path}: the mask has {width} x {height} px. Its aspect ratio is not the one of the"
            f" slide's frame, {frame_width} x {frame_height} px{also}."
        )
    if len(fits) == 2 and grid.bounds != whole:
        return whole, (
            f"{path.name} fits the slide's frame ({frame_width} x {frame_height} px) and its"
            f" scanned bounds ({bounds}): it was read as the frame",
        )
    return fits[0], ()


def _fits(size_px: tuple[int, int], frame: Bounds) -> bool:
    """Whether both sides, each to within rounding, are those of the frame at one scale."""
    scales = [
        (side / (px + ROUNDING_PX), side / max(px - ROUNDING_PX, 0.5))
        for px, side in zip(size_px, (frame.width, frame.height), strict=True)
    ]
    return max(low for low, _ in scales) <= min(high for _, high in scales)


def _resampled(inside: np.ndarray, frame: Bounds, grid: MaskGrid) -> np.ndarray:
    """The grid's pixels of which at least half lies in the mask; nothing lies off the frame."""
    corner, starts = (grid.bounds.x, grid.bounds.y), (frame.x, frame.y)
    scales = frame.width / inside.shape[1], frame.height / inside.shape[0]
    low = [(at - start) / scale for at, start, scale in zip(corner, starts, scales, strict=True)]
    high = [
        at + px * grid.downsample / scale
        for at, px, scale in zip(low, grid.shape_px, scales, strict=True)
    ]
    beyond_px = [
        max(0, math.ceil(end) - px) for end, px in zip(high, inside.shape[::-1], strict=True)
    ]
    padded = np.pad(inside.astype(np.uint8) * 255, [(0, beyond_px[1]), (0, beyond_px[0])])
    resize = Image.fromarray(padded).resize
    return np.asarray(resize(grid.shape_px, Image.Resampling.BOX, (*low, *high))) >= 128


def _polygons(path: Path, grid: MaskGrid, origin: Origin) -> np.ndarray:
    try:
        parse, document = recognise(path)
        shapes = [shape for shape in parse(document) if shape.rings]
    except AnnotationError as error:
        raise MaskError(f"{path}: {error}") from error
    if not shapes:
        raise MaskError(f"{path}: holds no polygon. A mask needs areas.")
    drawn = {
        cut: shapely.union_all(
            [
                shapely.make_valid(shapely.Polygon(shape.rings[0], shape.rings[1:]))
                for shape in shapes
                if (shape.role == "exclusion") == cut
            ]
        )
        for cut in (False, True)
    }
    union = drawn[False].difference(drawn[True])
    counts_from = stated_origin(path, origin)
    to_level0 = file_to_level0(counts_from, 1.0, bounds=grid.bounds, size=grid.size)
    union = translate(affine_transform(union, to_level0), -grid.bounds.x, -grid.bounds.y)
    _check_inside(path, union, grid)
    areas = [part for part in shapely.get_parts(union) if part.geom_type == "Polygon"]
    width, height = grid.shape_px
    return fill(shapely.MultiPolygon(areas), Bounds(0, 0, width, height), grid.downsample)


def _check_inside(path: Path, union, grid: MaskGrid) -> None:
    """Refuse polygons off the frame; `union` counts from the corner of the bounds."""
    x, y, (width, height) = grid.bounds.x, grid.bounds.y, grid.size
    outside = union.difference(shapely.box(-x, -y, width - x, height - y)).area
    if outside > MOST_OUTSIDE * union.area:
        left, top, right, bottom = (round(edge) for edge in union.bounds)
        raise MaskError(
            f"{path}: {outside / union.area:.0%} of the area of its polygons lies off the slide's"
            f" frame of {width} x {height} px. They reach from ({left + x}, {top + y}) to"
            f" ({right + x}, {bottom + y}). Coordinates must be level-0 px of this slide."
        )
