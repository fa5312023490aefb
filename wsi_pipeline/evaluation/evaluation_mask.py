"""Detections against lesions: CAMELYON16's evaluation mask, as published and corrected.

The mask of a slide's lesions is dilated, labelled, and looked up where the detections lie. A
dilated connected region is one lesion of the evaluation: lesions that the dilation merges are
one. Regions under 275 um across are isolated tumour cells (ITC), neither hit nor missed. For
mask pixels p of s um, with D(p) the Euclidean distance, in px, of p's centre from the nearest
lesion pixel's:

    binary = {p : D(p) * s < r},  labels = 8-connected components of binary
    ITC    = {label : 4 * sqrt(largest eigenvalue of its pixels' covariance) * s < 275}

that is the major axis of the ellipse with the region's second moments, as scikit-image's
``axis_major_length`` has it (no 1/12 px^2 for the pixel's own extent, which Matlab adds).

*official* is what the organisers' script computes
(github.com/computationalpathologygroup/Camelyon16, Python/Evaluation_FROC.py):

- always level 5 and 0.243 um, s = 7.776, whatever the slide's spacing;
- r = 75 / 2 = 37.5 um, though the script's text says 75;
- holes of binary are filled, exclusions within a lesion with them;
- a slide is a tumour slide iff its name begins with "Tumor" (so, with a capital): see
  `official_labels`;
- in an empty mask SciPy takes pixel (row -1, column 0), which does not exist, for the nearest
  lesion pixel. That makes a region of ITC in the upper left corner, in which detections are
  no false positives.

Deviations: detections off the mask are refused, where the script wraps negative coordinates to
the opposite edge and crashes on others; coordinates may be fractions.

*corrected*: the slide's own s; r = 75; holes are kept; a tumour slide is what the catalogue calls
so; an empty mask holds no lesion. The 275 um are kept: the script reaches them as 200 um of cells
and 2 * 37.5 of dilation, so that with 2 * 75 they stand for cells of under 125 um.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import shapely
import tifffile
from scipy import ndimage
from skimage.measure import label, regionprops_table

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.froc import FrocHits

OFFICIAL_LEVEL = 5
TUMOUR_NAME = "Tumor"
OFFICIAL_MPP = 0.243
OFFICIAL_PIXEL_UM = OFFICIAL_MPP * 2**OFFICIAL_LEVEL
OFFICIAL_RADIUS_UM = 37.5
RADIUS_UM = 75.0
ITC_UM = 275.0
DOWNSAMPLE_TOLERANCE = 0.01
EIGHT_CONNECTED = np.ones((3, 3), bool)


@dataclass(frozen=True, eq=False)
class EvaluationMask:
    """The lesions of a slide, as detections are held against them.

    Parameters
    ----------
    labels : int32 array, shape (h, w)
        0 background, 1 to n the dilated regions.
    downsample : float
        Level-0 px per mask px; the mask starts at the slide's level-0 corner.
    counted : bool array, shape (n,)
        Whether region ``i + 1`` is a lesion to be found; the others are isolated tumour cells.
    diameter_um : float64 array, shape (n,)
        Longest diameter (major axis) of region ``i + 1``.
    """

    labels: np.ndarray
    downsample: float
    counted: np.ndarray
    diameter_um: np.ndarray


@dataclass(frozen=True, eq=False)
class SlideHits:
    """What the detections of a slide hit and miss.

    Parameters
    ----------
    slide_id : str
    lesions : int
        Counted lesions; isolated tumour cells are not.
    lesion_label : int64 array, shape (l,)
        Label, in the slide's evaluation mask, of each entry of `lesion_score`.
    lesion_score : float64 array, shape (l,)
        Highest confidence that hit the lesion. Never found: -inf, in official 0; official has
        all regions here, with 0 for isolated tumour cells.
    fp_score : float64 array, shape (f,)
        Confidences of the false positives, in the detections' order.
    hit : int64 array, shape (d,)
        For each detection the label of its lesion; 0 false positive, -1 isolated tumour cells.
    """

    slide_id: str
    lesions: int
    lesion_label: np.ndarray
    lesion_score: np.ndarray
    fp_score: np.ndarray
    hit: np.ndarray


def official_labels(labels: Mapping[str, int]) -> dict[str, int]:
    """Which slides the official mode takes for tumour slides.

    Those whose name begins with "Tumor", as in the organisers' script, whatever they hold. Where
    no slide is named so the script sees no lesion at all; here (a deviation) the labels then
    count, so that cohorts of other names have an official score too.

    Parameters
    ----------
    labels : mapping of str to int
        Of each slide: 1 tumour, 0 or -1 not.

    Returns
    -------
    dict
        1 or 0 for each slide.
    """
    by_name = {slide_id: int(slide_id.startswith(TUMOUR_NAME)) for slide_id in labels}
    return by_name if any(by_name.values()) else {s: int(label == 1) for s, label in labels.items()}


def raster_downsample(mpp: float) -> float:
    """Level-0 px per mask px that make a mask pixel 7.776 um wide, as the organisers' is.

    At least 1: a slide coarser than that gets masks of its own pixels.
    """
    return max(1.0, OFFICIAL_PIXEL_UM / mpp)


def rasterise(
    lesions: Sequence[shapely.Polygon],
    size_level0: tuple[int, int],
    downsample: float,
    *,
    keep_thin: bool = False,
) -> np.ndarray:
    """Mask pixels whose centres lie inside a lesion; holes are respected.

    Parameters
    ----------
    lesions : sequence of shapely.Polygon
        Level-0 px, within the slide.
    size_level0 : (int, int)
        Width and height of the slide, level-0 px.
    downsample : float
        Level-0 px per mask px.
    keep_thin : bool
        Whether a lesion that holds no pixel centre gets the pixel of a point inside it, so that
        no annotated lesion is lost. Corrected masks are made so.

    Returns
    -------
    bool array, shape (ceil(height / downsample), ceil(width / downsample))

    Raises
    ------
    RunError
        If a lesion lies off the slide.
    """
    width, height = (int(np.ceil(round(side / downsample, 6))) for side in size_level0)
    mask = np.zeros((height, width), bool)
    for lesion in lesions:
        window, inside = _pixels_inside(lesion, mask.shape, downsample, keep_thin)
        mask[window] |= inside
    return mask


def _pixels_inside(
    lesion: shapely.Polygon, shape: tuple[int, int], downsample: float, keep_thin: bool
) -> tuple[tuple[slice, slice], np.ndarray]:
    """A lesion's window of the mask, and the pixels in it whose centres the lesion holds."""
    x0, y0, x1, y1 = np.array(lesion.bounds) / downsample
    rows = slice(max(0, int(np.floor(y0))), min(shape[0], int(np.ceil(y1))))
    cols = slice(max(0, int(np.floor(x0))), min(shape[1], int(np.ceil(x1))))
    if rows.start >= rows.stop or cols.start >= cols.stop:
        raise RunError(
            f"a lesion at level-0 px x {lesion.bounds[0]:.0f}, y {lesion.bounds[1]:.0f} lies off"
            f" its slide's mask of {shape[1]} x {shape[0]} px of {downsample:g} level-0 px"
        )
    y = (np.arange(rows.start, rows.stop) + 0.5) * downsample
    x = (np.arange(cols.start, cols.stop) + 0.5) * downsample
    shapely.prepare(lesion)
    inside = shapely.contains_xy(lesion, x[np.newaxis], y[:, np.newaxis])
    if keep_thin and not inside.any():
        point = lesion.representative_point()
        inside[int(point.y / downsample) - rows.start, int(point.x / downsample) - cols.start] = 1
    return (rows, cols), inside


