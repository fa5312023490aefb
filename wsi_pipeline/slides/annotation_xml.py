"""XML of ASAP, Aperio ImageScope and HALO, parsed to shapes; and ASAP's, written."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import shapely

from wsi_pipeline.errors import AnnotationError
from wsi_pipeline.files import replace_atomically
from wsi_pipeline.slides.annotation_shapes import Role, Shape, named, ring_of

ASAP_EXCLUSION = "Exclusion"
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
ELLIPSE_POINTS = 256


def refuse_unread(root, path: str, program: str) -> None:
    """Refuse XML that has coordinates elsewhere than where its program writes them."""
    read = len(root.findall(path))
    there = sum("X" in element.attrib or "x" in element.attrib for element in root.iter())
    if there > read:
        raise AnnotationError(
            f"has {there} points, of which {read} lie where {program} writes them ({path}): it is"
            " of another form"
        )


def asap_shapes(root) -> Iterator[Shape]:
    """Shapes of ASAP's XML, in the file's order; an `AnnotationError` names a malformed one."""
    refuse_unread(root, "Annotations/Annotation/Coordinates/Coordinate", "ASAP")
    parents = {
        group.get("Name", ""): group.get("PartOfGroup", "None")
        for group in root.iterfind("AnnotationGroups/Group")
    }
    for number, element in enumerate(root.iterfind("Annotations/Annotation"), 1):
        name = named(number, element.get("Name"))
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
        yield Shape(name, classes, (ring_of(_box_corners(points) if corners else points, name),))


def _asap_classes(group: str, parents: dict[str, str]) -> tuple[str, ...]:
    """A group and those that it is part of; "None" is no group."""
    classes: list[str] = []
    while group not in ("", "None", *classes):
        classes.append(group)
        group = parents.get(group, "None")
    return tuple(classes)


def layered_shapes(root) -> Iterator[Shape]:
    """Shapes of ImageScope's layers, and of HALO's."""
    refuse_unread(root, "Annotation/Regions/Region/Vertices/*", "ImageScope")
    regions = [
        (str(number), layer, region)
        for number, layer in enumerate(root.iterfind("Annotation"))
        for region in layer.iterfind("Regions/Region")
    ]
    for number, (layer_id, layer, region) in enumerate(regions, 1):
        name = named(number, f"layer {layer.get('Id', layer_id)} region {region.get('Id', number)}")
        classes = _layer_classes(layer, region)
        negative = region.get("NegativeROA", "").lower() in ("1", "true")
        role: Role | None = "exclusion" if negative else None
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
        ring = ring_of(_outline(area, points), name)
        yield Shape(name, classes, (ring,), role=role, layer=layer_id)


def _outline(area: str, points: list[list[float]]) -> list[list[float]] | np.ndarray:
    """A region's outline; edited ones have many vertices under the types of boxes, too."""
    if area == "rectangle" and len(points) == 2:
        return _box_corners(points)
    if area == "ellipse" and len(points) in (2, 4):
        return _box_ellipse(points)
    return points


def _layer_classes(layer, region) -> tuple[str, ...]:
    """The layer's name, else the region's text and attributes, then the layer's attributes."""
    if own := layer.get("Name"):
        return (own,)
    found = [region.get("Text", "")]
    found += [a.get("Value", "") for a in region.iterfind("Attributes/Attribute")]
    for attribute in layer.iterfind("Attributes/Attribute"):
        # ImageScope's own attribute is called Description; the name of another may be the class.
        name = attribute.get("Name", "")
        found += [attribute.get("Value", ""), "" if name == "Description" else name]
    return tuple(filter(None, found))


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


def _box_corners(points) -> np.ndarray:
    (x0, y0), (x1, y1) = np.min(points, axis=0), np.max(points, axis=0)
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _box_ellipse(points) -> np.ndarray:
    """Polygon of the ellipse that the points' bounding box holds."""
    low, high = np.min(points, axis=0), np.max(points, axis=0)
    angle = np.linspace(0, 2 * np.pi, ELLIPSE_POINTS, endpoint=False)
    return (low + high) / 2 + (high - low) / 2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)


@dataclass(frozen=True, eq=False)
class AsapShape:
    """A shape to be written: its name, its group, ASAP's type, and its points in level-0 px."""

    name: str
    group: str
    kind: Literal["Polygon", "Dot"]
    points: Sequence[tuple[float, float]]


def write_asap_shapes(
    path: str | Path, shapes: Sequence[AsapShape], groups: Mapping[str, tuple[str, str]]
) -> None:
    """Write shapes as ASAP XML, whole or not at all.

    Parameters
    ----------
    path : path-like
    shapes : sequence of AsapShape
    groups : mapping of str to (str, str)
        Of each group of the shapes, the group that it is part of ("None": of none) and its colour
        (``#RRGGBB``).
    """
    root = ElementTree.Element("ASAP_Annotations")
    annotations = ElementTree.SubElement(root, "Annotations")
    listed = ElementTree.SubElement(root, "AnnotationGroups")
    for name, (parent, colour) in groups.items():
        ElementTree.SubElement(listed, "Group", Name=name, PartOfGroup=parent, Color=colour)
    for shape in shapes:
        about = {"Name": shape.name, "Type": shape.kind, "PartOfGroup": shape.group}
        element = ElementTree.SubElement(
            annotations, "Annotation", {**about, "Color": groups[shape.group][1]}
        )
        points = ElementTree.SubElement(element, "Coordinates")
        for order, (x, y) in enumerate(shape.points):
            place = {"Order": str(order), "X": repr(float(x)), "Y": repr(float(y))}
            ElementTree.SubElement(points, "Coordinate", place)
    ElementTree.indent(root)
    with replace_atomically(path) as part:
        ElementTree.ElementTree(root).write(part, encoding="utf-8", xml_declaration=True)


def write_asap_xml(
    path: str | Path, polygons: Sequence[shapely.Polygon], group: str = "Tumor"
) -> None:
    """Write polygons as ASAP XML: outer rings in `group`, holes in the group "Exclusion".

    Parameters
    ----------
    path : path-like
    polygons : sequence of shapely.Polygon
        Level-0 px.
    group : str

    Raises
    ------
    AnnotationError
        If a polygon lies in a hole of another: exclusions cut everything, so it would be lost.
    """
    holes = [shapely.Polygon(ring) for polygon in polygons for ring in polygon.interiors]
    if shapely.union_all(polygons).intersection(shapely.union_all(holes)).area > 0:
        raise AnnotationError(
            f"{path}: a polygon lies in a hole of another, which ASAP's exclusions cannot say"
        )
    members = [*((group, of) for of in polygons), *((ASAP_EXCLUSION, of) for of in holes)]
    shapes = [
        AsapShape(f"Annotation {number}", of, "Polygon", polygon.exterior.coords[:-1])
        for number, (of, polygon) in enumerate(members)
    ]
    write_asap_shapes(path, shapes, dict.fromkeys((group, ASAP_EXCLUSION), ("None", "#64FE2E")))
