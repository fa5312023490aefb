"""The outlines of a slide: where there is tissue, tumour, a fold or a stroke of the pen."""

from dataclasses import dataclass

import numpy as np
import shapely
from scipy.spatial.distance import pdist
from shapely.affinity import scale, translate

from wsi_pipeline.errors import ConfigError
from wsi_pipeline.phantom.plan import SlidePlan, generator

TWO_PIECES_FROM_UM = 2500.0
TISSUE_DETAIL_UM = 60.0  # wavelength of the finest detail of an outline
ROOM = 2.5  # a piece is at least so many times as wide as its largest lesion is long
CLEARANCE_UM = 40.0  # between a lesion and the edge of the tissue, or another lesion
NAEVUS_APART_UM = 100.0  # from a lesion: the 75 um of FROC do not reach it
ARRANGEMENTS = 20  # of the lesions, tried until one fits
AGGREGATES_PER_MM2 = 4.0
HOLE_FROM_UM = 450.0  # lesions from this size on may surround an island of normal tissue
# Optical densities of inks that markers leave on the glass.
INKS = {"blue": (1.6, 1.0, 0.35), "green": (1.5, 0.5, 1.0), "black": (1.3, 1.3, 1.2)}


@dataclass(frozen=True)
class Layout:
    """Everything in level-0 px.

    Parameters
    ----------
    tissue : shapely.MultiPolygon
    lesions : tuple of shapely.Polygon
        Disjoint, inside the tissue, from top to bottom as `read_annotation` sorts them.
    naevi : tuple of shapely.Polygon
        Apart from the lesions and each other.
    aggregates : float64 array, shape (N, 3)
        Lymphocyte aggregates: centre x, centre y, radius.
    folds : shapely.Polygon or MultiPolygon
    pens : tuple of (shapely.Polygon, str)
        Strokes, each with the name of its ink.
    """

    tissue: shapely.MultiPolygon
    lesions: tuple[shapely.Polygon, ...]
    naevi: tuple[shapely.Polygon, ...]
    aggregates: np.ndarray
    folds: shapely.Geometry
    pens: tuple[tuple[shapely.Polygon, str], ...]

    @property
    def sheets(self) -> shapely.MultiPolygon:
        """What is made of tumour-like cells: lesions and naevi."""
        return shapely.MultiPolygon([*self.lesions, *self.naevi])


def draw_layout(plan: SlidePlan) -> Layout:
    """Outlines of a slide, decided by the plan's seed.

    Raises
    ------
    ConfigError
        If the tissue has no room for a lesion of the plan.
    """
    tissue = _tissue(plan)
    lesions = _lesions(plan, tissue)
    return Layout(
        tissue,
        lesions,
        _naevi(plan, tissue, lesions),
        _aggregates(plan, tissue, lesions),
        _folds(plan, tissue),
        _pens(plan, lesions),
    )


def _blob(
    rng: np.random.Generator, *, harmonics: int, roughness: float, decay: float
) -> shapely.Polygon:
    """A star-shaped outline around (0, 0), whose log radius is noise with a falling spectrum."""
    order = np.arange(harmonics + 1)
    amplitude = np.where(order < 2, 0, np.maximum(order, 1.0) ** -decay)
    spectrum = amplitude * np.exp(2j * np.pi * rng.random(order.size)) * rng.rayleigh(1, order.size)
    vertices = 8 * harmonics
    wave = np.fft.irfft(spectrum, vertices)
    radius = np.exp(roughness * wave / wave.std())
    angle = np.arange(vertices) * 2 * np.pi / vertices
    return shapely.Polygon(np.column_stack([radius * np.cos(angle), radius * np.sin(angle)]))


def _tissue(plan: SlidePlan) -> shapely.MultiPolygon:
    """One piece, or two side by side along the longer axis of a larger slide."""
    rng = generator(plan.seed, "tissue")
    longer = int(plan.size[1] > plan.size[0])
    half_um = max(plan.size) * plan.mpp / 2
    room_for_two = half_um > max(
        [TWO_PIECES_FROM_UM / 2, *ROOM * np.array(plan.lesion_diameters_um)]
    )
    pieces = int(rng.integers(1, 3)) if room_for_two else 1
    room = np.array(plan.size, float)
    room[longer] /= pieces
    outlines = []
    for number in range(pieces):
        harmonics = max(8, int(2 * room.sum() * plan.mpp / TISSUE_DETAIL_UM))
        blob = _blob(rng, harmonics=harmonics, roughness=0.16, decay=1.5)
        box = np.reshape(blob.bounds, (2, 2))
        blob = scale(
            blob, *(room * rng.uniform(0.86, 0.94, 2) / np.ptp(box, axis=0)), origin=(0, 0)
        )
        centre = np.reshape(blob.bounds, (2, 2)).mean(axis=0)
        target = room / 2
        target[longer] += number * room[longer]
        outlines.append(translate(blob, *(target - centre)))
    return shapely.MultiPolygon(outlines)


def _lesions(plan: SlidePlan, tissue: shapely.MultiPolygon) -> tuple[shapely.Polygon, ...]:
    inside = tissue.buffer(-CLEARANCE_UM / plan.mpp)
    rng = generator(plan.seed, "lesions")
    return _arranged(plan, "lesions", plan.lesion_diameters_um, inside, rng)


def _naevi(plan: SlidePlan, tissue, lesions) -> tuple[shapely.Polygon, ...]:
    around = [
        shapely.Polygon(lesion.exterior).buffer(NAEVUS_APART_UM / plan.mpp) for lesion in lesions
    ]
    free = tissue.buffer(-CLEARANCE_UM / plan.mpp).difference(shapely.union_all(around))
    rng = generator(plan.seed, "naevi")
    return _arranged(plan, "naevi", plan.naevus_diameters_um, free, rng)


