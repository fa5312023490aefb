"""A slide: its levels and resolution, and regions of it at any resolution."""

import math
import threading
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from wsi_pipeline.errors import SlideError, SlideReadError
from wsi_pipeline.slides.boxes import bounding_box, clip_boxes
from wsi_pipeline.slides.level_reader import WHITE, BackendSelection, LevelReader
from wsi_pipeline.slides.openslide_file import OpenSlideFile, level0_mpp, scanned_bounds
from wsi_pipeline.slides.openslide_level import OpenSlideLevel
from wsi_pipeline.slides.tiles import TiledLevel, TileReader, compare_tiles, find_tiles

# Level px that are resampled at once, a side: memory stays flat however far a region is reduced.
BLOCK_PX = 4096
# What `compare_tiles` found, by a file's state and the level: the same slides are opened time and
# again, and comparing takes longer than opening. A short text for each level ever read.
_COMPARED: dict[tuple, BackendSelection] = {}
# Level px read of a slide before its tiles are looked up: a large slide's tables take tens of
# milliseconds and megabytes, too much for the patch or two that training draws between openings.
WORTH_TILES_PX = 4 << 20
# Smaller regions, as a share of a tile, are OpenSlide's: it keeps the tiles it decoded last.
LEAST_OF_TILE = 1 / 4
# A level serves requests this much finer than itself; beyond, the next finer level is reduced.
LEVEL_TOLERANCE = 0.01
# A level this near to the requested downsample is read as stored: under half a px over a block.
SAME_DOWNSAMPLE = 1e-4
# A target resolution may be this much finer than level 0: scanners' nominal 0.25 is 0.23 to 0.275.
FINER_THAN_LEVEL0 = 0.1


