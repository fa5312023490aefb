"""Which pixels of a low-power picture are tissue: those that colour the light of the glass.

Everything is measured against the glass of the same slide, so tinted and dim glass is glass. Black
frames and gaps, dust, air bubbles, the edge of a coverslip and black ink are grey, however dark
they are. Eosin, haematoxylin and DAB have a colour, however pale they are.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage
from skimage.morphology import isotropic_closing

# Glass is bright and nearly grey. Its brightest part counts, since pale tissue may look like it.
GLASS_MIN_VALUE = 128
GLASS_MAX_SATURATION = 0.15
GLASS_BRIGHTEST_PERCENT = 5
GLASS_SPREAD = 12  # of the sum of the three channels, below that part
LEAST_GLASS = 0.002  # share of the pixels; with less, the glass is not known
UNKNOWN_GLASS = (245, 245, 245)
# A slide may have a second glass: tinted, beside a filling or bare glass that is brighter. It is
# even, as tissue never is over so large a share of the pixels, and not pink.
EVEN_SHARE = 0.2
EVEN_SPREAD = 4  # in each channel
OTHER_GLASS = 0.02  # chroma relative to the brightest
GREEN = 1  # the channel
SAMPLE_PX = 250_000  # of which the glass is estimated
LEFT_OUT = 254  # all channels: white that the scanner filled in, or saturated
# What glass becomes in the balanced picture; brighter pixels have room up to 255.
GLASS_LEVEL = 240
SMOOTHING_PX = 3
# A pixel at the edge of tissue shares its colour with the glass: this share of the strongest colour
# around it (a square of so many px) puts the edge where about half the pixel is tissue.
EDGE_SHARE = 0.4
EDGE_PX = 5
# Ink of blue, green or cyan pens absorbs much more red than green light; haematoxylin absorbs both
# about alike, eosin and DAB more green.
INK_RED_TO_GREEN = 1.4  # ratio of optical densities
INK_RIM_PX = 2  # ink mixed with glass at a stroke's rim
# No light came through: no more than this share of the glass's, in all channels.
BLACK = 1 / 6


@dataclass(frozen=True, eq=False)
class FoundTissue:
    """Tissue of a picture, and what was left out of it.

    Attributes
    ----------
    mask : bool array, shape (h, w)
    imaged : bool array, shape (h, w)
        What the scanner imaged: neither black nor filled in with white.
    ink_share : float
        Share of the coloured pixels that was left out as ink, in [0, 1].
    """

    mask: np.ndarray
    imaged: np.ndarray
    ink_share: float


def find_tissue(
    pixels: np.ndarray,
    *,
    mpp: float,
    min_chroma: float,
    drop_ink: bool,
    closing_um: float,
    min_area_um2: float,
    max_hole_um2: float,
) -> FoundTissue:
    """Find tissue by its colour relative to the glass.

    With ``T = I / I_glass`` the light that passes in red, green and blue, a pixel is stained if
    its chroma ``max(T) - min(T)``, median-filtered, exceeds `min_chroma` and 0.4 times the largest
    chroma within 2 px. In pale tissue the chroma is 2.3 times the difference between the highest
    and the lowest optical density. Then the mask is closed, small pieces are dropped and small
    holes filled, and pieces of black and of ink are taken out again.

    Parameters
    ----------
    pixels : uint8 array, shape (h, w, 3)
        RGB; pure white where nothing was imaged.
    mpp : float
        Micrometres per pixel.
    min_chroma : float
        Share of the glass's light, in [0, 1].
    drop_ink : bool
        Leave out what has the colour of blue and green ink.
    closing_um : float
        Radius of the closing.
    min_area_um2, max_hole_um2 : float
        Smaller pieces are dropped, then smaller holes filled.

    Returns
    -------
    FoundTissue
    """
    glasses = glass_colours(pixels)
    balanced = _balanced(pixels, glasses[0])
    highest, chroma = _chroma(balanced)
    for glass in glasses[1:]:
        chroma = np.minimum(chroma, _chroma(_balanced(pixels, glass))[1])
    chroma = _median(chroma)
    strongest = ndimage.maximum_filter(chroma, EDGE_PX)
    stained = chroma > np.maximum(min_chroma * GLASS_LEVEL, EDGE_SHARE * strongest)
    min_px = min_area_um2 / mpp**2
    black = without_small((highest < BLACK * GLASS_LEVEL) & ~stained, min_px)
    ink = _ink(balanced, stained, min_px) if drop_ink else np.zeros_like(stained)
    mask = closed(stained & ~ink, closing_um / mpp)
    mask = without_small(mask, min_px)
    if mask.any():  # else all of a tiny picture would be a hole
        mask = ~without_small(~mask, max_hole_um2 / mpp**2) & ~black & ~ink
    left_out = (pixels >= LEFT_OUT).all(-1)
    ink_share = float((ink & stained).sum() / max(stained.sum(), 1))
    return FoundTissue(mask, ~black & ~left_out, ink_share)


def glass_colours(pixels: np.ndarray) -> np.ndarray:
    """Colours of the glass: the brightest of what is bright and nearly grey.

    The commonest colour is a second glass, if it is even over a fifth of the pixels and differs
    otherwise than by a lack of green, which is what eosin takes.

    Parameters
    ----------
    pixels : uint8 array, shape (h, w, 3)

    Returns
    -------
    float64 array, shape (1 or 2, 3)
        Red, green and blue; 245 where nearly no pixel can be glass, as in a picture full of
        tissue.
    """
    step = max(1, math.isqrt(pixels[..., 0].size // SAMPLE_PX))
    sample = pixels[::step, ::step].reshape(-1, 3).astype(np.int32)
    highest, lowest = sample.max(-1), sample.min(-1)
    grey = highest - lowest <= GLASS_MAX_SATURATION * highest
    glass = sample[grey & (highest >= GLASS_MIN_VALUE) & (lowest < LEFT_OUT)]
    if len(glass) < max(1, LEAST_GLASS * len(sample)):
        return np.array([UNKNOWN_GLASS], float)
    brightness = glass.sum(-1)
    least = np.percentile(brightness, 100 - GLASS_BRIGHTEST_PERCENT) - GLASS_SPREAD
    brightest = np.median(glass[brightness >= least], axis=0)
    commonest = _commonest(glass)
    even = (np.abs(glass - commonest) <= EVEN_SPREAD).all(-1).sum() >= EVEN_SHARE * len(sample)
    relative = commonest / brightest
    second = even and np.ptp(relative) > OTHER_GLASS and np.argmin(relative) != GREEN
    return np.array([brightest, commonest] if second else [brightest])


def _commonest(colours: np.ndarray) -> np.ndarray:
    """The commonest colour, to within some levels."""
    cells = (colours // EVEN_SPREAD) @ (1, 256, 65536)
    values, counts = np.unique(cells, return_counts=True)
    return np.median(colours[cells == values[np.argmax(counts)]], axis=0)


def closed(mask: np.ndarray, radius_px: float) -> np.ndarray:
    """Close a mask with a disk."""
    # The margin keeps the closing's two distance maps off the edge: without any background the
    # second would be undefined.
    margin = 2 * math.ceil(radius_px) + 1
    return isotropic_closing(np.pad(mask, margin), radius_px)[margin:-margin, margin:-margin]


def without_small(mask: np.ndarray, min_px: float) -> np.ndarray:
    """Drop 4-connected pieces of fewer than `min_px` pixels."""
    labels, _ = ndimage.label(mask)
    large = np.bincount(labels.ravel()) >= min_px
    large[0] = False
    return large[labels]


def _balanced(pixels: np.ndarray, glass: np.ndarray) -> list[np.ndarray]:
    """The three channels with the glass at `GLASS_LEVEL`, uint8."""
    tables = np.arange(256)[:, None] * (GLASS_LEVEL / glass)
    tables = tables.round().clip(0, 255).astype(np.uint8)
    return [tables[:, channel][pixels[..., channel]] for channel in range(3)]


def _chroma(balanced: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Highest channel, and its difference to the lowest."""
    red, green, blue = balanced
    highest = np.maximum(np.maximum(red, green), blue)
    return highest, highest - np.minimum(np.minimum(red, green), blue)


def _median(values: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(values).filter(ImageFilter.MedianFilter(SMOOTHING_PX)))


def _ink(balanced: list[np.ndarray], stained: np.ndarray, min_px: float) -> np.ndarray:
    """Pieces of blue and green ink with their rims."""
    red, green, _ = balanced
    passed = np.minimum(np.arange(256) / GLASS_LEVEL, 1)
    most_red = (passed**INK_RED_TO_GREEN * GLASS_LEVEL).astype(np.uint8)
    ink = ndimage.binary_opening(stained & (red < most_red[green]))
    return ndimage.binary_dilation(without_small(ink, min_px), iterations=INK_RIM_PX)
