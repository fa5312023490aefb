"""The stored tiles of a TIFF or SVS level, decoded without OpenSlide.

OpenSlide paints each tile on a canvas before it hands pixels out, which takes several times as
long as decoding it. Where a level is nothing but a grid of JPEG (or JPEG 2000 RGB) tiles its pixels
can be had without. OpenSlide stays the reference: `find_tiles` refuses every layout that it is
not sure of, `compare_tiles` compares a level with what OpenSlide reads of it, and `TileReader`
leaves to OpenSlide what it cannot decode.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import tifffile

from wsi_pipeline.errors import SlideReadError
from wsi_pipeline.slides.boxes import bounding_box, cells_touched, clip_boxes
from wsi_pipeline.slides.level_reader import WHITE, BackendSelection
from wsi_pipeline.slides.openslide_level import OpenSlideLevel
from wsi_pipeline.slides.threads import in_threads
from wsi_pipeline.slides.tile_decoders import Decode, TileError, tile_decoder

# OpenSlide's names of the formats whose levels are plain grids of tiles, one TIFF page each.
PLAIN_FORMATS = ("aperio", "generic-tiff", "philips")
# Tiles compared with OpenSlide's beside the four in the corners: with most detail; spread evenly.
DETAILED_PROBES = 3
SPREAD_PROBES = 3

# Neighbours in a row that are decoded before they are copied: longer lines are copied faster, and
# what they were decoded to should still be in the core's cache.
NEIGHBOURS = 4

_OWN = threading.local()
"""The memory that each thread decodes into."""


class TiffFile:
    """A file open for reading at any place, by any number of threads.

    It is closed once nothing refers to it any more.

    Attributes
    ----------
    state : tuple of int
        Tells files, and what a file held before it was replaced or written to, apart.
    size : int
        Bytes.
    """

    def __init__(self, path: Path):
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        found = os.fstat(self._descriptor)
        self.state = (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)
        self.size = found.st_size

    def read(self, offset: int, count: int) -> bytes:
        """As many of `count` bytes as the file has from `offset` on."""
        return os.pread(self._descriptor, count, offset)


@dataclass(frozen=True)
class TiledLevel:
    """The tiles of a level: where they lie in the file and how they are decoded.

    Attributes
    ----------
    size, tile : (int, int)
        Width and height of the level and of a tile, px.
    offsets, byte_counts : int64 arrays, shape (rows, columns)
        Of each tile; a count of 0 is a tile that the file leaves out.
    decode : callable
        A tile's bytes to uint8 RGB, in the memory of the array given with them; raises what it
        likes on bytes that are not quite right.
    """

    file: TiffFile
    size: tuple[int, int]
    tile: tuple[int, int]
    offsets: np.ndarray
    byte_counts: np.ndarray
    decode: Decode

    def decode_places(
        self, x: int, y: int, pixels: np.ndarray, places: Iterable[tuple[int, int]]
    ) -> dict[tuple[int, int], str]:
        """Decode tiles of a region that lies inside the level, each once.

        Parameters
        ----------
        x, y : int
            Upper left corner, level px.
        pixels : uint8 array, shape (h, w, 3)
            What it shows of the tiles is filled with their RGB, a view of a larger array if you
            like; white where the file leaves tiles out. What lies in others stays as it is.
        places : iterable of (int, int)
            Rows and columns of the tiles, all of which the region touches.

        Returns
        -------
        dict of (int, int) to str
            Tiles that cannot be decoded without so much as a warning, and why; what is in their
            place is not defined.
        """
        tile_width = self.tile[0]
        whole = range(-(-x // tile_width), (x + pixels.shape[1]) // tile_width)
        there = {place: bool(self.byte_counts[place]) for place in places}
        failed: dict[tuple[int, int], str] = {}
        in_threads(partial(self._fill, pixels, x, y, failed), _neighbours(there, whole))
        return failed

    def _fill(self, pixels, x: int, y: int, failed: dict, places: list[tuple[int, int]]) -> None:
        """Fill what a region shows of neighbouring tiles."""
        (height, width), (tile_width, tile_height) = pixels.shape[:2], self.tile
        top, left = places[0][0] * tile_height - y, places[0][1] * tile_width - x
        lines = slice(max(-top, 0), height - top)
        shown = pixels[max(top, 0) : top + tile_height]
        if len(places) == 1:
            shown = shown[:, max(left, 0) : left + tile_width]
            if not self.byte_counts[places[0]]:
                shown[:] = WHITE
                return
            (stored,) = self._decoded(places, failed)
            shown[:] = stored[lines, max(-left, 0) : width - left]
            return
        shown = shown[:, left : left + len(places) * tile_width]
        beside = shown.reshape(len(shown), len(places), tile_width, 3)  # a view: an axis is split
        beside[:] = self._decoded(places, failed)[:, lines].swapaxes(0, 1)

    def _decoded(self, places: list[tuple[int, int]], failed: dict) -> np.ndarray:
        """Pixels of some tiles, uint8 (N, h, w, 3), in memory that this thread uses again."""
        shape = (NEIGHBOURS, *self.tile[::-1], 3)
        if getattr(_OWN, "memory", np.empty(0)).shape != shape:
            _OWN.memory = np.empty(shape, np.uint8)
        for place, memory in zip(places, _OWN.memory, strict=False):
            try:
                data = self.file.read(self.offsets[place], self.byte_counts[place])
                stored = self.decode(data, memory)
                if stored.shape != memory.shape or stored.dtype != np.uint8:
                    raise TileError(f"it is {stored.shape}, {stored.dtype}")
            except Exception as error:  # whatever decoders raise; OpenSlide has the last word
                failed[place] = str(error)
        return _OWN.memory[: len(places)]


@dataclass(frozen=True)
class TileReader:
    """A `LevelReader` that decodes tiles; OpenSlide reads those that cannot be decoded, alone."""

    tiles: TiledLevel
    openslide: OpenSlideLevel

    @property
    def cell(self) -> tuple[int, int]:  # noqa: D102 (see the protocol)
        return self.tiles.tile

    def read(self, x: int, y: int, out: np.ndarray, boxes: np.ndarray) -> dict[int, str]:
        """Read boxes, each tile under them once: see `LevelReader`.

        A tile that OpenSlide cannot decode either costs all boxes over it: it is decoded whole or
        not at all.
        """
        left = boxes.copy()
        lost: dict[int, str] = {}
        for row, col in self.tiles.decode_places(x, y, out, cells_touched(left, self.cell)):
            width, height = self.cell
            tile = col * width, row * height, (col + 1) * width, (row + 1) * height
            positions, parts = clip_boxes(left, tile)
            if not len(positions):
                continue
            if reason := self.openslide.read_box(x, y, out, bounding_box(parts)):
                lost |= dict.fromkeys(positions.tolist(), reason)
                left[positions] = 0  # no more of them is wanted
        return lost


def _neighbours(there: dict[tuple[int, int], bool], whole: range) -> list[list[tuple[int, int]]]:
    """Tiles in groups of a few that lie side by side, are there, and in `whole` columns."""
    groups: list[list[tuple[int, int]]] = []
    before = None  # the place right of the last one, if a neighbour could lie there
    for place, is_there in there.items():
        row, col = place
        groupable = is_there and col in whole
        if groupable and place == before and len(groups[-1]) < NEIGHBOURS:
            groups[-1].append(place)
        else:
            groups.append([place])
        before = (row, col + 1) if groupable else None
    return groups


def find_tiles(
    path: Path, vendor: str, sizes: tuple[tuple[int, int], ...], downsamples: tuple[float, ...]
) -> list[TiledLevel | BackendSelection]:
    """Find the tiles of a slide's levels.

    Parameters
    ----------
    path : Path
    vendor : str
        OpenSlide's name of the format.
    sizes, downsamples
        Of OpenSlide's levels: width and height in px, level-0 px per level px.

    Returns
    -------
    list of TiledLevel or BackendSelection
        For each level its tiles, or OpenSlide and the reason why it has to read the level.
    """
    if vendor not in PLAIN_FORMATS:
        return [_openslide(f"{vendor} files are not read by tiles")] * len(sizes)
    try:
        file = TiffFile(path)
        with tifffile.TiffFile(path) as tiff:
            pages = [p for p in tiff.pages if isinstance(p, tifffile.TiffPage) and p.is_tiled]
            levels = [
                _find_level(file, pages, size, downsample)
                for size, downsample in zip(sizes, downsamples, strict=True)
            ]
        if TiffFile(path).state != file.state:
            raise TileError("it was replaced meanwhile")
    except Exception as error:  # whatever a file makes tifffile raise; OpenSlide opened it
        return [_openslide(f"tifffile cannot read it: {error}")] * len(sizes)
    return _without_patched_tiles(levels) if vendor == "aperio" else levels


def compare_tiles(
    level: TiledLevel, reference: Callable[[int, int, int, int], np.ndarray]
) -> BackendSelection:
    """Compare some tiles of a level with what OpenSlide reads in their place.

    They are the same each time: the corners', those with the most bytes, and some spread evenly.

    Parameters
    ----------
    level : TiledLevel
    reference : callable
        x, y, width, height in level px to the region's uint8 RGB, over white; may raise
        `SlideReadError`.

    Returns
    -------
    BackendSelection
        The tiles; OpenSlide if there is a difference, or nothing to compare.
    """
    compared = 0
    for row, col in _probes(level):
        x, y = col * level.tile[0], row * level.tile[1]
        tile = f"the tile at level px ({x}, {y})"
        width, height = (
            min(side, whole - start)
            for side, whole, start in zip(level.tile, level.size, (x, y), strict=True)
        )
        decoded = np.empty((height, width, 3), np.uint8)
        failed = level.decode_places(x, y, decoded, [(row, col)])
        try:
            expected = reference(x, y, width, height)
        except SlideReadError:
            if not failed:
                return _openslide(f"{tile} can be decoded, by OpenSlide it cannot")
            continue
        if failed:
            return _openslide(f"{tile} cannot be decoded: {failed[row, col]}")
        if not np.array_equal(decoded, expected):
            largest = np.abs(decoded.astype(int) - expected).max()
            return _openslide(f"{tile} differs from OpenSlide's by up to {largest}")
        compared += 1
    if not compared:
        return _openslide("no tile can be compared with OpenSlide's")
    return BackendSelection("tiles", "the tiles that were compared equal OpenSlide's")


def _openslide(reason: str) -> BackendSelection:
    return BackendSelection("openslide", reason)


def _probes(level: TiledLevel) -> list[tuple[int, int]]:
    """Rows and columns of the tiles that `compare_tiles` compares."""
    rows, cols = level.byte_counts.shape
    flat = level.byte_counts.ravel()
    detailed = np.argsort(-flat, kind="stable")[:DETAILED_PROBES]
    there = np.flatnonzero(flat)
    spread = there[np.linspace(0, len(there) - 1, SPREAD_PROBES + 2).astype(int)[1:-1]]
    corners = product((0, rows - 1), (0, cols - 1))
    chosen = [divmod(int(number), cols) for number in (*detailed, *spread)]
    return list(dict.fromkeys([*chosen, *corners]))


def _find_level(file, pages, size, downsample) -> TiledLevel | BackendSelection:
    if downsample != round(downsample):
        return _openslide(
            f"OpenSlide interpolates: its downsample {downsample:.8g} is no whole number"
        )
    matching = [page for page in pages if (page.imagewidth, page.imagelength) == size]
    if len(matching) != 1:
        found = f"{len(matching)} tiled TIFF pages have its size"
        return _openslide(f"{found}, {size[0]} x {size[1]} px")
    (page,) = matching
    try:
        decode = tile_decoder(page)
    except TileError as refusal:
        return _openslide(str(refusal))
    tile = (page.tilewidth, page.tilelength)
    grid = tuple(-(-length // side) for length, side in zip(size[::-1], tile[::-1], strict=True))
    offsets = np.array(page.dataoffsets, np.int64)
    byte_counts = np.array(page.databytecounts, np.int64)
    if not len(offsets) == len(byte_counts) == np.prod(grid) or not byte_counts.any():
        listed = np.count_nonzero(byte_counts)
        return _openslide(f"the file lists {listed} tiles for a grid of {grid}")
    if (offsets + byte_counts).max() > file.size:
        return _openslide("tiles lie beyond the end of the file")
    return TiledLevel(file, size, tile, offsets.reshape(grid), byte_counts.reshape(grid), decode)


def _without_patched_tiles(
    levels: list[TiledLevel | BackendSelection],
) -> list[TiledLevel | BackendSelection]:
    """Leave Aperio levels that lack tiles, and all coarser ones, to OpenSlide.

    It paints the next finer level in their place, at coarser levels too: the scanner's software
    makes those of what is missing.
    """
    lacking = [isinstance(level, TiledLevel) and not level.byte_counts.all() for level in levels]
    openslide = _openslide(
        "tiles are missing at this or a finer level: OpenSlide paints these from finer ones"
    )
    return [
        openslide if any(lacking[: number + 1]) and isinstance(level, TiledLevel) else level
        for number, level in enumerate(levels)
    ]
