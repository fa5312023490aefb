"""Annotation files of five kinds, parsed to shapes: rings with a class, nothing decided yet.

ASAP XML (CAMELYON), GeoJSON (QuPath, Digital Slide Archive and others), Aperio ImageScope XML,
HALO's XML, which is much like it, and NCRF JSON are told apart by their content. Each may be
packed, by gzip or as the one file of a zip archive.
"""

import gzip
import io
import json
import zipfile
import zlib
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
ASAP_NO_AREAS = {
    "Dot": "point",
    "PointSet": "set of points",
    "Measurement": "line",
    "None": "shape",
}
# By number in ImageScope, by name in HALO.
REGION_AREAS = {"0": "polygon", "1": "rectangle", "2": "ellipse"}
REGION_NO_AREAS = {"3": "arrow", "4": "ruler", "Ruler": "ruler", "Pin": "point"}
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
# Where programs other than QuPath put an object's class, the most telling first: label and group
# of the Digital Slide Archive, the terms of Cytomine, and what exports to GeoJSON are wont to say.
CLASS_KEYS = (
    "label", "class", "class_name", "className", "classname", "Classification", "Class",
    "annotation_type", "term", "terms", "category", "title", "text", "group",
)  # fmt: skip

MAX_COORDINATE = 2**31  # the patch index holds level-0 px as int32
ELLIPSE_POINTS = 256


Role = Literal["tumour", "exclusion"]


@dataclass(frozen=True)
class Shape:
    """One shape of a file.

    Attributes
    ----------
    name : str
        For messages.
    classes : tuple of str
        Its class, then what that is a part of (ASAP's parents of groups) or derived from
        (QuPath's "Tumor: Necrosis" of "Tumor"), the nearest first; empty for a shape without one.
    rings : tuple of float64 arrays, shape (n, 2)
        Outer ring and holes; empty where its kind has no area or is nothing that a person drew.
    kind : str
        "area", or what else it is: "point", "line", "cell" ...
    role : "tumour", "exclusion" or None
        Set where the format itself says.
    layer : str or None
        An exclusion cuts the shapes of its own layer; without one, all of the file.
    label : str
        What the shape is called, where its format has names beside classes.
    """

    name: str
    classes: tuple[str, ...]
    rings: tuple[np.ndarray, ...] = ()
    kind: str = "area"
    role: Role | None = None
    layer: str | None = None
    label: str = ""

    @property
    def group(self) -> str:
        """Its own class; '' is none."""
        return self.classes[0] if self.classes else ""


def recognise(path: Path) -> tuple[Callable[..., Iterator[Shape]], object]:
    """Parser and parsed document of a file."""
    try:
        data = _unpacked(path.read_bytes())
    except OSError as error:
        raise AnnotationError(f"cannot be read: {error.strerror or error}") from error
    if data.lstrip(b"\xef\xbb\xbf\xff\xfe\x00 \t\r\n")[:1] in (b"{", b"["):
        return _recognise_json(data)
    return _recognise_xml(data)


def _unpacked(data: bytes) -> bytes:
    try:
        if data.startswith(b"\x1f\x8b"):
            return gzip.decompress(data)
        if data.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if len(names := archive.namelist()) != 1:
                    raise AnnotationError(
                        f"is a zip archive of {len(names)} files, not of one annotation:"
                        f" {', '.join(names[:4])}"
                    )
                return archive.read(names[0])
    except (gzip.BadGzipFile, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError) as error:
        raise AnnotationError(f"is packed and cannot be unpacked: {error}") from error
    return data


def _recognise_json(data: bytes):
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise AnnotationError(f"is no JSON: {error}") from error
    if isinstance(document, list) or "type" in document:
        return geojson_shapes, document
    if "positive" in document or "negative" in document:
        return ncrf_shapes, document
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
        return _layered_shapes, root
    raise AnnotationError(
        f"is XML with the root {root.tag!r}: ASAP has 'ASAP_Annotations', ImageScope and HALO"
        " 'Annotations'"
    )


def _asap_shapes(root) -> Iterator[Shape]:
    parents = {
        group.get("Name", ""): group.get("PartOfGroup", "None")
        for group in root.iterfind("AnnotationGroups/Group")
    }
    for number, element in enumerate(root.iterfind("Annotations/Annotation"), 1):
        name = _named(number, element.get("Name"))
        classes = _asap_classes(element.get("PartOfGroup", "None"), parents)
        kind = element.get("Type")
        if kind in ASAP_NO_AREAS:
            yield Shape(name, classes, kind=ASAP_NO_AREAS[kind])
            continue
        if kind not in ASAP_AREAS:
            known = ", ".join((*ASAP_AREAS, *ASAP_NO_AREAS))
            raise AnnotationError(f"{name}: its Type is {kind!r}, not one of {known}")
        points = _xml_points(element.iterfind("Coordinates/Coordinate"), name)
        corners = kind == "Rectangle" and len(points) == 2
        yield Shape(name, classes, (_ring(_box_corners(points) if corners else points, name),))


