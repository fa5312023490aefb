"""Heatmaps, regions and detections for ASAP: a tiled TIFF of the slide's size, and XML.

Rules of ASAP that its documentation does not state are from its source code, version 2.2.
"""

import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import shapely
import tifffile

from wsi_pipeline.files import replace_atomically
from wsi_pipeline.geometry import PatchGrid, pixel_centres
from wsi_pipeline.heatmaps.pyramid import block_means
from wsi_pipeline.heatmaps.regions import Region
from wsi_pipeline.slides.annotation_xml import (
    ASAP_EXCLUSION,
    AsapShape,
    write_asap_shapes,
)

TILE_PX = 512
COARSEST_PX = 32
"""The pyramid ends at the first level whose longer side is this or less. ASAP fails where a slide
has more levels than its overlay."""
COMPRESSION_LEVEL = 3
"""Of zlib: 4 and more take twice the time for these blocks of one value, and save a third."""
UM_PER_CM = 1e4
BIG_PX = 2**32
"""Slides of more px are written as BigTIFF."""
REGION_COLOURS = ("#F4D03F", "#E67E22", "#C0392B", "#8E44AD")
DETECTION_GROUP, DETECTION_COLOUR = "Detections", "#2E86C1"
SHRINK_PX = 1e-3
"""Holes are compared with regions without their edges, level-0 px."""


def write_asap_heatmap(
    path, values: np.ndarray, *, grid: PatchGrid, slide_size: tuple[int, int]
) -> None:
    """Write a heatmap as a tiled grey TIFF of the slide's size, whole or not at all.

    A pixel is ``round(255 * probability)`` of the heatmap pixel that it lies in; 0 also where
    nothing was predicted, which ASAP shows as transparent. Each level of the pyramid halves the
    one before (rounded up). Where a level's pixels are larger than heatmap pixels, they hold means
    without NaN, as in the OME-Zarr. Pixels are made tile by tile, so memory stays flat as slides
    grow.

    Parameters
    ----------
    path : path-like
        ``SLIDE_likelihood_map.tif`` beside the slide's file ``SLIDE.*``, for ASAP to find it.
    values : float array, shape `grid.shape`
        Level 0 of the heatmap, in [0, 1]; NaN where nothing was predicted.
    grid : PatchGrid
    slide_size : (int, int)
        Width and height of the slide's level-0 frame, px.

    Raises
    ------
    RunError
        If `values` are not of the grid's shape.
    """
    grid.check_shape(values)
    bigtiff = slide_size[0] * slide_size[1] >= BIG_PX
    reduction = 1
    with replace_atomically(path) as part, tifffile.TiffWriter(part, bigtiff=bigtiff) as tiff:
        for level, size in enumerate(_level_sizes(slide_size)):
            if 2**level >= 2 * reduction * grid.level0_length(grid.stride_px):
                values, reduction = block_means(values), 2 * reduction
            per_cm = UM_PER_CM / (grid.mpp * 2**level)
            stored: dict[str, Any] = {
                "shape": size[::-1], "dtype": np.uint8, "tile": (TILE_PX, TILE_PX),
                # The older of two tags for the same bytes, 32946: ASAP refuses the other, 8.
                "compression": tifffile.COMPRESSION.DEFLATE,
                "photometric": "minisblack", "metadata": None,
                "resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER",
                "subfiletype": int(level > 0),
            }  # fmt: skip
            tiff.write(_tiles(values, reduction, grid, size, 2.0**level), **stored)


