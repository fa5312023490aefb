"""Annotation files of five kinds, brought to one form: lesions as polygons in level-0 px.

ASAP XML (CAMELYON), GeoJSON (QuPath, Digital Slide Archive and others), Aperio ImageScope XML,
HALO's XML and NCRF JSON are told apart by their content. A shape is tumour, cut out of the tumour,
or left out (and counted), by its class. What a file without lesions means is said, not guessed:
nothing was drawn, or something that cannot be used, or the slide is normal.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import shapely
from shapely.affinity import affine_transform
from shapely.validation import explain_validity

from wsi_pipeline.errors import AnnotationError
from wsi_pipeline.slides.annotation_files import ncrf_shapes, recognise
from wsi_pipeline.slides.annotation_shapes import Shape

MIN_LESION_PX = 1.0  # less than a level-0 pixel is a sliver between two outlines, not a lesion
TOUCH_RADIUS_PX = 0.5

State = Literal["lesions", "normal", "nothing", "unusable", "unknown classes"]


class OffSlideError(AnnotationError):
    """All lesions of a file lie off its slide.

    Attributes
    ----------
    drawn : shapely.Geometry
        The tumour, in the file's own coordinates.
    """

    def __init__(self, message: str, drawn: shapely.Geometry):
        super().__init__(message)
        self.drawn = drawn

    def __reduce__(self):
        return type(self), (*self.args, self.drawn)


@dataclass(frozen=True)
class Annotation:
    """What one annotation file says about its slide.

    Attributes
    ----------
    lesions : tuple of shapely.Polygon
        Connected regions of tumour, level-0 px, exclusions and holes taken out, ordered by the
        upper left corner of their bounding boxes (top to bottom, then left to right). A lesion's
        id is its position + 1. Lesions neither overlap nor touch.
    state : str
        "lesions"; or, without any, "normal" (NCRF's outlines of tissue without tumour, the one
        format that says so), "nothing" (no shape, or only of classes that the settings ignore),
        "unknown classes" (areas of classes that the settings do not name) or "unusable" (shapes
        without area: points, lines, cells that QuPath found).
    repairs : tuple of str
        What was mended or clipped, and classes that count as those that they are part of.
    doubts : tuple of str
        What may be read in another way than its author meant.
    left_out : dict of (str, str) to int
        Number of shapes left out, by kind ("area", "point", "cell" ...) and class: areas of
        classes that the settings do not name, and whatever has no area. '' is no class.
    marks_tumour : int
        How many of those are of a class that is tumour.
    drawn, placed : shapely.Geometry, optional
        The tumour in the file's own coordinates, and in level-0 px before it was clipped.
    """

    lesions: tuple[shapely.Polygon, ...] = ()
    state: State = "nothing"
    repairs: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    left_out: Mapping[tuple[str, str], int] = field(default_factory=dict)
    marks_tumour: int = 0
    drawn: shapely.Geometry | None = None
    placed: shapely.Geometry | None = None

    @property
    def met(self) -> str:
        """What was left out, in words."""
        return ", ".join(
            f"{_number(n, kind)} {f'of class {group!r}' if group else 'without a class'}"
            for (kind, group), n in self.left_out.items()
        )

    @property
    def notes(self) -> list[str]:
        """What a reader should know: repairs, and what was left out."""
        return [*self.repairs, *([f"{self.met}: left out"] if self.left_out else [])]

    @property
    def unknown_classes(self) -> str:
        """The classes of its areas that the settings do not name, and what to do about them."""
        classes = [group for kind, group in self.left_out if kind == "area"]
        return (
            f"none of its classes {classes} is tumour: name them in catalog.annotation.positive,"
            " or in catalog.annotation.ignored where they are none"
        )


def read_annotation(
    path: str | Path,
    *,
    positive: Iterable[str],
    exclusion: Iterable[str],
    ignored: Iterable[str] = (),
    to_level0: Sequence[float] = (1, 0, 0, 1, 0, 0),
    size: tuple[int, int] | None = None,
) -> Annotation:
    """Read an annotation file of any of the five formats.

    Tumour is the union of the `positive` shapes minus the union of the `exclusion` shapes; its
    connected components are the lesions (also where a single point connects them). Rings that
    cross themselves are repaired (`shapely.make_valid`, which keeps all that the ring winds
    around) and reported.

    A shape's class may be part of another or derived from it: the first of these that the settings
    name decides.

    - ASAP XML: Polygon, Spline and Rectangle have an area. A spline's points are joined by
      straight lines, as ASAP itself does when it writes masks (its ``AnnotationToMask``). The
      class is the shape's group, then the groups that it is part of; "None" is no group.
    - GeoJSON: a FeatureCollection, a Feature, a geometry, or a list of these, and what lies in
      ``childObjects``. The class is QuPath's ``classification``; its derived class "Tumor:
      Necrosis" derives from "Tumor". Other programs have it in ``label`` (Digital Slide Archive)
      or another key, see `annotation_geojson.CLASS_KEYS`. What QuPath found (cells, detections,
      tiles, TMA cores) is no annotation. An object's name counts where no shape has a class and
      the settings name it.
    - ImageScope and HALO XML: the class is the layer's name, else the region's text or
      attribute, else the value or the name of the layer's attribute. ``NegativeROA`` is an
      exclusion from its own layer.
    - NCRF JSON: ``positive`` is tumour and ``negative`` an exclusion, whatever their names.

    Parameters
    ----------
    path : path-like
        May be packed, by gzip or in a zip archive of one file.
    positive, exclusion : iterables of str
        Names of classes, case ignored. '' is a shape without one; beside other names it counts
        only in a file in which no shape has a class.
    ignored : iterable of str
        Names of classes that are known and not tumour.
    to_level0 : sequence of 6 floats
        From the file's coordinates to level-0 px, as `shapely.affinity.affine_transform` has it:
        ``(1, 0, 0, 1, x, y)`` where the file counts from the bounds' corner (x, y), see
        `wsi_pipeline.slides.annotation_origin`.
    size : (int, int), optional
        Width and height of the slide, level-0 px: lesions are clipped to it.

    Raises
    ------
    AnnotationError
        If the file is malformed, or if nothing is left of the tumour shapes that it holds.
    OffSlideError
        If all lesions lie off the slide.
    """
    path = Path(path)
    try:
        parse, document = recognise(path)
        shapes = list(parse(document))
        repairs: list[str] = []
        doubts: list[str] = []
        positive = [*positive]
        roles = _roles(shapes, positive, [*exclusion], [*ignored], repairs, doubts)
        tumour = _tumour(shapes, roles, repairs)
        placed = affine_transform(tumour, to_level0)
        lesions = _lesions(_clip(placed, size, repairs, tumour), repairs)
        if "tumour" in roles and not lesions:
            number = roles.count("tumour")
            raise AnnotationError(
                "; ".join([f"no area is left of its {number} tumour shapes", *repairs])
            )
    except OffSlideError as error:
        raise OffSlideError(f"{path}: {error}", error.drawn) from error
    except (AnnotationError, shapely.errors.GEOSException, RecursionError) as error:
        raise AnnotationError(f"{path}: {error}") from error
    used = ("tumour", "exclusion", "ignored")
    others = [s for s, role in zip(shapes, roles, strict=True) if role not in used]
    normal = parse is ncrf_shapes and shapes
    return Annotation(
        lesions=lesions,
        state="normal" if normal and not lesions else _state(shapes, roles, lesions),
        repairs=tuple(repairs),
        left_out=dict(Counter((shape.kind, shape.group) for shape in others)),
        doubts=(*doubts, *_nearly_tumour(others, positive)),
        marks_tumour=roles.count("marks tumour"),
        drawn=tumour,
        placed=placed,
    )


def _spelling(name: str) -> str:
    """A class's name without what does not tell it from another: case and spaces."""
    return " ".join(name.casefold().split())