def read_mask(path: str | Path, level: int = OFFICIAL_LEVEL) -> np.ndarray:
    """Lesion pixels of one of the challenge's mask TIFFs, at downsample ``2 ** level``.

    Lesion is 255 in the first channel; values below it do not count, as in the organisers'
    script. In files of 0 and 1 lesion is 1 (the script sees no lesion in them). A pyramid
    without the level is sampled, tile by tile, at the middles of the level's pixels, from the
    next finer one of which it is a whole multiple.

    Parameters
    ----------
    path : path-like
        A TIFF, tiled or not, with or without reduced levels; its first image is level 0.
    level : int

    Returns
    -------
    bool array, shape (h, w)

    Raises
    ------
    RunError
        If the file is no TIFF that can be decoded, or holds other values: what its 2 means, say,
        is not known.
    """
    try:
        with tifffile.TiffFile(path) as file:
            first, *others = (page.aspage() for page in file.pages)
            others += [page.aspage() for page in first.pages or []]
            page, step = _nearest_level([first, *(p for p in others if p.is_reduced)], 2**level)
            values = _sampled(page, step)
    except (OSError, ValueError, RuntimeError) as error:  # imagecodecs' are RuntimeErrors
        raise RunError(f"{path}: cannot be read as a mask: {error}") from error
    top = values.max(initial=0)
    if top not in (0, 1, 255):
        raise RunError(
            f"{path}: its largest value is {top}: a mask's lesions are 255, or 1 where there is"
            " only 0 and 1"
        )
    return values == (255 if top == 255 else 1)


