"""Annotation files of four kinds, parsed to shapes: rings with a group, nothing decided yet.

ASAP XML (CAMELYON), GeoJSON (QuPath, Digital Slide Archive), Aperio ImageScope XML and NCRF
JSON are told apart by their content.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import defusedxml.ElementTree
import numpy as np
from defusedxml import DefusedXmlException

from wsi_pipeline.errors import AnnotationError

ASAP_AREAS = ("Polygon", "Spline", "Rectangle")
ASAP_NO_AREAS = ("Dot", "PointSet", "Measurement", "None")
IMAGESCOPE_AREAS = {"0": "polygon", "1": "rectangle", "2": "ellipse"}
IMAGESCOPE_NO_AREAS = {"3": "arrow", "4": "ruler"}
GEOJSON_NO_AREAS = ("Point", "MultiPoint", "LineString", "MultiLineString")

MAX_COORDINATE = 2**31  # the patch index holds level-0 px as int32
ELLIPSE_POINTS = 256


@dataclass(frozen=True)
class Shape:
    """One shape of a file: outer ring and holes, or no rings when its kind has no area."""

    name: str
    group: str
    rings: tuple[np.ndarray, ...] = ()
    role: Literal["tumour", "exclusion"] | None = None  # set where the format itself says


def recognise(path: Path) -> tuple[Callable[..., Iterator[Shape]], object]:
    """Parser and parsed document of a file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"cannot be read: {error.strerror}") from error
    if data.lstrip(b"\xef\xbb\xbf\xff\xfe\x00 \t\r\n")[:1] in (b"{", b"["):
        return _recognise_json(data)
    return _recognise_xml(data)


def _recognise_json(data: bytes):
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"is no JSON: {error}") from error
    if isinstance(document, list) or "type" in document:
        return geojson_shapes, document
    if "positive" in document or "negative" in document:
        return _ncrf_shapes, document
    raise AnnotationError(
        f"is JSON with the keys {sorted(document)}: GeoJSON has 'type', NCRF 'positive' and"
        " 'negative'"
    )


def _recognise_xml(data: bytes):
    try:
        root = defusedxml.ElementTree.fromstring(data)
    except DefusedXmlException as error:
        raise AnnotationError(f"declares XML entities, which are refused: {error}") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise AnnotationError(f"is neither JSON nor XML: {error}") from error
    if root.tag == "ASAP_Annotations":
        return _asap_shapes, root
    if root.tag == "Annotations":
        return _imagescope_shapes, root
    raise AnnotationError(
        f"is XML with the root {root.tag!r}: ASAP has 'ASAP_Annotations', ImageScope 'Annotations'"
    )


def _asap_shapes(root) -> Iterator[Shape]:
    for number, element in enumerate(root.iterfind("Annotations/Annotation"), 1):
        name = _named(number, element.get("Name"))
        group = element.get("PartOfGroup", "None")
        group = "" if group == "None" else group
        kind = element.get("Type")
        if kind in ASAP_NO_AREAS:
            yield Shape(name, group)
            continue
        if kind not in ASAP_AREAS:
            raise AnnotationError(
                f"{name}: its Type is {kind!r}, not one of {', '.join(ASAP_AREAS + ASAP_NO_AREAS)}"
            )
        points = _xml_points(element.iterfind("Coordinates/Coordinate"), name)
        if kind == "Rectangle" and len(points) == 2:
            points = _box_corners(points)
        yield Shape(name, group, (_ring(points, name),))


def _imagescope_shapes(root) -> Iterator[Shape]:
    regions = [
        (layer, region)
        for layer in root.iterfind("Annotation")
        for region in layer.iterfind("Regions/Region")
    ]
    for number, (layer, region) in enumerate(regions, 1):
        name = _named(number, f"layer {layer.get('Id')} region {region.get('Id')}")
        group = layer.get("Name") or region.get("Text") or _imagescope_attribute(layer)
        role = "exclusion" if region.get("NegativeROA") == "1" else None
        kind = region.get("Type", "0")
        if kind in IMAGESCOPE_NO_AREAS:
            yield Shape(name, group)
            continue
        if kind not in IMAGESCOPE_AREAS:
            known = {**IMAGESCOPE_AREAS, **IMAGESCOPE_NO_AREAS}
            raise AnnotationError(f"{name}: its Type is {kind!r}, not one of {known}")
        points = _xml_points(region.iterfind("Vertices/Vertex"), name)
        # ImageScope writes edited outlines of many vertices under the types of boxes, too.
        if IMAGESCOPE_AREAS[kind] == "rectangle" and len(points) == 2:
            points = _box_corners(points)
        if IMAGESCOPE_AREAS[kind] == "ellipse" and len(points) in (2, 4):
            points = _box_ellipse(points)
        yield Shape(name, group, (_ring(points, name),), role)


def _imagescope_attribute(layer) -> str:
    names = [attribute.get("Name", "") for attribute in layer.iterfind("Attributes/Attribute")]
    return next((name for name in names if name not in ("", "Description")), "")


