"""GeoJSON for QuPath, read by shapely, by a check of QuPath's rules, and by our own reader."""

import gzip
import json
import tracemalloc
from uuid import UUID

import numpy as np
import pandas as pd
import pytest
import shapely
from planted import COLS, GRIDS, LESION, ROWS, lesion_box, planted

from wsi_pipeline.config import AnnotationConfig
from wsi_pipeline.errors import RunError
from wsi_pipeline.export.geojson import write_geojson
from wsi_pipeline.geometry import Bounds, PatchGrid
from wsi_pipeline.heatmaps.detect import find_detections
from wsi_pipeline.heatmaps.regions import heatmap_regions
from wsi_pipeline.slides.annotation_origin import uses_bounds_origin
from wsi_pipeline.slides.annotations import read_annotation

NO_DETECTIONS = pd.DataFrame(columns=["probability", "x", "y"], dtype=float)
HOLE = (21, 31)
"""A heatmap pixel within the lesion that is below the thresholds."""
CLASSES = {name: getattr(AnnotationConfig(), name) for name in ("positive", "exclusion", "ignored")}


def exported(path, grid, *, thresholds=(0.5, 0.9), tiles_from=0.0, values=None):
    """Write a heatmap with a ring of 0.6 around the lesion, which has a hole."""
    if values is None:
        values = planted(grid)
        around = values[ROWS.start - 1 : ROWS.stop + 1, COLS.start - 1 : COLS.stop + 1]
        around[around < LESION] = 0.6
        values[HOLE] = 0.125
    regions = [part for at in thresholds for part in heatmap_regions(values, grid, at)]
    detections = find_detections(
        values, grid, method="components", radius_um=0, min_probability=0.7
    )
    write_geojson(
        path, values=values, grid=grid, regions=regions, detections=detections,
        model="net@1", slide_id="s", tiles_from=tiles_from,
    )  # fmt: skip
    return values, regions, detections


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """By geometry: the file, its heatmap, regions and detections."""
    folder = tmp_path_factory.mktemp("geojson")
    paths = {name: folder / f"{name}.geojson" for name in GRIDS}
    return {name: (path, *exported(path, GRIDS[name])) for name, path in paths.items()}


def features(path, kind):
    document = json.loads(path.read_text())
    return [part for part in document["features"] if part["properties"]["objectType"] == kind]


def geometries(path, kind):
    """Read by shapely from the file's own text of each geometry."""
    return [shapely.from_geojson(json.dumps(part["geometry"])) for part in features(path, kind)]


def check_as_qupath_does(feature):
    """What QuPath's reader demands of a Feature, or silently drops (QuPathTypeAdapters)."""
    assert feature["type"] == "Feature" and str(UUID(feature["id"])) == feature["id"]
    assert set(feature) == {"type", "id", "geometry", "properties"}
    properties = feature["properties"]
    assert set(properties) <= {
        "objectType", "name", "color", "classification", "isLocked", "measurements", "metadata",
    }  # fmt: skip
    assert properties["objectType"] in {"annotation", "detection", "tile"}
    colours = [properties.get("color", [0, 0, 0])]
    if "classification" in properties:
        assert set(properties["classification"]) == {"name", "color"}
        colours.append(properties["classification"]["color"])
    for colour in colours:
        assert len(colour) == 3 and all(type(part) is int and 0 <= part <= 255 for part in colour)
    assert properties.get("isLocked", True) is True
    assert all(type(value) in (int, float) for value in properties["measurements"].values())
    assert all(type(value) is str for value in properties.get("metadata", {}).values())
    geometry = feature["geometry"]
    assert set(geometry) == {"type", "coordinates"} and geometry["type"] in {"Polygon", "Point"}
    if geometry["type"] == "Polygon":  # JTS refuses rings that are open or have too few points
        for ring in geometry["coordinates"]:
            assert len(ring) >= 4 and ring[0] == ring[-1]


