"""Tissue masks at low resolution."""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from wsi_pipeline.errors import SlideReadError
from wsi_pipeline.geometry import Bounds
from wsi_pipeline.slides.given_masks import MaskGrid, Origin, read_mask
from wsi_pipeline.slides.reader import Slide
from wsi_pipeline.slides.tissue_pixels import FoundTissue, find_tissue

# A larger share of the imaged area is seldom tissue: more often the glass was misjudged.
NEARLY_ALL = 0.95
MUCH_INK = 0.2  # share of the stained area
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
    notes : tuple of str
        What a person should check.
    """

    mask: np.ndarray
    bounds: Bounds
    downsample: float
    pixels: np.ndarray | None = None
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def area_level0(self) -> float:
        """Area of the tissue, square level-0 px."""
        return float(self.mask.sum()) * self.downsample**2

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


@dataclass(frozen=True)
class GivenMasks:
    """Masks of a slide that were made elsewhere, and how to read them.

    Parameters
    ----------
    tissue, exclude : path-like, optional
        What is tissue, in place of what `tissue_mask` finds; what is no tissue.
    tissue_values, exclude_values : sequence of int, optional
        Pixel values of an image file that count; all but 0 by default.
    origin : "auto", "slide", "bounds" or "lower left"
        What coordinates of polygons count from, see `read_mask`.
    """

    tissue: str | None = None
    exclude: str | None = None
    tissue_values: tuple[int, ...] | None = None
    exclude_values: tuple[int, ...] | None = None
    origin: Origin = "auto"


def tissue_mask(
    slide: Slide,
    *,
    mpp: float,
    min_chroma: float,
    drop_ink: bool,
    closing_um: float,
    min_area_um2: float,
    max_hole_um2: float,
    given: GivenMasks = GivenMasks(),
) -> TissueMask:
    """Find tissue by its colour relative to the glass (`find_tissue`), or read it from a file.

    What cannot be decoded counts as no tissue.

    Parameters
    ----------
    slide : Slide
    mpp : float
        Resolution of the mask, um per px; a slide coarser than it is masked at level 0.
    min_chroma, drop_ink, closing_um, min_area_um2, max_hole_um2
        See `find_tissue`.
    given : GivenMasks
        Masks made elsewhere.

    Returns
    -------
    TissueMask
        Of the slide's bounds. Its notes say where nothing, or nearly everything, is tissue, and
        where much was left out as ink.

    Raises
    ------
    SlideReadError
        If nothing of the slide can be decoded.
    MaskError
        If a given mask cannot be read or does not fit the slide.
    """
    downsample = max(1.0, mpp / slide.mpp)
    width_px = math.ceil(slide.bounds.width / downsample)
    height_px = math.ceil(slide.bounds.height / downsample)
    pixels, unread, reasons = _read(slide, width_px, height_px, downsample)
    grid = MaskGrid(slide.bounds, slide.size, downsample, (width_px, height_px))
    found = find_tissue(
        pixels, mpp=downsample * slide.mpp, min_chroma=min_chroma, drop_ink=drop_ink,
        closing_um=closing_um, min_area_um2=min_area_um2, max_hole_um2=max_hole_um2,
    )  # fmt: skip
    mask = found.mask
    notes: tuple[str, ...] = ()
    if given.tissue:
        mask, notes = read_mask(given.tissue, grid, values=given.tissue_values, origin=given.origin)
    if given.exclude:
        excluded, more = read_mask(
            given.exclude, grid, values=given.exclude_values, origin=given.origin
        )
        mask, notes = mask & ~excluded, notes + more
    mask = mask & ~unread
    notes += _notes(mask, found, given)
    return TissueMask(mask, slide.bounds, downsample, pixels, reasons, notes)


def _notes(mask: np.ndarray, found: FoundTissue, given: GivenMasks) -> tuple[str, ...]:
    """What a person should check, with the setting to look at."""
    notes = []
    look_at = "the given mask" if given.tissue else "tile.tissue.min_chroma"
    if not mask.any():
        notes.append(f"nothing is tissue: check {look_at}")
    elif (share := np.mean(mask[found.imaged])) > NEARLY_ALL:
        notes.append(f"{share:.0%} of the imaged area is tissue: check {look_at}")
    if not given.tissue and found.ink_share > MUCH_INK:
        notes.append(
            f"{found.ink_share:.0%} of the stained area has the colour of blue or green ink and was"
            " left out: if it is a blue or green stain, set tile.tissue.drop_ink to false"
        )
    return tuple(notes)


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
