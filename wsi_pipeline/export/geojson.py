"""Heatmaps, regions and detections as GeoJSON for QuPath 0.4 and later.

Key names and values follow QuPath's own reader (its classes ``QuPathTypeAdapters``,
``ROITypeAdapters`` and ``PathClassTypeAdapter``). QuPath counts from the corner of the scanned
bounds and rounds coordinates to 0.01 px.
"""

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TextIO
from uuid import NAMESPACE_OID, UUID, uuid5

import numpy as np
import pandas as pd
import shapely
from shapely.geometry import mapping

from wsi_pipeline.files import replace_atomically
from wsi_pipeline.geometry import PatchGrid
from wsi_pipeline.heatmaps.regions import Region
from wsi_pipeline.report.slide_pictures import SHADES, shade_numbers

TUMOUR_CLASS = {"name": "Tumor", "color": [200, 0, 0]}
"""QuPath's own class for tumour, in QuPath's own colour."""
MEASUREMENT = "Probability of tumour"
_COLOURS = ["[{},{},{}]".format(*colour) for colour in SHADES]


def write_geojson(
    path,
    *,
    values: np.ndarray,
    grid: PatchGrid,
    regions: Sequence[Region],
    detections: pd.DataFrame,
    model: str,
    slide_id: str,
    tiles_from: float = 0.0,
) -> None:
    """Write objects that QuPath imports, whole or not at all.

    Regions become locked annotations of the class Tumor, detections become point detections of
    the same class, heatmap pixels become tiles without a class, in the heatmap's colours. All
    have measurements. The same input gives the same bytes, also of the objects' identifiers: QuPath
    therefore warns before it imports a file a second time.

    Parameters
    ----------
    path : path-like
        Usually ``SLIDE.geojson``. Packed by gzip if its name ends in ``.gz``: QuPath imports such
        a file by its menu, not by drag and drop.
    values : float array, shape `grid.shape`
        Level 0 of the heatmap, in [0, 1]; NaN (no tissue) is no tile.
    grid : PatchGrid
    regions : sequence of Region
        Of one threshold or several.
    detections : DataFrame
        ``probability`` in [0, 1], ``x``, ``y`` (level-0 px), one row for each detection.
    model, slide_id : str
        Metadata of the annotations.
    tiles_from : float
        Heatmap pixels with a probability >= `tiles_from` become tiles. Tiles end at the slide's
        scanned bounds.

    Raises
    ------
    RunError
        If `values` are not of the grid's shape.
    """
    grid.check_shape(values)
    path = Path(path)
    of = uuid5(NAMESPACE_OID, json.dumps([model, slide_id]))
    features = chain(
        _regions(regions, grid, of, {"Model": model, "Slide": slide_id}),
        _detections(detections, grid, of),
        _tiles(np.asarray(values), grid, of, tiles_from),
    )
    with replace_atomically(path) as part, _text_file(part, packed=path.suffix == ".gz") as file:
        file.write('{"type":"FeatureCollection","features":[')
        separator = "\n"
        for feature in features:  # one at a time: a heatmap may have a million pixels
            file.write(separator + feature)
            separator = ",\n"
        file.write("\n]}\n")


@contextmanager
def _text_file(path: Path, *, packed: bool) -> Iterator[TextIO]:
    """Open a text file for writing; its packed form holds neither its name nor the time."""
    with path.open("wb") as file:
        stream: BinaryIO | gzip.GzipFile = file
        if packed:
            stream = gzip.GzipFile("", "wb", 6, file, mtime=0)
        with io.TextIOWrapper(stream, encoding="utf-8", newline="\n") as text:
            yield text


def _regions(
    regions: Sequence[Region], grid: PatchGrid, of: UUID, metadata: dict[str, str]
) -> Iterator[str]:
    for number, region in enumerate(regions):
        outline = shapely.transform(region.polygon, lambda points: _rounded(grid, points))
        yield _feature(
            uuid5(of, f"region {number}"),
            mapping(shapely.orient_polygons(outline)),
            objectType="annotation",
            name=f"Tumour >= {region.threshold:g}",
            classification=TUMOUR_CLASS,
            isLocked=True,
            measurements={
                "Area um^2": round(region.area_mm2 * 1e6, 3),
                f"{MEASUREMENT}: threshold": region.threshold,
                f"{MEASUREMENT}: highest": region.highest,
                f"{MEASUREMENT}: mean": region.mean,
            },
            metadata=metadata,
        )


def _rounded(grid: PatchGrid, points_level0: np.ndarray) -> np.ndarray:
    """Without the last digits of floating point, which make a file long."""
    return np.round(grid.points_in_bounds(points_level0), 6)


def _detections(detections: pd.DataFrame, grid: PatchGrid, of: UUID) -> Iterator[str]:
    places = grid.points_in_bounds(detections[["x", "y"]]).tolist()
    for number, (place, probability) in enumerate(
        zip(places, detections["probability"].tolist(), strict=True)
    ):
        yield _feature(
            uuid5(of, f"detection {number}"),
            {"type": "Point", "coordinates": place},
            objectType="detection",
            classification=TUMOUR_CLASS,
            measurements={MEASUREMENT: probability},
        )


def _feature(identifier: UUID, geometry: dict, **properties) -> str:
    feature = {
        "type": "Feature", "id": str(identifier), "geometry": geometry, "properties": properties,
    }  # fmt: skip
    return json.dumps(feature, separators=(",", ":"), allow_nan=False)


def _tiles(values: np.ndarray, grid: PatchGrid, of: UUID, tiles_from: float) -> Iterator[str]:
    """Squares of heatmap pixels, cut at the bounds; text is put together by hand for speed."""
    edges = np.repeat(np.arange(max(values.shape) + 1)[:, np.newaxis], 2, axis=1)  # x and y
    places = grid.points_in_bounds(grid.heatmap_points(edges))
    places = np.round(np.clip(places, 0, (grid.bounds.width, grid.bounds.height)), 2)
    xs, ys = ([f"{place:.10g}" for place in axis] for axis in places.T)
    for row, (line, top, bottom) in enumerate(zip(values, ys, ys[1:], strict=False)):
        # Float64, so that the threshold is not rounded to the heatmap's float32.
        cols = np.flatnonzero(line.astype(np.float64) >= tiles_from)
        shades = shade_numbers(line[cols]).tolist()
        stated = line[cols].astype(str).tolist()
        for col, shade, value in zip(cols.tolist(), shades, stated, strict=True):
            left, right = xs[col], xs[col + 1]
            if left == right or top == bottom:  # beyond the bounds
                continue
            corners = (left, top), (right, top), (right, bottom), (left, bottom), (left, top)
            ring = ",".join(f"[{x},{y}]" for x, y in corners)
            yield (
                f'{{"type":"Feature","id":"{uuid5(of, f"tile {row} {col}")}",'
                f'"geometry":{{"type":"Polygon","coordinates":[[{ring}]]}},'
                f'"properties":{{"objectType":"tile","color":{_COLOURS[shade]},'
                f'"measurements":{{"{MEASUREMENT}":{value}}}}}}}'
            )