def _arranged(plan: SlidePlan, what: str, diameters_um, free, rng) -> tuple[shapely.Polygon, ...]:
    for _ in range(ARRANGEMENTS):
        blobs = _arrange(plan, diameters_um, free, rng)
        if len(blobs) == len(diameters_um):
            return tuple(sorted(blobs, key=lambda blob: (blob.bounds[1], blob.bounds[0])))
    raise ConfigError(
        f"{plan.slide_id}: no room for {what} of {', '.join(map(str, diameters_um))} um in the"
        f" tissue of {plan.size[0]} x {plan.size[1]} px at {plan.mpp} um per px: make the slide"
        " larger, or them smaller or fewer"
    )


def _arrange(plan: SlidePlan, diameters_um, free: shapely.Geometry, rng) -> list[shapely.Polygon]:
    """Blobs, the largest first, at random places apart from each other, while there is room."""
    blobs = []
    for diameter_um in sorted(diameters_um, reverse=True):
        blob = _place(_lesion(rng, diameter_um, plan.mpp), free, rng)
        if blob is None:
            break
        blobs.append(blob)
        free = free.difference(shapely.Polygon(blob.exterior).buffer(CLEARANCE_UM / plan.mpp))
    return blobs


def _lesion(rng: np.random.Generator, diameter_um: float, mpp: float) -> shapely.Polygon:
    """An irregular outline of the given longest diameter, perhaps around an island."""
    blob = _blob(rng, harmonics=max(6, int(diameter_um / 25)), roughness=0.11, decay=1.5)
    hull = np.asarray(blob.convex_hull.exterior.coords)
    size = diameter_um / mpp / pdist(hull).max()
    blob = scale(blob, size, size, origin=(0, 0))
    if diameter_um >= HOLE_FROM_UM and rng.random() < 0.4:
        island = _blob(rng, harmonics=8, roughness=0.1, decay=1.4)
        blob = blob.difference(scale(island, 0.25 * size, 0.25 * size, origin=(0, 0)))
    # Hundredths of a pixel: what an annotation file holds is then exactly what is drawn.
    return shapely.set_precision(blob, 0.01)


def _place(
    blob: shapely.Polygon, free: shapely.Geometry, rng: np.random.Generator, tries: int = 500
) -> shapely.Polygon | None:
    if free.is_empty:
        return None
    shapely.prepare(free)
    left, top, right, bottom = free.bounds
    for _ in range(tries):
        x, y = np.round(rng.uniform((left, top), (right, bottom)))
        placed = translate(blob, x, y)
        if free.contains(placed):
            return placed
    return None


def _aggregates(plan: SlidePlan, tissue, lesions) -> np.ndarray:
    """Some anywhere in normal tissue, some at the edge of a lesion, where they are common."""
    rng = generator(plan.seed, "lymphocytes")
    area_mm2 = tissue.area * (plan.mpp / 1000) ** 2
    tumour = shapely.union_all(lesions)
    x0, y0, x1, y1 = tissue.bounds
    found: list[tuple[float, float, float]] = []
    while len(found) < max(2, round(AGGREGATES_PER_MM2 * area_mm2)):
        x, y = rng.uniform((x0, y0), (x1, y1))
        point = shapely.Point(x, y)
        if tissue.contains(point) and not tumour.contains(point):
            found.append((x, y, rng.uniform(35, 110) / plan.mpp))
    for lesion in lesions:
        x, y = lesion.exterior.interpolate(rng.random(), normalized=True).coords[0]
        found.append((x, y, rng.uniform(30, 70) / plan.mpp))
    return np.array(found)


def _folds(plan: SlidePlan, tissue) -> shapely.Geometry:
    rng = generator(plan.seed, "folds")
    strokes = [
        _stroke(rng, tissue.bounds, rng.uniform(0.25, 0.5)).buffer(rng.uniform(8, 18) / plan.mpp)
        for _ in range(rng.integers(0, 3))
    ]
    return shapely.union_all(strokes)


def _pens(plan: SlidePlan, lesions) -> tuple[tuple[shapely.Polygon, str], ...]:
    """Strokes over glass and tissue; beside the lesions, as who marks a lesion would draw them."""
    rng = generator(plan.seed, "pens")
    tumour = shapely.union_all(lesions)
    strokes = []
    for _ in range(rng.integers(0, 3)):
        line = _stroke(rng, (0, 0, *plan.size), rng.uniform(0.15, 0.4))
        stroke = line.buffer(rng.uniform(25, 60) / plan.mpp)
        ink = str(rng.choice(list(INKS)))
        if not stroke.intersects(tumour):
            strokes.append((stroke, ink))
    return tuple(strokes)


def _stroke(rng: np.random.Generator, bounds, length: float) -> shapely.LineString:
    """A bent line through the box: a quarter turn at most, `length` of the box's longer side."""
    x0, y0, x1, y1 = bounds
    length = length * max(x1 - x0, y1 - y0)
    along = np.linspace(-0.5, 0.5, 24)
    bend, angle = rng.uniform(-0.6, 0.6), rng.uniform(0, 2 * np.pi)
    wobble = 0.02 * np.sin(2 * np.pi * (2.5 * along + rng.random()))
    u, v = length * along, length * (bend * (along**2 - 0.125) + wobble)
    x, y = rng.uniform((x0, y0), (x1, y1))
    return shapely.LineString(
        np.column_stack(
            [x + u * np.cos(angle) - v * np.sin(angle), y + u * np.sin(angle) + v * np.cos(angle)]
        )
    )
