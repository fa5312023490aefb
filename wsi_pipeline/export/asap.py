"""Heatmaps, regions and detections for ASAP: a tiled TIFF of the slide's size, and XML.

ASAP lays ``SLIDE_likelihood_map.tif`` over ``SLIDE`` when both lie in one folder.
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
from wsi_pipeline.heatmaps.regions import Region
from wsi_pipeline.slides.annotation_xml import (
    ASAP_EXCLUSION,
    AsapShape,
    write_asap_shapes,
)

TILE_PX = 512
UM_PER_CM = 1e4
BIG_PX = 2**32
"""Slides of more px are written as BigTIFF."""
REGION_COLOURS = ("#F4D03F", "#E67E22", "#C0392B", "#8E44AD")
DETECTION_GROUP, DETECTION_COLOUR = "Detections", "#2E86C1"


def write_asap_heatmap(
    path, values: np.ndarray, *, grid: PatchGrid, slide_size: tuple[int, int]
) -> None:
    """Write a heatmap as a tiled grey TIFF of the slide's size, whole or not at all.

    A pixel is ``round(255 * probability)`` of the heatmap pixel that it lies in; 0 also where
    nothing was predicted. Each level of the pyramid halves the one before. Pixels are made tile by
    tile, so memory stays flat as slides grow.

    Parameters
    ----------
    path : path-like
        ``SLIDE_likelihood_map.tif`` for ASAP to find it.
    values : float array, shape `grid.shape`
        Level 0 of the heatmap, in [0, 1]; NaN where nothing was predicted.
    grid : PatchGrid
    slide_size : (int, int)
        Width and height of the slide's level-0 frame, px.
    """
    grey = np.round(255 * np.nan_to_num(values)).astype(np.uint8)
    bigtiff = slide_size[0] * slide_size[1] >= BIG_PX
    with replace_atomically(path) as part, tifffile.TiffWriter(part, bigtiff=bigtiff) as tiff:
        for level, (width, height) in enumerate(_level_sizes(slide_size)):
            per_cm = UM_PER_CM / (grid.mpp * 2**level)
            stored: dict[str, Any] = {
                "shape": (height, width), "dtype": np.uint8, "tile": (TILE_PX, TILE_PX),
                "compression": "zlib", "photometric": "minisblack", "metadata": None,
                "resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER",
                "subfiletype": int(level > 0),
            }  # fmt: skip
            tiff.write(_tiles(grey, grid, width, height, 2.0**level), **stored)


def _level_sizes(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    yield size
    while max(size) > TILE_PX:
        size = -(-size[0] // 2), -(-size[1] // 2)
        yield size


def _tiles(
    grey: np.ndarray, grid: PatchGrid, width: int, height: int, downsample: float
) -> Iterator[bytes]:
    """The compressed tiles of a level, row by row."""
    outside = np.pad(grey, 1)  # one pixel of 0 around, for all that lies off the heatmap
    rows, cols = (
        _nearest(grid, axis, side, downsample, grey.shape[1 - axis])
        for axis, side in ((1, height), (0, width))
    )
    for top in range(0, len(rows), TILE_PX):
        band = outside[rows[top : top + TILE_PX]]
        for left in range(0, len(cols), TILE_PX):
            across = cols[left : left + TILE_PX]
            part = band[:, across[0] : across[-1] + 1]
            if (first := part.flat[0]) == part.min() == part.max():
                yield _constant_tile(int(first))
            else:
                yield zlib.compress(band[:, across].tobytes(), 6)


def _nearest(grid: PatchGrid, axis: int, side_px: int, downsample: float, count: int) -> np.ndarray:
    """The pixel, of the padded heatmap, at each row or column of a level, up to whole tiles."""
    centres = pixel_centres(np.arange(-(-side_px // TILE_PX) * TILE_PX), downsample)
    points = np.zeros((len(centres), 2))
    points[:, axis] = centres
    return np.clip(np.floor(grid.heatmap_places(points)[:, axis]) + 1, 0, count + 1).astype(int)


@cache
def _constant_tile(value: int) -> bytes:
    return zlib.compress(bytes([value]) * TILE_PX**2, 6)


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
    together = shapely.union_all([region.polygon for region in regions])
    outlines, holes = [], []
    for region in regions:
        inner = [shapely.Polygon(ring) for ring in region.polygon.interiors]
        if inner and shapely.union_all(inner).intersection(together).area > 0:
            parts = _without_holes(region.polygon)
        else:
            parts = [region.polygon]
            holes += [ring.exterior.coords[:-1] for ring in inner]
        outlines += [(region, part.exterior.coords[:-1]) for part in parts]
    return outlines, holes


def _without_holes(polygon: shapely.Polygon) -> list[shapely.Polygon]:
    """Cut a polygon, through each of its holes, into polygons of the same area together."""
    if not polygon.interiors:
        return [polygon]
    x0, y0, x1, y1 = polygon.bounds
    hole_x0, _, hole_x1, _ = polygon.interiors[0].bounds
    middle = (hole_x0 + hole_x1) / 2
    halves = shapely.box(x0, y0, middle, y1), shapely.box(middle, y0, x1, y1)
    parts = [part for half in halves for part in shapely.get_parts(polygon.intersection(half))]
    areas = [part for part in parts if part.geom_type == "Polygon"]
    return [simple for part in areas for simple in _without_holes(part)]