def geojson_shapes(document) -> Iterator[Shape]:
    """Shapes of parsed GeoJSON, in the file's order; an `AnnotationError` names a malformed one."""
    for number, feature in enumerate(_geojson_features(document), 1):
        name = _named(number, feature.get("id"))
        properties = _mapping(feature, "properties", name)
        classification = _mapping(properties, "classification", name)
        group = classification.get("name") or properties.get("label") or ""
        polygons = list(_geojson_polygons(feature.get("geometry"), name))
        for part, rings in enumerate(polygons, 1):
            part_name = name if len(polygons) == 1 else f"{name} part {part}"
            yield Shape(part_name, str(group), rings)
        if not polygons:
            yield Shape(name, str(group))


def _geojson_features(node) -> Iterator[dict]:
    """All features of a document; a bare geometry becomes one."""
    if isinstance(node, list):
        for item in node:
            yield from _geojson_features(item)
    elif not isinstance(node, dict):
        raise AnnotationError(f"holds {_short(node)} where a GeoJSON object belongs")
    elif node.get("type") == "FeatureCollection":
        yield from _geojson_features(_listed(node, "features", "the FeatureCollection"))
    elif node.get("type") == "Feature":
        yield node
    else:
        yield {"geometry": node}


def _geojson_polygons(geometry, name: str) -> Iterator[tuple[np.ndarray, ...]]:
    """Rings of each polygon in a geometry; none for points, lines and null."""
    if geometry is None:
        return
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind == "GeometryCollection":
        for part in _listed(geometry, "geometries", name):
            yield from _geojson_polygons(part, name)
    elif kind == "Polygon":
        yield _geojson_rings(_listed(geometry, "coordinates", name), name)
    elif kind == "MultiPolygon":
        for polygon in _listed(geometry, "coordinates", name):
            yield _geojson_rings(polygon, name)
    elif kind not in GEOJSON_NO_AREAS:
        raise AnnotationError(f"{name}: its geometry is {_short(geometry)}, not GeoJSON's")


def _geojson_rings(rings, name: str) -> tuple[np.ndarray, ...]:
    if not isinstance(rings, list) or not rings:
        raise AnnotationError(f"{name}: a polygon's coordinates are {_short(rings)}, not rings")
    return tuple(_ring(ring, f"{name} ring {i}") for i, ring in enumerate(rings, 1))


def _ncrf_shapes(document) -> Iterator[Shape]:
    for group, role in (("positive", "tumour"), ("negative", "exclusion")):
        for number, entry in enumerate(_listed({group: [], **document}, group, "NCRF"), 1):
            name = f"{group} {number}"
            vertices = _listed(entry, "vertices", name)
            yield Shape(name, group, (_ring(vertices, name),), role)


# Coordinates


def _xml_points(elements, name: str) -> list[list[float]]:
    """X and Y of each element, in their Order where they state one."""
    elements = list(elements)
    if not elements:
        raise AnnotationError(f"{name}: has no coordinates")
    try:
        elements.sort(key=lambda element: float(element.get("Order", 0)))
        return [[float(element.attrib["X"]), float(element.attrib["Y"])] for element in elements]
    except KeyError as error:
        raise AnnotationError(f"{name}: a vertex lacks its {error.args[0]}") from error
    except ValueError as error:
        raise AnnotationError(f"{name}: a vertex is not numeric: {error}") from error


def _ring(points, name: str) -> np.ndarray:
    """Vertices as a float64 array of shape (n, 2), n >= 3, without the closing point."""
    try:
        ring = np.asarray(points)
    except ValueError:  # ragged
        ring = np.empty(0, dtype=object)
    if ring.dtype.kind not in "iuf" or ring.ndim != 2 or ring.shape[1] not in (2, 3):
        raise AnnotationError(
            f"{name}: its vertices are {_short(points)}, not a list of numeric points [x, y]"
            + (": nested one level too shallow" if ring.ndim == 1 and ring.dtype != object else "")
        )
    ring = ring[:, :2].astype(np.float64)
    bad = ~(np.abs(ring) < MAX_COORDINATE).all(axis=1)
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise AnnotationError(
            f"{name}: vertex {i + 1} is {ring[i].tolist()}, not finite or 2^31 px and more"
        )
    if len(ring) > 1 and (ring[0] == ring[-1]).all():
        ring = ring[:-1]
    if len(ring) < 3:
        raise AnnotationError(f"{name}: has {len(ring)} vertices, an area needs 3")
    return ring


def _box_corners(points) -> np.ndarray:
    (x0, y0), (x1, y1) = np.min(points, axis=0), np.max(points, axis=0)
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _box_ellipse(points) -> np.ndarray:
    """Polygon of the ellipse that the points' bounding box holds."""
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    angle = np.linspace(0, 2 * np.pi, ELLIPSE_POINTS, endpoint=False)
    return (low + high) / 2 + (high - low) / 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _listed(node, key: str, name: str) -> list:
    value = node.get(key) if isinstance(node, dict) else None
    if not isinstance(value, list):
        raise AnnotationError(f"{name}: {key!r} is {_short(value)}, not a list")
    return value


def _mapping(node: dict, key: str, name: str) -> dict:
    value = node.get(key)
    if value is not None and not isinstance(value, dict):
        raise AnnotationError(f"{name}: {key!r} is {_short(value)}, not an object")
    return value or {}


def _named(number: int, name) -> str:
    return f"shape {number}" + (f" ({name})" if name else "")


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