@pytest.mark.parametrize("name", GRIDS)
def test_every_object_is_what_qupath_reads_and_valid_for_shapely(name, exports):
    path, values, regions, detections = exports[name]
    document = json.loads(path.read_text())
    assert list(document) == ["type", "features"] and document["type"] == "FeatureCollection"
    found = document["features"]
    assert len(found) == np.isfinite(values).sum() + len(regions) + len(detections)
    for feature in found:
        check_as_qupath_does(feature)
    assert len({feature["id"] for feature in found}) == len(found)
    collection = shapely.from_geojson(path.read_text())
    assert len(collection.geoms) == len(found)
    assert shapely.is_valid(shapely.get_parts(collection)).all()
    polygons = [*geometries(path, "annotation"), *geometries(path, "tile")]
    assert all(polygon.exterior.is_ccw for polygon in polygons)  # RFC 7946, 3.1.6


@pytest.mark.parametrize("name", GRIDS)
def test_the_lesion_lies_where_it_is_in_the_slide_that_qupath_shows(name, exports):
    grid, path = GRIDS[name], exports[name][0]
    # QuPath shows the scanned bounds: their corner is (0, 0).
    expected = np.array(lesion_box(grid)) - np.array([grid.bounds.x, grid.bounds.y] * 2)
    inner = geometries(path, "annotation")[1]
    np.testing.assert_allclose(inner.bounds, expected, atol=1e-6)
    assert len(inner.interiors) == 1
    step = grid.stride_px * grid.downsample
    hole = expected[:2] + np.array([HOLE[1] - COLS.start, HOLE[0] - ROWS.start]) * step
    np.testing.assert_allclose(
        shapely.Polygon(inner.interiors[0]).bounds, [*hole, *(hole + step)], atol=1e-6
    )
    tiles = [
        shapely.from_geojson(json.dumps(part["geometry"]))
        for part in features(path, "tile")
        if part["properties"]["measurements"]["Probability of tumour"] == LESION
    ]
    assert len(tiles) == 11
    np.testing.assert_allclose(shapely.union_all(tiles).bounds, expected, atol=0.01)
    assert inner.symmetric_difference(shapely.union_all(tiles, grid_size=0.01)).area < 0.02 * step
    (point,) = geometries(path, "detection")
    first_centre = expected[:2] + step / 2
    np.testing.assert_allclose(point.coords[0], first_centre, atol=1)  # whole level-0 px


@pytest.mark.parametrize("name", GRIDS)
def test_our_own_reader_finds_the_regions_again_and_nothing_else(name, exports):
    grid, (path, _, regions, _) = GRIDS[name], exports[name]
    assert uses_bounds_origin(path)
    corner = (1, 0, 0, 1, grid.bounds.x, grid.bounds.y)
    found = read_annotation(path, **CLASSES, to_level0=corner)
    # The regions of 0.9 lie in those of 0.5: the union is that of the lowest threshold.
    lowest = [region.polygon for region in regions if region.threshold == 0.5]
    assert len(found.lesions) == len(lowest) == 1
    assert found.lesions[0].area == pytest.approx(lowest[0].area, rel=1e-9)
    assert found.lesions[0].symmetric_difference(lowest[0]).area < 1e-3
    assert {kind for kind, _ in found.left_out} == {"tile", "detection"}
    assert not found.repairs and not found.doubts


def test_objects_say_what_they_are(exports):
    path = exports["plain"][0]
    outer, inner = features(path, "annotation")
    assert outer["properties"] == {
        "objectType": "annotation",
        "name": "Tumour >= 0.5",
        "classification": {"name": "Tumor", "color": [200, 0, 0]},
        "isLocked": True,
        "measurements": {
            # 6 x 5 pixels of 48 px of 0.5 um, less the hole.
            "Area um^2": 29 * 24.0**2,
            "Probability of tumour: threshold": 0.5,
            "Probability of tumour: highest": LESION,
            "Probability of tumour: mean": pytest.approx((11 * LESION + 18 * 0.6) / 29),
        },
        "metadata": {"Model": "net@1", "Slide": "s"},
    }
    assert inner["properties"]["name"] == "Tumour >= 0.9"
    (detection,) = features(path, "detection")
    assert detection["properties"] == {
        "objectType": "detection",
        "classification": {"name": "Tumor", "color": [200, 0, 0]},
        "measurements": {"Probability of tumour": LESION},
    }
    tile = features(path, "tile")[0]["properties"]
    assert set(tile) == {"objectType", "color", "measurements"}  # coloured without a class


