"""GeoJSON of QuPath, the Digital Slide Archive and others, parsed to shapes."""

import re
from collections.abc import Iterator

import numpy as np

from wsi_pipeline.errors import AnnotationError
from wsi_pipeline.slides.annotation_shapes import Shape, listed, mapping, named, ring_of, short

GEOJSON_NO_AREAS = {
    "Point": "point", "MultiPoint": "set of points",
    "LineString": "line", "MultiLineString": "set of lines",
}  # fmt: skip
# What QuPath finds rather than a person draws, by `objectType`, or by `id` up to version 0.3.
QUPATH_FOUND = {
    "detection": "detection", "pathdetectionobject": "detection",
    "cell": "cell", "pathcellobject": "cell",
    "tile": "tile", "pathtileobject": "tile",
    "tma_core": "TMA core", "tmacoreobject": "TMA core",
    "root": "root", "pathrootobject": "root",
}  # fmt: skip
QUPATH_KEYS = frozenset(("objectType", "object_type", "classification", "isLocked", "measurements"))
# Where programs other than QuPath put an object's class, the most telling first, case ignored:
# label and group of the Digital Slide Archive, the terms of Cytomine, what exports are wont to say.
CLASS_KEYS = (
    "label", "labels", "class", "class_name", "classname", "pathclass", "annotation_class",
    "annotationclass", "annotation_type", "term", "terms", "category", "layer", "title", "text",
    "group", "annotation", "type",
)  # fmt: skip


def geojson_shapes(document) -> Iterator[Shape]:
    """Shapes of parsed GeoJSON, in the file's order; an `AnnotationError` names a malformed one."""
    for number, feature in enumerate(_geojson_features(document), 1):
        name = named(number, feature.get("id"))
        properties = mapping(feature, "properties", name)
        classes = _geojson_classes(properties, name)
        label = properties.get("name")
        label = label if isinstance(label, str) else ""
        if found := _found_by_qupath(feature, properties):
            if found != "root":
                yield Shape(name, classes, kind=found, label=label)
            continue
        polygons = list(_geojson_polygons(feature.get("geometry"), name))
        for part, rings in enumerate(polygons, 1):
            part_name = name if len(polygons) == 1 else f"{name} part {part}"
            yield Shape(part_name, classes, rings, label=label)
        if not polygons:
            kind = str(mapping(feature, "geometry", name).get("type"))
            yield Shape(name, classes, kind=GEOJSON_NO_AREAS.get(kind, "shape"), label=label)


def drawn_in_qupath(document) -> bool:
    """Whether GeoJSON looks like QuPath's; so does what bears the marks of no program."""
    features = list(_geojson_features(document))
    properties = [feature.get("properties") or {} for feature in features]
    if any(not QUPATH_KEYS.isdisjoint(p) for p in properties if isinstance(p, dict)):
        return True
    return not any(_geojson_classes(p, "") for p in properties if isinstance(p, dict))


def _found_by_qupath(feature: dict, properties: dict) -> str:
    """What QuPath itself made the object, '' where a person drew it."""
    kind = properties.get("objectType") or properties.get("object_type") or feature.get("id")
    return QUPATH_FOUND.get(kind.lower(), "") if isinstance(kind, str) else ""


def _geojson_classes(properties: dict, name: str) -> tuple[str, ...]:
    """The class of an object and those that it derives from, under the first key that has one."""
    by_key = {str(key).casefold(): value for key, value in properties.items()}
    classification = by_key.get("classification")
    if isinstance(classification, dict):
        classification = classification.get("names") or _class_name(classification)
    elif classification is not None and not isinstance(classification, (str, list)):
        raise AnnotationError(
            f"{name}: 'classification' is {short(classification)}, not an object or a name"
        )
    if isinstance(classification, list):
        classification = ": ".join(map(str, classification))
    if classification:
        parts = re.split(r":\s*", str(classification))
        return tuple(": ".join(parts[:n]) for n in range(len(parts), 0, -1))
    for key in CLASS_KEYS:
        value = by_key.get(key)
        if isinstance(value, list):
            value = ": ".join(_class_name(item) for item in value)
        if own := _class_name(value):
            return (own,)
    return ()


def _class_name(value) -> str:
    """A class as text, or as an object that holds it (the Digital Slide Archive's, Cytomine's)."""
    if isinstance(value, dict):
        value = value.get("value") or value.get("name")
    return "" if value is None or isinstance(value, (dict, list)) else str(value)


def _geojson_features(node) -> Iterator[dict]:
    """All features of a document, those within others too; a bare geometry becomes one."""
    if isinstance(node, list):
        for item in node:
            yield from _geojson_features(item)
    elif not isinstance(node, dict):
        raise AnnotationError(f"holds {short(node)} where a GeoJSON object belongs")
    elif node.get("type") == "FeatureCollection":
        yield from _geojson_features(listed(node, "features", "the FeatureCollection"))
    elif node.get("type") == "Feature":
        yield node
        for holder in (node, node.get("properties")):
            if isinstance(holder, dict) and holder.get("childObjects"):
                yield from _geojson_features(listed(holder, "childObjects", "a Feature"))
    else:
        yield {"geometry": node}


def _geojson_polygons(geometry, name: str) -> Iterator[tuple[np.ndarray, ...]]:
    """Rings of each polygon in a geometry; none for points, lines and null."""
    if geometry is None:
        return
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind == "GeometryCollection":
        for part in listed(geometry, "geometries", name):
            yield from _geojson_polygons(part, name)
    elif kind == "Polygon":
        yield _geojson_rings(listed(geometry, "coordinates", name), name)
    elif kind == "MultiPolygon":
        for polygon in listed(geometry, "coordinates", name):
            yield _geojson_rings(polygon, name)
    elif kind not in GEOJSON_NO_AREAS:
        raise AnnotationError(f"{name}: its geometry is {short(geometry)}, not GeoJSON's")


def _geojson_rings(rings, name: str) -> tuple[np.ndarray, ...]:
    if not isinstance(rings, list) or not rings:
        raise AnnotationError(f"{name}: a polygon's coordinates are {short(rings)}, not rings")
    return tuple(ring_of(ring, f"{name} ring {i}") for i, ring in enumerate(rings, 1))
