"""CAMELYON16's evaluation mask of a slide's lesions, as published and corrected.

The lesions' pixels are dilated and labelled, and looked up where the detections lie. A
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

*corrected*: the slide's own s; r = 75; holes are kept; a tumour slide is what the catalogue calls
so; an empty mask holds no lesion. The 275 um are kept: the script reaches them as 200 um of cells
and 2 * 37.5 of dilation, so that with 2 * 75 they stand for cells of under 125 um.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import shapely
from scipy import ndimage
from skimage.measure import label, regionprops_table

from wsi_pipeline.errors import RunError
from wsi_pipeline.evaluation.lesion_pixels import (
    DOWNSAMPLE_TOLERANCE,
    OFFICIAL_LEVEL,
    OFFICIAL_PIXEL_UM,
    pixels_inside,
)
from wsi_pipeline.geometry import level0_to_um

Mode = Literal["official", "corrected"]

TUMOUR_NAME = "Tumor"
OFFICIAL_RADIUS_UM = 37.5
RADIUS_UM = 75.0
ITC_UM = 275.0
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


def evaluation_mask(mask: np.ndarray, downsample: float, mpp: float, mode: Mode) -> EvaluationMask:
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
    pixel_um = OFFICIAL_PIXEL_UM if official else level0_to_um(downsample, mpp)
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
        window, inside = pixels_inside(lesion, mask.labels.shape, mask.downsample, keep_thin=True)
        pixels = np.bincount(mask.labels[window][inside], minlength=1)
        pixels[0] = 0
        found[number] = pixels.argmax()
    return found
