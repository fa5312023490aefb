"""A slide's file open in OpenSlide, and what it states of itself: bounds and resolution."""

import math
from collections.abc import Mapping
from pathlib import Path

import openslide
from PIL import Image

from wsi_pipeline.errors import ResolutionError, SlideError, SlideReadError
from wsi_pipeline.geometry import Bounds

# Decoded tiles of all open slides together: OpenSlide's own default is 32 MB for each.
TILE_CACHE = openslide.OpenSlideCache(64 << 20)
# Resolutions in x and y may be this much apart.
MPP_ANISOTROPY = 0.05
# The coarsest resolution that a file may state of itself. TIFF writers that know nothing of
# microscopes state a printer's: 72 dpi is 353 um per px, 300 dpi is 85.
COARSEST_STATED_MPP = 50.0


class OpenSlideFile:
    """A slide open in OpenSlide, for any number of threads; opened anew after an error.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    path : Path
    handle : openslide.OpenSlide or None
        None after an error and once it is closed: reading opens a new one.
    properties : dict of str to str
        OpenSlide's.
    size, level_downsamples, level_sizes
        Of the levels, as OpenSlide tells them.

    Raises
    ------
    SlideError
        As `open_file`.
    """

    def __init__(self, path: Path):
        self.path = path
        handle = open_file(path)
        self.handle: openslide.OpenSlide | None = handle
        self.properties = dict(handle.properties)
        self.size: tuple[int, int] = handle.dimensions
        self.level_downsamples: tuple[float, ...] = handle.level_downsamples
        self.level_sizes: tuple[tuple[int, int], ...] = handle.level_dimensions

    def close(self) -> None:
        """Let go of the file, once reads under way in other threads end."""
        self.handle = None

    def read_region(
        self, location: tuple[int, int], level: int, size: tuple[int, int]
    ) -> Image.Image:
        """Call OpenSlide's `read_region`; after its first error a handle refuses everything.

        Raises
        ------
        SlideReadError
            If it fails twice, the second time with a new handle.
        """
        if handle := self.handle:
            try:
                return handle.read_region(location, level, size)
            except openslide.OpenSlideError:
                self.handle = None
        # This handle is this call's own until it has served: another thread's failure on a shared
        # one would be taken for this region's.
        handle = open_file(self.path)
        try:
            region = handle.read_region(location, level, size)
        except openslide.OpenSlideError as failure:
            raise SlideReadError(
                f"{self.path}: the region at level-0 px {location}, {size[0]} x {size[1]} px of"
                f" level {level}, cannot be decoded: {failure}"
            ) from failure
        self.handle = handle
        return region


def open_file(path: Path) -> openslide.OpenSlide:
    """Open a slide, its decoded tiles in the cache that all slides of the process share.

    Raises
    ------
    SlideError
        If the file is missing or OpenSlide cannot open it.
    """
    if not path.is_file():
        raise SlideError(f"{path}: no such file")
    try:
        handle = openslide.OpenSlide(path)
        handle.set_cache(TILE_CACHE)
        return handle
    except openslide.OpenSlideUnsupportedFormatError as error:
        hint = ""
        if not path.stat().st_size:
            hint = ": the file is empty (0 bytes), copy it again"
        elif path.suffix.lower() in (".tif", ".tiff"):
            hint = (
                ": copy the file again if it may have been cut short, and save a TIFF without tiles"
                " as a tiled, pyramidal one"
            )
        raise SlideError(f"{path}: not a format that OpenSlide reads{hint}") from error
    except openslide.OpenSlideError as error:
        raise SlideError(f"{path}: OpenSlide cannot open it: {error}") from error


def scanned_bounds(properties: Mapping[str, str], size: tuple[int, int]) -> Bounds:
    """The scanned part of the level-0 frame, px; all of it for formats that state none.

    Parameters
    ----------
    properties : mapping of str to str
        OpenSlide's.
    size : (int, int)
        Width and height of the frame, level-0 px.
    """
    names = (
        openslide.PROPERTY_NAME_BOUNDS_X,
        openslide.PROPERTY_NAME_BOUNDS_Y,
        openslide.PROPERTY_NAME_BOUNDS_WIDTH,
        openslide.PROPERTY_NAME_BOUNDS_HEIGHT,
    )
    if all(name in properties for name in names):
        return Bounds(*(int(properties[name]) for name in names))
    return Bounds(0, 0, *size)


def level0_mpp(path: Path, properties: Mapping[str, str], given: float | None = None) -> float:
    """Micrometres per level-0 px; the geometric mean where x and y differ a little.

    Parameters
    ----------
    path : Path
        For messages.
    properties : mapping of str to str
        OpenSlide's.
    given : float, optional
        Wins over what the file states.

    Raises
    ------
    ResolutionError
        If the resolution is neither stated plausibly nor given, or `given` is not positive.
    """
    remedy = "give its um per level-0 px in the catalog's mpp column or the setting catalog.mpp"
    if given is not None:
        if not 0 < given < math.inf:
            raise ResolutionError(f"{path}: mpp is given as {given}: it must be positive")
        return float(given)
    stated = [
        properties.get(name)
        for name in (openslide.PROPERTY_NAME_MPP_X, openslide.PROPERTY_NAME_MPP_Y)
    ]
    if None in stated:
        raise ResolutionError(f"{path}: the slide states no resolution; {remedy}")
    mpp_x, mpp_y = (float(value or 0) for value in stated)
    if not (0 < mpp_x <= COARSEST_STATED_MPP and 0 < mpp_y <= COARSEST_STATED_MPP):
        raise ResolutionError(
            f"{path}: the slide states {mpp_x:g} x {mpp_y:g} um per px; a microscope's lies between"
            f" 0 and {COARSEST_STATED_MPP:g}; {remedy}"
        )
    if max(mpp_x, mpp_y) > min(mpp_x, mpp_y) * (1 + MPP_ANISOTROPY):
        raise ResolutionError(
            f"{path}: the slide states {mpp_x:g} um per px in x and {mpp_y:g} in y, more than"
            f" {MPP_ANISOTROPY:.0%} apart; {remedy}"
        )
    return math.sqrt(mpp_x * mpp_y)