class Slide:
    """A slide that OpenSlide reads: SVS, MRXS, SCN, NDPI, DICOM, tiled TIFF and others.

    Coordinates are level-0 px of the whole frame (see `wsi_pipeline.geometry`). Everything
    outside the frame, and everything that the scanner left transparent, reads as white.

    OpenSlide is the reference for every pixel. Levels of TIFF and SVS files that are plain grids of
    JPEG tiles (or of JPEG 2000 RGB tiles), at a downsample that is a whole number, are decoded
    without it, regions of several tiles several times as fast: `wsi_pipeline.slides.tiles`. The
    first such read of a level compares about ten of its tiles with OpenSlide's; any difference
    leaves the level to OpenSlide. `backend` says which backend it is. The first 4 megapixels of a
    slide, and regions much smaller than a tile, come from OpenSlide in any case.

    Reading is safe from several threads. A slide is also a context manager.

    Parameters
    ----------
    path : path-like
    mpp : float, optional
        Micrometres per level-0 px; wins over what the file states.

    Attributes
    ----------
    path : Path
    vendor : str
        OpenSlide's name of the format.
    size : (int, int)
        Width and height of the level-0 frame, px.
    bounds : Bounds
        The scanned part of the frame; the whole frame for formats that state none.
    mpp : float
        Micrometres per level-0 px; the geometric mean where x and y differ a little.
    level_downsamples : tuple of float
        Level-0 px per px of each pyramid level.
    level_sizes : tuple of (int, int)
        Width and height of each level, px.
    quickhash : str or None
        OpenSlide's ``quickhash-1``, the same for copies of a slide; None where it gives none.

    Raises
    ------
    SlideError
        If the file is missing, OpenSlide cannot open it, or its resolution is neither stated
        plausibly nor given.
    """

    def __init__(self, path, mpp: float | None = None):
        self.path = Path(path)
        self._file = OpenSlideFile(self.path)
        properties = self._file.properties
        self.vendor: str = properties[openslide.PROPERTY_NAME_VENDOR]
        self.size = self._file.size
        self.level_downsamples = self._file.level_downsamples
        self.level_sizes = self._file.level_sizes
        self.bounds = scanned_bounds(properties, self.size)
        self.mpp = level0_mpp(self.path, properties, mpp)
        self.quickhash: str | None = properties.get(openslide.PROPERTY_NAME_QUICKHASH1)
        self._openslide = [
            OpenSlideLevel(self._file, level) for level in range(len(self.level_sizes))
        ]
        self._tiles: list[TiledLevel | BackendSelection] | None = None
        self._tiles_used = False
        self._lock = threading.Lock()  # of what is found out about tiles

    def __enter__(self) -> "Slide":
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Let go of the file, once reads under way in other threads end; reading reopens it."""
        self._file.close()
        with self._lock:
            self._tiles = None

    def backend(self, level: int) -> BackendSelection:
        """Say which backend reads a level, and why.

        The first question, like the first read, compares the two where it is not clear yet.
        """
        return self._select(level)[0]

    def downsample(self, level: int | None = None, mpp: float | None = None) -> float:
        """Level-0 px per working px of a pyramid level or of a target resolution: give one.

        Raises
        ------
        SlideError
            If the slide lacks the level, or is more than 10 % coarser than the target `mpp`.
        """
        if level is not None and mpp is None:
            if not 0 <= level < len(self.level_downsamples):
                raise SlideError(
                    f"{self.path}: level {level} is asked for; the slide has levels 0 to"
                    f" {len(self.level_downsamples) - 1}"
                )
            return self.level_downsamples[level]
        if mpp is None or level is not None:
            raise ValueError(f"level is {level} and mpp is {mpp}: give one of the two")
        if mpp < self.mpp * (1 - FINER_THAN_LEVEL0):
            raise SlideError(
                f"{self.path}: {mpp} um per px is asked for; the slide was scanned at"
                f" {self.mpp:.4g}, and finer detail cannot be made up"
            )
        return mpp / self.mpp

    def read(
        self, x: float, y: float, width_px: int, height_px: int, downsample: float = 1.0,
        out: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """Pixels of a region at a resolution.

        The level nearest below `downsample` is read. Where it *is* that resolution its pixels
        come as stored, from the level pixel nearest to ``(x, y)``; else they are resampled
        (triangle filter, antialiased). What a pixel shows depends on its position alone:
        neighbouring reads join without a seam, and a part of a large read equals a small one.
        (On levels whose downsample is no whole number OpenSlide, which takes corners in whole
        level-0 px, itself interpolates: there this holds to within half a level-0 px.)

        Parameters
        ----------
        x, y : float
            Upper left corner of the region, level-0 px; any part may lie outside the slide.
        width_px, height_px : int
            Size of the result, px at `downsample`.
        downsample : float
            Level-0 px per px of the result.
        out : uint8 array, shape (height_px, width_px, 3), optional
            Filled and returned, a view of a larger array if you like: memory that was in use
            before takes less time to fill.

        Returns
        -------
        uint8 array, shape (height_px, width_px, 3)
            RGB; white outside the slide and where it is transparent.

        Raises
        ------
        SlideReadError
            If OpenSlide fails twice, the second time with a new handle: after its first error a
            handle refuses everything. Other regions can still be read.
        """
        shape = (height_px, width_px, 3)
        pixels = np.empty(shape, np.uint8) if out is None else out
        if pixels.shape != shape or pixels.dtype != np.uint8:
            raise ValueError(f"out is {pixels.dtype} {pixels.shape}: it must be uint8 {shape}")
        whole = np.array([[0, 0, width_px, height_px]])
        if lost := self.read_under(x, y, whole, downsample, pixels):
            raise SlideReadError(lost[0])
        return pixels

    def read_under(
        self, x: float, y: float, boxes: np.ndarray, downsample: float, out: np.ndarray
    ) -> dict[int, str]:
        """Read what boxes hold of a region, together.

        Tiles that lie under none are not decoded, nor is OpenSlide asked for much between them.

        Parameters
        ----------
        x, y, downsample
            As for `read`.
        boxes : int64 array, shape (N, 4)
            Left, upper, right and lower edge of each, px from the corner of the region and in it.
        out : uint8 array, shape (height_px, width_px, 3)
            The region. What lies under no box afterwards is not defined.

        Returns
        -------
        dict of int to str
            Positions of the boxes that cannot be had whole, and why; all others are filled.
        """
        level, scale = self.level_for(downsample)
        left, top = x / self.level_downsamples[level], y / self.level_downsamples[level]
        if scale == 1:
            return self._fill(out, boxes, level, _nearest(left), _nearest(top))
        lost: dict[int, str] = {}
        step = _block_px(scale)
        for row, col in product(range(0, out.shape[0], step), range(0, out.shape[1], step)):
            held, parts = clip_boxes(boxes, (col, row, col + step, row + step))
            if len(held):
                found = self._resample(out, parts, level, left, top, scale)
                lost |= {int(held[part]): reason for part, reason in found.items()}
        return lost

    def thumbnail(self, max_px: int) -> tuple[np.ndarray, float]:
        """Read the bounds area, its longer side `max_px` or less.

        Returns
        -------
        pixels : uint8 array, shape (h, w, 3)
        downsample : float
            Level-0 px per px of the thumbnail.
        """
        downsample = max(1.0, max(self.bounds.width, self.bounds.height) / max_px)
        width_px = max(1, round(self.bounds.width / downsample))
        height_px = max(1, round(self.bounds.height / downsample))
        return self.read(self.bounds.x, self.bounds.y, width_px, height_px, downsample), downsample

    def row_edges(
        self, y: float, width_px: int, height_px: int, downsample: float = 1.0
    ) -> np.ndarray:
        """Where a region can be cut across so that reading its parts decodes no tile twice.

        Parameters
        ----------
        y, width_px, height_px, downsample
            As for `read`.

        Returns
        -------
        int64 array
            From 0 to `height_px`, ascending, each end included: the edges of the slide's tiles, or
            of what OpenSlide is asked for at once. Where pixels are resampled, which takes some
            beyond a part's edges, the parts are large.
        """
        level, scale = self.level_for(downsample)
        if scale == 1:
            _, step = self._reader(level, width_px * height_px).cell
            first = -_nearest(y / self.level_downsamples[level]) % step
        else:
            first, step = 0, _block_px(scale)
        return np.unique([0, *range(first, height_px, step), height_px])

    def as_read(self, downsample: float) -> float:
        """The exact downsample of what `read` gives: a level's, where it is read as stored.

        Parts of a region join when their corners lie whole px of this size apart.
        """
        level, scale = self.level_for(downsample)
        return self.level_downsamples[level] if scale == 1 else downsample

    def level_for(self, downsample: float) -> tuple[int, float]:
        """The level that `read` takes at a resolution, and its px for each px of the result.

        1 if the level is read as stored.
        """
        finest = downsample * (1 + LEVEL_TOLERANCE)
        level = max(
            (i for i, stored in enumerate(self.level_downsamples) if stored <= finest), default=0
        )
        scale = downsample / self.level_downsamples[level]
        return level, 1 if abs(scale - 1) < SAME_DOWNSAMPLE else scale

    def _resample(self, pixels, boxes, level, left, top, scale) -> dict[int, str]:
        """Fill boxes of an array whose corner is in level px, `scale` to a px: see `read_under`."""
        # The triangle filter reaches one pixel, of the coarser grid, beyond a pixel's centre.
        margin = 2 * max(1, scale)
        col, row, end_col, end_row = around = bounding_box(boxes)
        edges = np.vstack([around, boxes]) * scale + np.array([left, top, left, top])
        sources = np.hstack([np.floor(edges[:, :2] - margin), np.ceil(edges[:, 2:] + margin)])
        x0, y0, right, bottom = sources[0].astype(int).tolist()
        source, shift = np.empty((bottom - y0, right - x0, 3), np.uint8), np.array([x0, y0, x0, y0])
        lost = self._fill(source, sources[1:].astype(np.int64) - shift, level, x0, y0)
        box = tuple((edges[0] - shift).tolist())
        size = end_col - col, end_row - row
        resampled = Image.fromarray(source).resize(size, Image.Resampling.BILINEAR, box)
        pixels[row:end_row, col:end_col] = resampled
        return lost

    def _fill(self, pixels, boxes, level, x0, y0) -> dict[int, str]:
        """Fill boxes of an array with level px from (x0, y0) on: see `read_under`."""
        inside, x, y = self._inside(level, x0, y0, pixels)
        height, width = inside.shape[:2]
        shift = np.array([x0, y0, x0, y0])
        held, parts = clip_boxes(boxes + shift, (x, y, x + width, y + height))
        if not len(held):
            return {}
        reader = self._reader(level, width * height)
        lost = reader.read(x, y, inside, parts)
        if reader is not self._openslide[level]:
            self._tiles_used = True
        return {int(held[part]): reason for part, reason in lost.items()}

    def _inside(self, level, x0, y0, pixels) -> tuple[np.ndarray, int, int]:
        """The part of an array inside the level, and its corner, level px; the rest gets white."""
        x, y = max(x0, 0), max(y0, 0)
        width, height = self.level_sizes[level]
        lines, columns = slice(y - y0, max(height - y0, 0)), slice(x - x0, max(width - x0, 0))
        for outside in (
            pixels[: lines.start], pixels[lines.stop :],
            pixels[lines, : columns.start], pixels[lines, columns.stop :],
        ):  # fmt: skip
            outside[:] = WHITE
        return pixels[lines, columns], x, y

    def _reader(self, level: int, px: int) -> LevelReader:
        """The backend for so many px of a level: tiles, if they are worth looking up and using."""
        by_openslide = self._openslide[level]
        if not self._tiles_used:
            read_px = sum(reader.read_px for reader in self._openslide)
            if read_px + px < WORTH_TILES_PX:
                return by_openslide
        _, reader = self._select(level)
        return reader if px >= LEAST_OF_TILE * prod(reader.cell) else by_openslide

    def _select(self, level: int) -> tuple[BackendSelection, LevelReader]:
        """Select the backend of a level: its tiles, once they have proved equal to OpenSlide's."""
        by_openslide = self._openslide[level]
        with self._lock:
            if self._tiles is None:
                self._tiles = find_tiles(
                    self.path, self.vendor, self.level_sizes, self.level_downsamples
                )
            tiles = self._tiles[level]
            if isinstance(tiles, BackendSelection):
                return tiles, by_openslide
            key = (tiles.file.state, level)
            if key not in _COMPARED:
                _COMPARED[key] = compare_tiles(tiles, by_openslide.region)
            selection = _COMPARED[key]
        by_tiles = TileReader(tiles, by_openslide)
        return selection, by_tiles if selection.name == "tiles" else by_openslide


def _block_px(scale: float) -> int:
    """Side of the largest block of a result that has `scale` level px for each of its px."""
    return max(1, int(BLOCK_PX / scale))


def _nearest(position: float) -> int:
    """The level px nearest to a position; halves all go the same way.

    With odd bounds every region of a level has them.
    """
    return math.floor(position + 0.5)