def _nearest_level(
    pages: Sequence[tifffile.TiffPage], downsample: int
) -> tuple[tifffile.TiffPage, int]:
    """The coarsest level of which `downsample` is a whole multiple, and that multiple."""
    width, height = pages[0].imagewidth, pages[0].imagelength
    stored = {(width / p.imagewidth + height / p.imagelength) / 2: p for p in pages}
    steps = {d: round(downsample / d) for d in stored}
    fitting = [
        d for d, step in steps.items() if abs(step * d / downsample - 1) <= DOWNSAMPLE_TOLERANCE
    ]
    return stored[max(fitting)], steps[max(fitting)]


def _sampled(page: tifffile.TiffPage, step: int) -> np.ndarray:
    """First channel of every `step`-th pixel, a tile in memory at a time."""
    size = page.imagelength, page.imagewidth
    # Middles of the steps; where the last is cut short, the level's last pixel.
    at = [np.minimum(np.arange(0, side, step) + step // 2, side - 1) for side in size]
    values = np.zeros((len(at[0]), len(at[1])), page.dtype)
    for tile, position, shape in page.segments():
        if tile is None or any(position[:2]):  # never written (0), or of another plane
            continue
        corner, extent = position[2:4], shape[1:3]
        (top, bottom), (left, right) = (
            np.searchsorted(axis, (start, start + length))
            for axis, start, length in zip(at, corner, extent, strict=True)
        )
        rows, cols = at[0][top:bottom] - corner[0], at[1][left:right] - corner[1]
        values[top:bottom, left:right] = tile[0, rows[:, np.newaxis], cols, 0]
    return values


def evaluation_mask(
    mask: np.ndarray, downsample: float, mpp: float, mode: Literal["official", "corrected"]
) -> EvaluationMask:
    """Dilated and labelled lesions of a slide, see the module for the definitions.

    Parameters
    ----------
    mask : bool array, shape (h, w)
        Lesion pixels.
    downsample : float
        Level-0 px per mask px.
    mpp : float
        Micrometres per level-0 px; official takes 0.243 whatever it is.
    mode : "official" or "corrected"

    Raises
    ------
    RunError
        If mode is official and `downsample` is not 32, or if `mpp` is not positive.
    """
    official = mode == "official"
    if official and abs(downsample / 2**OFFICIAL_LEVEL - 1) > DOWNSAMPLE_TOLERANCE:
        raise RunError(f"an official mask is downsampled by 32, this one by {downsample:g}")
    if not mpp > 0:
        raise RunError(f"mpp is {mpp}: it must be positive")
    pixel_um = OFFICIAL_PIXEL_UM if official else downsample * mpp
    binary = _dilated(mask, (OFFICIAL_RADIUS_UM if official else RADIUS_UM) / pixel_um)
    if official:
        if not mask.any():
            rows, cols = np.ogrid[: mask.shape[0], : mask.shape[1]]
            binary = np.hypot(rows + 1, cols) < OFFICIAL_RADIUS_UM / pixel_um
        binary = ndimage.binary_fill_holes(binary)
    labels = label(binary, connectivity=2).astype(np.int32)
    axes = regionprops_table(labels, properties=("axis_major_length",))["axis_major_length"]
    diameter_um = np.asarray(axes, np.float64) * pixel_um
    return EvaluationMask(labels, downsample, diameter_um >= ITC_UM, diameter_um)


def _dilated(mask: np.ndarray, radius_px: float) -> np.ndarray:
    """Pixels nearer than `radius_px` to one of the mask, centre to centre.

    Distances are taken in a window about each connected part, which holds all pixels that can be
    near to it: exact, and with little memory where the lesions fill little of the slide.
    """
    near = np.zeros(mask.shape, bool)
    margin = int(np.ceil(radius_px))
    parts, _ = ndimage.label(mask, EIGHT_CONNECTED)
    for part in ndimage.find_objects(parts):
        window = tuple(slice(max(0, s.start - margin), s.stop + margin) for s in part)
        near[window] |= ndimage.distance_transform_edt(~mask[window]) < radius_px
    return near


def lesion_labels(lesions: Sequence[shapely.Polygon], mask: EvaluationMask) -> np.ndarray:
    """The region of the evaluation mask that each annotated lesion belongs to.

    Where a lesion has pixels of several regions (its neck was thinner than a mask pixel) it
    belongs to that with the most; one without pixel centres to that of a point inside it.

    Parameters
    ----------
    lesions : sequence of shapely.Polygon
        Level-0 px, n of them.
    mask : EvaluationMask

    Returns
    -------
    int64 array, shape (n,)
        Labels from 1; 0 where the mask lacks the lesion, never in a corrected mask made from
        `lesions` by `rasterise` with `keep_thin`.

    Raises
    ------
    RunError
        If a lesion lies off the mask.
    """
    found = np.zeros(len(lesions), np.int64)
    for number, lesion in enumerate(lesions):
        window, inside = _pixels_inside(lesion, mask.labels.shape, mask.downsample, keep_thin=True)
        pixels = np.bincount(mask.labels[window][inside], minlength=1)
        pixels[0] = 0
        found[number] = pixels.argmax()
    return found


def detection_hits(
    slide_id: str,
    score,
    x_level0,
    y_level0,
    mask: EvaluationMask | None,
    *,
    mode: Literal["official", "corrected"],
    size_level0: tuple[int, int] | None = None,
) -> SlideHits:
    """What the detections of one slide hit; the highest confidence in a lesion counts.

    Parameters
    ----------
    slide_id : str
    score, x_level0, y_level0 : array_like of float, shape (d,)
        Confidence and place, level-0 px, of each detection.
    mask : EvaluationMask or None
        None for a slide without tumour: all detections are false positives. Which these are in
        official, see `official_labels`.
    mode : "official" or "corrected"
    size_level0 : (int, int), optional
        Width and height of the slide, for detections to be checked against.

    Raises
    ------
    RunError
        If a confidence is not finite, or a detection lies off the slide or its mask.
    """
    score = np.asarray(score, np.float64)
    if not np.isfinite(score).all():
        raise RunError(f"{slide_id}: a detection's confidence is {score[~np.isfinite(score)][0]}")
    place = np.stack([np.asarray(x_level0, np.float64), np.asarray(y_level0, np.float64)], axis=-1)
    _refuse_off(slide_id, place, place, size_level0 or (np.inf, np.inf), "slide")
    label_at = np.zeros(len(score), np.int64) if mask is None else _look_up(slide_id, place, mask)
    counted = np.zeros(0, bool) if mask is None else mask.counted
    best = np.full(len(counted) + 1, 0.0 if mode == "official" else -np.inf)
    np.maximum.at(best, label_at, score)
    if mode == "official":
        best = np.where(np.append(False, counted), best, 0).astype(np.float32).astype(np.float64)
    entries = np.arange(len(counted)) if mode == "official" else np.flatnonzero(counted)
    return SlideHits(
        slide_id=slide_id,
        lesions=int(counted.sum()),
        lesion_label=entries + 1,
        lesion_score=best[entries + 1],
        fp_score=score[label_at == 0],
        hit=np.where(np.append(True, counted)[label_at], label_at, -1),
    )


def _look_up(slide_id: str, place: np.ndarray, mask: EvaluationMask) -> np.ndarray:
    pixel = np.floor(place / mask.downsample)
    _refuse_off(slide_id, place, pixel, mask.labels.shape[::-1], "mask")
    col, row = pixel.astype(np.int64).T
    return mask.labels[row, col].astype(np.int64)


def _refuse_off(slide_id: str, place_level0: np.ndarray, place: np.ndarray, size, what: str):
    off = ~((place >= 0) & (place < size)).all(axis=1)
    if off.any():
        x, y = place_level0[off][0]
        raise RunError(
            f"{slide_id}: a detection at level-0 px x {x:.10g}, y {y:.10g} lies off the {what} of"
            f" {size[0]} x {size[1]} px"
        )


def detection_froc_hits(
    mode: Literal["official", "corrected"], slides: Sequence[SlideHits]
) -> FrocHits:
    """Join the slides of a cohort.

    Parameters
    ----------
    mode : "official" or "corrected"
        That of all `slides`.
    slides : sequence of SlideHits
        Of every slide evaluated, those without detections included: false positives are
        averaged over all of them.

    Raises
    ------
    RunError
        If a slide is there twice.
    """
    slide_ids = tuple(slide.slide_id for slide in slides)
    if twice := sorted({name for name in slide_ids if slide_ids.count(name) > 1}):
        raise RunError(f"slides {twice[:5]} are there more than once")
    number = np.arange(len(slides))
    lesion_score = [slide.lesion_score for slide in slides]
    fp_score = [slide.fp_score for slide in slides]
    return FrocHits(
        mode=mode,
        slide_ids=slide_ids,
        lesions=np.array([slide.lesions for slide in slides], np.int64),
        averaged=np.ones(len(slides), bool),
        lesion_slide=np.repeat(number, [len(scores) for scores in lesion_score]),
        lesion_score=np.concatenate([*lesion_score, np.zeros(0)]),
        fp_slide=np.repeat(number, [len(scores) for scores in fp_score]),
        fp_score=np.concatenate([*fp_score, np.zeros(0)]),
    )