def _level_sizes(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    yield size
    while max(size) > COARSEST_PX and min(size) > 1:  # ASAP wants each level narrower
        size = -(-size[0] // 2), -(-size[1] // 2)
        yield size


def _tiles(
    values: np.ndarray, reduction: int, grid: PatchGrid, size: tuple[int, int], downsample: float
) -> Iterator[bytes]:
    """The compressed tiles of a level, row by row."""
    grey = np.round(255 * np.nan_to_num(values)).astype(np.uint8)
    outside = np.pad(grey, 1)  # one pixel of 0 around, for all that lies off the heatmap
    cols, rows = (
        _nearest(grid, axis, size[axis], downsample, reduction, grey.shape[1 - axis])
        for axis in (0, 1)
    )
    for down in rows:
        for across in cols:
            cells = outside[down[0] : down[-1] + 1, across[0] : across[-1] + 1]
            if (first := cells[0, 0]) == cells.min() == cells.max():
                yield _constant_tile(int(first))
            else:  # rows last: many are the same
                pixels = cells[:, across - across[0]][down - down[0]]
                yield zlib.compress(pixels.tobytes(), COMPRESSION_LEVEL)


def _nearest(
    grid: PatchGrid, axis: int, side_px: int, downsample: float, reduction: int, count: int
) -> np.ndarray:
    """The pixel, of the padded heatmap, at each row or column of a level's tiles: (tiles, px)."""
    tiles = -(-side_px // TILE_PX)
    centres = pixel_centres(np.arange(tiles * TILE_PX), downsample)
    points = np.repeat(centres[:, np.newaxis], 2, axis=1)  # of each only x or y is used
    places = np.floor(grid.heatmap_places(points)[:, axis] / reduction)
    return np.clip(places + 1, 0, count + 1).astype(int).reshape(tiles, TILE_PX)


@cache
def _constant_tile(value: int) -> bytes:
    return zlib.compress(bytes([value]) * TILE_PX**2, 9)


def write_asap_annotations(path, *, regions: Sequence[Region], detections: pd.DataFrame) -> None:
    """Write regions and detections as ASAP XML, in level-0 px.

    The regions of a threshold are a group, part of the group "Tumor"; their holes are in the group
    "Exclusion". A region around another region is cut into parts without holes instead, since an
    exclusion would cut the inner region too. Detections are dots, named by their probability.

    Parameters
    ----------
    path : path-like
    regions : sequence of Region
        Of one threshold or several.
    detections : DataFrame
        ``probability, x, y``.
    """
    thresholds = sorted({region.threshold for region in regions})
    group_of = {threshold: f"probability >= {threshold:g}" for threshold in thresholds}
    groups = {"Tumor": ("None", REGION_COLOURS[0])}
    for number, group in enumerate(group_of.values()):
        groups[group] = "Tumor", REGION_COLOURS[number % len(REGION_COLOURS)]
    groups |= {
        ASAP_EXCLUSION: ("None", "#FFFFFF"),
        DETECTION_GROUP: ("None", DETECTION_COLOUR),
    }
    outlines, holes = _outlines_and_holes(regions)
    shapes = [
        AsapShape(f"highest {region.highest:.3f}", group_of[region.threshold], "Polygon", ring)
        for region, ring in outlines
    ]
    shapes += [AsapShape("hole", ASAP_EXCLUSION, "Polygon", ring) for ring in holes]
    shapes += [
        AsapShape(f"{row.probability:.3f}", DETECTION_GROUP, "Dot", [(row.x, row.y)])
        for row in detections.itertuples(index=False)
    ]
    write_asap_shapes(path, shapes, groups)


def _outlines_and_holes(regions: Sequence[Region]) -> tuple[list, list]:
    """Rings of the regions, each with its region, and of the holes that exclusions can cut."""
    occupied = _occupied_holes(regions)
    outlines, holes = [], []
    for region in regions:
        inner = [(ring, next(occupied)) for ring in region.polygon.interiors]
        holes += [ring.coords[:-1] for ring, is_occupied in inner if not is_occupied]
        kept = [ring for ring, is_occupied in inner if is_occupied]
        parts = _without_holes(shapely.Polygon(region.polygon.exterior, kept))
        outlines += [(region, part.exterior.coords[:-1]) for part in parts]
    return outlines, holes


def _occupied_holes(regions: Sequence[Region]) -> Iterator[bool]:
    """Of each hole, in the order of the regions, whether a region lies in it."""
    polygons = [region.polygon for region in regions]
    holes = [shapely.Polygon(ring) for polygon in polygons for ring in polygon.interiors]
    tree = shapely.STRtree(shapely.buffer(holes, -SHRINK_PX, join_style="mitre"))
    _, found = tree.query(polygons, predicate="intersects")
    return iter(np.isin(np.arange(len(holes)), found).tolist())


def _without_holes(polygon: shapely.Polygon) -> list[shapely.Polygon]:
    """Cut a polygon, through each of its holes, into polygons of the same area together."""
    if not polygon.interiors:
        return [polygon]
    x0, y0, x1, y1 = polygon.bounds
    middles = sorted((ring.bounds[0] + ring.bounds[2]) / 2 for ring in polygon.interiors)
    middle = middles[len(middles) // 2]
    halves = shapely.box(x0, y0, middle, y1), shapely.box(middle, y0, x1, y1)
    parts = [part for half in halves for part in shapely.get_parts(polygon.intersection(half))]
    areas = [part for part in parts if part.geom_type == "Polygon"]
    return [simple for part in areas for simple in _without_holes(part)]