def _number(n: int, kind: str) -> str:
    """So many of a kind: "2 areas", "2 sets of points"."""
    noun, *rest = kind.split(" of ")
    return " of ".join([f"{n} {noun}{'s' * (n > 1)}", *rest])


def _roles(shapes: list[Shape], positive, exclusion, ignored, repairs, doubts) -> list[str | None]:
    """Tell of each shape what it is: tumour, exclusion, a mark of tumour, ignored, or None."""
    by_class = {_spelling(name): "ignored" for name in ignored}
    by_class |= {_spelling(name): "exclusion" for name in exclusion}
    by_class |= {_spelling(name): "tumour" for name in positive}
    classes = [shape.classes for shape in shapes]
    if not any(classes):  # then objects may be told apart by their names
        classes = [(s.label,) if s.label and _spelling(s.label) in by_class else () for s in shapes]
        if labels := sorted({s.label for s in shapes if s.label}):
            read = "read as such where the settings name them" if any(classes) else "not read"
            doubts.append(f"no shape has a class; their names {labels} are {read}")
    if len(set(positive)) > 1 and any(classes):
        by_class.pop("", None)  # where others have classes, a shape without one says nothing
    roles: list[str | None] = []
    counts_as: Counter[tuple[str, str]] = Counter()
    for shape, of_shape in zip(shapes, classes, strict=True):
        known = [_spelling(name) for name in of_shape or ("",) if _spelling(name) in by_class]
        role = by_class[known[0]] if known else None
        if known and of_shape and known[0] != _spelling(of_shape[0]):
            counts_as[of_shape[0], known[0]] += 1
        if not shape.rings and role != "ignored":
            role = "marks tumour" if role == "tumour" else None
        roles.append(shape.role or role)
    repairs += [f"{n} of class {own!r} count as {other!r}" for (own, other), n in counts_as.items()]
    return roles