def test_tiles_have_the_heatmaps_colours_and_values(tmp_path):
    grid = PatchGrid(Bounds(0, 0, 40, 10), 1.0, 1.0, 10, 10, 10)
    values = np.array([[0, 0.1, 1, np.nan]], np.float32)
    exported(tmp_path / "s.geojson", grid, thresholds=(), values=values)
    tiles = [part["properties"] for part in features(tmp_path / "s.geojson", "tile")]
    assert [tile["measurements"]["Probability of tumour"] for tile in tiles] == [0, 0.1, 1]
    # ColorBrewer's RdYlBu, its ends and the second of 11 colours.
    assert [tile["color"] for tile in tiles] == [[49, 54, 149], [68, 115, 179], [165, 0, 38]]


def test_only_pixels_with_a_probability_from_the_threshold_on_are_tiles(tmp_path):
    grid = PatchGrid(Bounds(0, 0, 40, 10), 1.0, 1.0, 10, 10, 10)
    # Float32's 0.7 is below 0.7.
    values = np.array([[0.7, 0.75, 0.5, np.nan]], np.float32)
    exported(tmp_path / "s.geojson", grid, thresholds=(), values=values, tiles_from=0.7)
    (tile,) = features(tmp_path / "s.geojson", "tile")
    assert tile["properties"]["measurements"] == {"Probability of tumour": 0.75}


def test_tiles_end_at_the_scanned_bounds(tmp_path):
    grid = PatchGrid(Bounds(100, 50, 25, 9), 1.0, 1.0, 10, 10, 10)
    values = np.full(grid.shape, 0.5, np.float32)
    exported(tmp_path / "s.geojson", grid, thresholds=(), values=values)
    assert shapely.union_all(geometries(tmp_path / "s.geojson", "tile")).equals(
        shapely.box(0, 0, 25, 9)
    )


def test_the_same_export_is_the_same_bytes_packed_or_not(tmp_path):
    plain, packed, again = (tmp_path / name for name in ("s.geojson", "s.geojson.gz", "t.gz"))
    for path in (plain, packed, again):
        exported(path, GRIDS["downsample"])
    assert packed.read_bytes() == again.read_bytes()
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.geojson", "s.geojson.gz", "t.gz"]


def test_a_heatmap_without_any_tissue_is_an_empty_collection(tmp_path):
    path = tmp_path / "s.geojson"
    grid = GRIDS["plain"]
    exported(path, grid, values=np.full(grid.shape, np.nan, np.float32))
    assert json.loads(path.read_text()) == {"type": "FeatureCollection", "features": []}
    assert read_annotation(path, **CLASSES).state == "nothing"


def test_memory_does_not_grow_with_the_number_of_tiles(tmp_path):
    grid = PatchGrid(Bounds(0, 0, 2000, 2000), 1.0, 1.0, 10, 10, 10)
    values = np.full(grid.shape, 0.5, np.float32)  # 40,000 tiles, 11 MB of text
    tracemalloc.start()
    write_geojson(
        tmp_path / "s.geojson", values=values, grid=grid, regions=[], detections=NO_DETECTIONS,
        model="m", slide_id="s",
    )  # fmt: skip
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "s.geojson").stat().st_size > 8e6
    assert peak < 2e6


def test_a_heatmap_of_another_shape_is_refused(tmp_path):
    with pytest.raises(RunError, match="shape"):
        write_geojson(
            tmp_path / "s.geojson", values=np.zeros((2, 2)), grid=GRIDS["plain"], regions=[],
            detections=NO_DETECTIONS, model="m", slide_id="s",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