def _asap_classes(group: str, parents: dict[str, str]) -> tuple[str, ...]:
    """A group and those that it is part of; "None" is no group."""
    classes: list[str] = []
    while group not in ("", "None", *classes):
        classes.append(group)
        group = parents.get(group, "None")
    return tuple(classes)


def _layered_shapes(root) -> Iterator[Shape]:
    """Shapes of ImageScope's layers, and of HALO's."""
    regions = [
        (str(number), layer, region)
        for number, layer in enumerate(root.iterfind("Annotation"))
        for region in layer.iterfind("Regions/Region")
    ]
    for number, (layer_id, layer, region) in enumerate(regions, 1):
        name = _named(
            number, f"layer {layer.get('Id', layer_id)} region {region.get('Id', number)}"
        )
        classes = _layer_classes(layer, region)
        role: Role | None = "exclusion" if region.get("NegativeROA") == "1" else None
        kind = region.get("Type", "0")
        if kind in REGION_NO_AREAS:
            yield Shape(name, classes, kind=REGION_NO_AREAS[kind])
            continue
        area = REGION_AREAS.get(kind, kind.lower())
        if area not in REGION_AREAS.values():
            known = {**REGION_AREAS, **REGION_NO_AREAS}
            raise AnnotationError(f"{name}: its Type is {kind!r}, not one of {known}")
        points = _xml_points(
            (point for point in region.iterfind("Vertices/*") if point.tag in ("Vertex", "V")), name
        )
        ring = _ring(_outline(area, points), name)
        yield Shape(name, classes, (ring,), role=role, layer=layer_id)


def _outline(area: str, points: list[list[float]]) -> list[list[float]] | np.ndarray:
    """A region's outline; edited ones have many vertices under the types of boxes, too."""
    if area == "rectangle" and len(points) == 2:
        return _box_corners(points)
    if area == "ellipse" and len(points) in (2, 4):
        return _box_ellipse(points)
    return points


def _layer_classes(layer, region) -> tuple[str, ...]:
    """The layer's name, else the region's text or attribute, else the layer's attribute."""
    if own := layer.get("Name") or region.get("Text"):
        return (own,)
    values = [a.get("Value", "") for a in region.iterfind("Attributes/Attribute")]
    if own := next(filter(None, values), ""):
        return (own,)
    for attribute in layer.iterfind("Attributes/Attribute"):
        # ImageScope's own attribute is called Description; the name of another may be the class.
        name = attribute.get("Name", "")
        found = (attribute.get("Value", ""), "" if name == "Description" else name)
        if classes := tuple(filter(None, found)):
            return classes
    return ()


def geojson_shapes(document) -> Iterator[Shape]:
    """Shapes of parsed GeoJSON, in the file's order; an `AnnotationError` names a malformed one."""
    for number, feature in enumerate(_geojson_features(document), 1):
        name = _named(number, feature.get("id"))
        properties = _mapping(feature, "properties", name)
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
            kind = str(_mapping(feature, "geometry", name).get("type"))
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
    classification = properties.get("classification")
    if isinstance(classification, dict):
        classification = classification.get("names") or classification.get("name")
    elif classification is not None and not isinstance(classification, (str, list)):
        raise AnnotationError(
            f"{name}: 'classification' is {_short(classification)}, not an object or a name"
        )
    if isinstance(classification, list):
        classification = ": ".join(map(str, classification))
    if classification:
        parts = str(classification).split(": ")
        return tuple(": ".join(parts[:n]) for n in range(len(parts), 0, -1))
    for key in CLASS_KEYS:
        value = properties.get(key)
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
        raise AnnotationError(f"holds {_short(node)} where a GeoJSON object belongs")
    elif node.get("type") == "FeatureCollection":
        yield from _geojson_features(_listed(node, "features", "the FeatureCollection"))
    elif node.get("type") == "Feature":
        yield node
        for holder in (node, node.get("properties")):
            if isinstance(holder, dict) and holder.get("childObjects"):
                yield from _geojson_features(_listed(holder, "childObjects", "a Feature"))
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


def ncrf_shapes(document) -> Iterator[Shape]:
    """Shapes of parsed NCRF JSON; an `AnnotationError` names a malformed one."""
    roles: dict[str, Role] = {"positive": "tumour", "negative": "exclusion"}
    for group, role in roles.items():
        for number, entry in enumerate(_listed({group: [], **document}, group, "NCRF"), 1):
            name = f"{group} {number}"
            vertices = _listed(entry, "vertices", name)
            yield Shape(name, (group,), (_ring(vertices, name),), role=role)


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
