"""Tissue masks at low resolution."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import ndimage
from skimage.filters import threshold_otsu
from skimage.morphology import isotropic_closing

from wsi_pipeline.errors import SlideReadError
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.slides.reader import Slide

# Otsu's threshold parts two classes. With less than this share of the pixels under the floor there
# is no glass to part from: Otsu would cut the tissue itself in two.
LEAST_GLASS = 0.05
SMOOTHING_PX = 3
# Side of the blocks of mask px that are lost as a whole where the slide cannot be decoded.
BLOCK_PX = 64


@dataclass(frozen=True, eq=False)
class TissueMask:
    """Where a slide holds tissue.

    Attributes
    ----------
    mask : bool array, shape (h, w)
    bounds : Bounds
        The masked area, level-0 px; the mask's first pixel begins at its corner.
    downsample : float
        Level-0 px per mask px.
    pixels : uint8 array, shape (h, w, 3), optional
        What the mask was found in; white where it cannot be decoded.
    unread : tuple of str
        Why parts of it cannot be decoded.
    """

    mask: np.ndarray
    bounds: Bounds
    downsample: float
    pixels: np.ndarray | None = None
    unread: tuple[str, ...] = ()

    def fraction(self, boxes) -> np.ndarray:
        """Share of each box that is tissue; outside the mask there is none.

        Exact also for boxes that cut mask pixels. Boxes of the same height that follow each other,
        as a grid's rows do, share the sums over their strip of the mask.

        Parameters
        ----------
        boxes : array_like, shape (N, 4)
            ``x0, y0, x1, y1`` in level-0 px, of positive area.

        Returns
        -------
        float64 array, shape (N,), in [0, 1]
        """
        corner = (self.bounds.x, self.bounds.y) * 2
        boxes = (np.asarray(boxes, np.float64).reshape(-1, 4) - corner) / self.downsample
        edges_px = np.arange(self.mask.shape[1] + 1.0)
        area = np.zeros(len(boxes))
        in_another_row = (np.diff(boxes[:, 1::2], axis=0, prepend=np.nan) != 0).any(1)
        for start, end in pairwise([*np.flatnonzero(in_another_row).tolist(), len(boxes)]):
            columns = _tissue_of_columns(self.mask, *boxes[start, 1::2].tolist())
            area_to = np.concatenate([[0.0], np.cumsum(columns)])
            # np.interp holds the end values: beyond the mask the integral no longer grows.
            x0, x1 = np.interp(boxes[start:end, ::2].T, edges_px, area_to)
            area[start:end] = x1 - x0
        return np.clip(area / (boxes[:, 2:] - boxes[:, :2]).prod(1), 0, 1)


def tissue_mask(
    slide: Slide,
    *,
    mpp: float,
    min_saturation: float,
    closing_um: float,
    min_area_um2: float,
    max_hole_um2: float,
) -> TissueMask:
    """Find tissue as what is more saturated than glass.

    Otsu's threshold on the median-filtered HSV saturation, then morphological closing, removal
    of small pieces and filling of small holes (the sources leave the method open). What cannot be
    decoded counts as no tissue.

    Parameters
    ----------
    slide : Slide
    mpp : float
        Resolution of the mask, um per px; a slide coarser than it is masked at level 0.
    min_saturation : float
        Floor under Otsu's threshold, so that an empty slide stays empty; it is the threshold
        itself where the slide shows hardly any glass.
    closing_um : float
        Radius of the closing.
    min_area_um2, max_hole_um2 : float
        Smaller pieces are dropped, then smaller holes filled.

    Returns
    -------
    TissueMask
        Of the slide's bounds.

    Raises
    ------
    SlideReadError
        If nothing of the slide can be decoded.
    """
    downsample = max(1.0, mpp / slide.mpp)
    width_px = math.ceil(slide.bounds.width / downsample)
    height_px = math.ceil(slide.bounds.height / downsample)
    pixels, unread, reasons = _read(slide, width_px, height_px, downsample)
    mpp = downsample * slide.mpp
    mask = _saturated(pixels, min_saturation)
    mask = _closed(mask, closing_um / mpp)
    mask = _without_small(mask, min_area_um2 / mpp**2)
    mask = ~_without_small(~mask, max_hole_um2 / mpp**2) & ~unread
    return TissueMask(mask, slide.bounds, downsample, pixels, reasons)


def _read(slide, width_px, height_px, downsample) -> tuple[np.ndarray, np.ndarray, tuple]:
    """Pixels of a slide's bounds; where blocks of them cannot be decoded, each px; and why."""
    pixels = np.empty((height_px, width_px, 3), np.uint8)
    # Blocks take OpenSlide twice as long as the whole, so they are read only where that is damaged.
    for side_px in (max(width_px, height_px), BLOCK_PX):
        y, x = np.mgrid[:height_px:side_px, :width_px:side_px].reshape(2, -1)
        ends = np.minimum(x + side_px, width_px), np.minimum(y + side_px, height_px)
        boxes = np.stack([x, y, *ends], axis=1)
        lost = slide.read_under(slide.bounds.x, slide.bounds.y, boxes, downsample, pixels)
        if not lost:
            break
    if len(lost) == len(boxes):
        raise SlideReadError(lost[0])
    unread = np.zeros((height_px, width_px), bool)
    for x0, y0, x1, y1 in boxes[list(lost)].tolist():
        unread[y0:y1, x0:x1] = True
    pixels[unread] = 255
    return pixels, unread, tuple(dict.fromkeys(lost.values()))


def _tissue_of_columns(mask, y0_px, y1_px) -> np.ndarray:
    """Length of tissue between two heights in each column, mask px."""
    y0_px, y1_px = np.clip((y0_px, y1_px), 0, len(mask))
    first, end = math.floor(y0_px), math.ceil(y1_px)
    weights = np.ones(end - first)
    weights[:1] -= y0_px - first
    weights[-1:] -= end - y1_px
    return weights @ mask[first:end]


def _saturated(pixels, min_saturation) -> np.ndarray:
    saturation = ndimage.median_filter(_saturation(pixels), SMOOTHING_PX)
    # Pure white is mostly what the scanner left out: it says nothing of this slide's glass.
    imaged = saturation[(pixels < 255).any(-1)]
    threshold = min_saturation
    if imaged.size and np.mean(imaged < min_saturation) >= LEAST_GLASS:
        threshold = max(threshold, threshold_otsu(imaged))
    return saturation > threshold


def _saturation(pixels) -> np.ndarray:
    highest = pixels.max(-1).astype(np.float32)
    return (highest - pixels.min(-1)) / np.maximum(highest, 1)


def _closed(mask, radius_px) -> np.ndarray:
    # The margin keeps the closing's two distance maps off the edge: without any background the
    # second would be undefined.
    margin = 2 * math.ceil(radius_px) + 1
    return isotropic_closing(np.pad(mask, margin), radius_px)[margin:-margin, margin:-margin]


def _without_small(mask, min_px) -> np.ndarray:
    """Drop 4-connected pieces of fewer than `min_px` pixels."""
    labels, _ = ndimage.label(mask)
    large = np.bincount(labels.ravel()) >= min_px
    large[0] = False
    return large[labels]
