"""Annotation files of four kinds, brought to one form: lesions as polygons in level-0 px.

ASAP XML (CAMELYON), GeoJSON (QuPath, Digital Slide Archive), Aperio ImageScope XML and NCRF
JSON are told apart by their content. A shape is tumour, cut out of the tumour, or ignored (and
counted), by the name of its group or class.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import shapely
from shapely.affinity import translate
from shapely.validation import explain_validity

from wsi_pipeline.errors import AnnotationError
from wsi_pipeline.slides.annotation_files import Shape, geojson_shapes, recognise

MIN_LESION_PX = 1.0  # less than a level-0 pixel is a sliver between two outlines, not a lesion
TOUCH_RADIUS_PX = 0.5


@dataclass(frozen=True)
class Annotation:
    """What one annotation file says about its slide.

    Parameters
    ----------
    lesions : tuple of shapely.Polygon
        Connected regions of tumour, level-0 px, exclusions and holes taken out, ordered by the
        upper left corner of their bounding boxes (top to bottom, then left to right). A lesion's
        id is its position + 1. Lesions neither overlap nor touch.
    repairs : tuple of str
        What was mended or clipped, each with the shape and its area before and after.
    ignored : dict of str to int
        Number of shapes left out, by group: those of groups that the settings do not name, and
        dots, points and lines, which have no area. '' is the group of shapes without one.
    """

    lesions: tuple[shapely.Polygon, ...]
    repairs: tuple[str, ...]
    ignored: dict[str, int]

    @property
    def notes(self) -> list[str]:
        """What a reader should know: repairs, and what was left out."""
        return [
            *self.repairs,
            *(f"{n} shapes of group {group!r} ignored" for group, n in self.ignored.items()),
        ]


def read_annotation(
    path: str | Path,
    *,
    positive: Iterable[str],
    exclusion: Iterable[str],
    offset: tuple[float, float] = (0, 0),
    size: tuple[int, int] | None = None,
) -> Annotation:
    """Read an annotation file of any of the four formats.

    Tumour is the union of the `positive` shapes minus the union of the `exclusion` shapes; its
    connected components are the lesions (also where a single point connects them). Rings that
    cross themselves are repaired (`shapely.make_valid`, which keeps all that the ring winds
    around) and reported.

    - ASAP XML: Polygon, Spline and Rectangle have an area. A spline's points are joined by
      straight lines, as ASAP itself does when it writes masks (its ``AnnotationToMask``). The
      group is the shape's own; "None" is no group; parents of groups do not count.
    - GeoJSON: a FeatureCollection, a Feature, a geometry, or a list of these; the class is
      ``classification.name`` (QuPath) or ``label`` (Digital Slide Archive).
    - ImageScope XML: the class is the layer's name, else the region's text, else the layer's
      attribute where it is not ImageScope's own "Description"; ``NegativeROA`` is an exclusion.
    - NCRF JSON: ``positive`` is tumour and ``negative`` an exclusion, whatever their names.

    Parameters
    ----------
    path : path-like
    positive, exclusion : iterables of str
        Names of groups or classes, case ignored. '' is a shape without one; beside other names it
        counts only in a file in which no shape has a name.
    offset : (float, float)
        Added to every vertex, level-0 px: the corner of the bounds where the file counts
        from there (see `uses_bounds_origin`).
    size : (int, int), optional
        Width and height of the slide, level-0 px: lesions are clipped to it.

    Raises
    ------
    AnnotationError
        If the file is malformed; if it holds areas but `positive` selects none of them (NCRF,
        whose format says what is tumour, is exempt); if nothing is left of those selected; or
        if all of them lie off the slide. A file without any area has no lesions and is no error.
    """
    path = Path(path)
    try:
        parse, document = recognise(path)
        shapes = list(parse(document))
        roles = _roles(shapes, positive, exclusion)
        repairs: list[str] = []
        areas = {"tumour": [], "exclusion": []}
        for shape, role in zip(shapes, roles, strict=True):
            if role is not None:
                areas[role].append(_polygon(shape, repairs))
        tumour = shapely.union_all(areas["tumour"]).difference(
            shapely.union_all(areas["exclusion"])
        )
        lesions = _lesions(_clip(translate(tumour, *offset), size, repairs), repairs)
        if areas["tumour"] and not lesions:
            raise AnnotationError(
                "; ".join(
                    [f"no area is left of its {len(areas['tumour'])} tumour shapes", *repairs]
                )
            )
    except (AnnotationError, shapely.errors.GEOSException, RecursionError) as error:
        raise AnnotationError(f"{path}: {error}") from error
    ignored = Counter(s.group for s, role in zip(shapes, roles, strict=True) if role is None)
    return Annotation(lesions, tuple(repairs), dict(ignored))


def uses_bounds_origin(path: str | Path) -> bool:
    """Whether the file's format counts from the scanned bounds, not from the level-0 frame.

    QuPath crops a slide to its bounds before anything is drawn, so GeoJSON counts from there.

    Raises
    ------
    AnnotationError
        If the file is in none of the four formats.
    """
    path = Path(path)
    try:
        return recognise(path)[0] is geojson_shapes
    except AnnotationError as error:
        raise AnnotationError(f"{path}: {error}") from error


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
    root = ElementTree.Element("ASAP_Annotations")
    annotations = ElementTree.SubElement(root, "Annotations")
    groups = ElementTree.SubElement(root, "AnnotationGroups")
    for name, members in ((group, polygons), ("Exclusion", holes)):
        ElementTree.SubElement(groups, "Group", Name=name, PartOfGroup="None", Color="#64FE2E")
        for polygon in members:
            shape = ElementTree.SubElement(
                annotations,
                "Annotation",
                Name=f"Annotation {len(annotations)}",
                Type="Polygon",
                PartOfGroup=name,
                Color="#F4FA58",
            )
            points = ElementTree.SubElement(shape, "Coordinates")
            for order, (x, y) in enumerate(polygon.exterior.coords[:-1]):
                ElementTree.SubElement(
                    points, "Coordinate", Order=str(order), X=repr(float(x)), Y=repr(float(y))
                )
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def _roles(shapes: list[Shape], positive, exclusion) -> list[str | None]:
    """Tell of each shape: tumour, exclusion, or None where it is ignored."""
    by_group = {name.casefold(): "exclusion" for name in exclusion}
    by_group |= {name.casefold(): "tumour" for name in positive}
    if len(set(positive)) > 1 and any(s.group for s in shapes if s.rings and s.role is None):
        by_group.pop("", None)  # where others have names, a shape without one says nothing
    roles = [
        (shape.role or by_group.get(shape.group.casefold())) if shape.rings else None
        for shape in shapes
    ]
    chosen_by_name = Counter(s.group for s in shapes if s.rings and s.role is None)
    if chosen_by_name and "tumour" not in roles:
        raise AnnotationError(
            f"none of its groups {dict(chosen_by_name)} is tumour: name them in"
            f" catalog.annotation.positive, which is {list(positive)}"
        )
    return roles


def _polygon(shape: Shape, repairs: list[str]) -> shapely.Geometry:
    polygon = shapely.Polygon(shape.rings[0], shape.rings[1:])
    if polygon.is_valid:
        return polygon
    # "structure" keeps all that a ring winds around; "linework" would punch a hole where a
    # hand-drawn outline overlaps its own beginning.
    mended = _areas(shapely.make_valid(polygon, method="structure", keep_collapsed=False))
    repairs.append(
        f"{shape.name}: {explain_validity(polygon)}, repaired: area {polygon.area:.1f} ->"
        f" {mended.area:.1f} px" + ("" if mended.area else ", left out")
    )
    return mended


def _areas(geometry: shapely.Geometry) -> shapely.Geometry:
    """Polygons of a geometry, without points and lines."""
    parts = shapely.get_parts(geometry)
    return shapely.union_all(parts[shapely.get_dimensions(parts) == 2])


def _clip(tumour: shapely.Geometry, size, repairs: list[str]) -> shapely.Geometry:
    if size is None or tumour.is_empty:
        return tumour
    slide = shapely.box(0, 0, *size)
    if slide.contains(tumour):
        return tumour
    inside = _areas(tumour.intersection(slide))
    if inside.area == 0:
        x0, y0, x1, y1 = tumour.bounds
        raise AnnotationError(
            f"its lesions lie at x {x0:.0f} to {x1:.0f}, y {y0:.0f} to {y1:.0f}, all off the slide"
            f" of {size[0]} x {size[1]} px: is it another slide's, or drawn at another scale?"
        )
    repairs.append(
        f"clipped to the slide's {size[0]} x {size[1]} px: area {tumour.area:.1f} ->"
        f" {inside.area:.1f} px"
    )
    return inside


def _lesions(tumour: shapely.Geometry, repairs: list[str]) -> tuple[shapely.Polygon, ...]:
    parts = shapely.get_parts(_join_touching(tumour, repairs))
    large = shapely.area(parts) >= MIN_LESION_PX
    if not large.all():
        repairs.append(
            f"{(~large).sum()} slivers under {MIN_LESION_PX:g} px left out, together"
            f" {shapely.area(parts[~large]).sum():.3g} px"
        )
    x0, y0, x1, y1 = shapely.bounds(parts[large]).T
    return tuple(parts[large][np.lexsort((x1, y1, x0, y0))])


def _join_touching(tumour: shapely.Geometry, repairs: list[str]) -> shapely.Geometry:
    """Join regions that touch in a point, by a disc of one px across.

    The repair of an outline that crosses itself splits it at the crossing, often into a lesion
    and a speck of a loop: still one lesion, which is one connected region.
    """
    parts = shapely.get_parts(tumour)
    first, second = shapely.STRtree(parts).query(parts, predicate="touches")
    once = first < second
    if not once.any():
        return tumour
    points = shapely.intersection(parts[first[once]], parts[second[once]])
    repairs.append(f"{len(points)} pairs of regions that touch in a point joined there")
    return shapely.union_all([tumour, *shapely.buffer(points, TOUCH_RADIUS_PX)])