def _nearly_tumour(others: list[Shape], positive: list[str]) -> list[str]:
    """Classes that are left out although they hold the name of one that is tumour."""
    names = {_spelling(name) for name in positive} - {""}
    found = dict.fromkeys(
        shape.group
        for shape in others
        if shape.rings and any(name in _spelling(shape.group) for name in names)
    )
    return [
        f"class {group!r} is left out: name it in catalog.annotation.positive if it is tumour, else"
        " in catalog.annotation.ignored"
        for group in found
    ]


def _state(shapes: list[Shape], roles: list[str | None], lesions) -> State:
    if lesions:
        return "lesions"
    known = ("ignored", "exclusion")  # without tumour, exclusions cut nothing
    met = [shape for shape, role in zip(shapes, roles, strict=True) if role not in known]
    if not met:
        return "nothing"
    return "unknown classes" if any(shape.rings for shape in met) else "unusable"


def _tumour(shapes: list[Shape], roles: list[str | None], repairs: list[str]) -> shapely.Geometry:
    """The union of tumour without the exclusions, those of a layer from that layer alone."""
    areas: dict = defaultdict(list)
    for shape, role in zip(shapes, roles, strict=True):
        if role in ("tumour", "exclusion"):
            own = shape.layer if shape.role or role == "tumour" else None
            areas[role, own].append(_polygon(shape, repairs))
    layers = [
        shapely.union_all(polygons).difference(shapely.union_all(areas.get(("exclusion", of), [])))
        for (role, of), polygons in list(areas.items())
        if role == "tumour"
    ]
    everywhere = shapely.union_all(areas.get(("exclusion", None), []))
    return shapely.union_all(layers).difference(everywhere)


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


def _clip(tumour: shapely.Geometry, size, repairs: list[str], drawn) -> shapely.Geometry:
    if size is None or tumour.is_empty:
        return tumour
    slide = shapely.box(0, 0, *size)
    if slide.contains(tumour):
        return tumour
    inside = _areas(tumour.intersection(slide))
    if inside.area == 0:
        x0, y0, x1, y1 = tumour.bounds
        raise OffSlideError(
            f"its lesions lie at x {x0:.0f} to {x1:.0f}, y {y0:.0f} to {y1:.0f}, all off the slide"
            f" of {size[0]} x {size[1]} px",
            drawn,
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
