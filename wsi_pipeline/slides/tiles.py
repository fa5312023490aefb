"""The stored tiles of a TIFF or SVS level, decoded without OpenSlide.

OpenSlide paints each tile on a canvas before it hands pixels out, which takes several times as
long as decoding it. Where a level is nothing but a grid of JPEG (or JPEG 2000 RGB) tiles its pixels
can be had without. OpenSlide stays the reference: `tiled_levels` refuses every layout that it is
not sure of, `difference` holds a level against what OpenSlide reads of it, and what `TiledLevel`
cannot decode is for OpenSlide to judge.
"""

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import imagecodecs
import numpy as np
import simplejpeg
import tifffile
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG

from wsi_pipeline.errors import SlideReadError
from wsi_pipeline.slides.threads import in_threads

# Of each channel: numpy fills arrays with one number 50 times as fast as with three.
WHITE = 255
# OpenSlide's names of the formats whose levels are plain grids of tiles, one TIFF page each.
PLAIN_FORMATS = ("aperio", "generic-tiff", "philips")
# Marker APP14: the colour transform that a decoder undoes, its last byte (0: RGB, 1: YCbCr).
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
START_OF_IMAGE = b"\xff\xd8"
START_OF_SCAN, APP0, APP14 = 0xDA, 0xE0, 0xEE
# Tiles held against OpenSlide beside the four in the corners: with most detail; spread evenly.
DETAILED_PROBES = 3
SPREAD_PROBES = 3

# Neighbours in a row that are decoded before they are copied: longer lines are copied faster, and
# what they were decoded to should still be in the core's cache.
NEIGHBOURS = 4

Decode = Callable[[bytes, np.ndarray], np.ndarray]


_OWN = threading.local()
"""The memory that each thread decodes into."""


class TileError(Exception):
    """Tiles cannot be had without OpenSlide, for the reason it states. Never shown to a user."""


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

    def read(
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
            Rows and columns of the tiles, all of which the region touches: see `under`.

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


def within(boxes: np.ndarray, frame: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the boxes that have px in a frame, and their parts of it, int64 (M, 4).

    Boxes, int64 (N, 4), and the frame are left, upper, right and lower edges, px from one corner.
    """
    left, upper, right, lower = frame
    clipped = boxes.clip([left, upper, left, upper], [right, lower, right, lower])
    held = np.flatnonzero((clipped[:, :2] < clipped[:, 2:]).all(1))
    return held, clipped[held]


def under(boxes: np.ndarray, side: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows and columns of the cells of a grid that boxes touch, in row-major order.

    Boxes, int64 (N, 4), are edges as in `within`, from the grid's corner on; `side` is the width
    and height of a cell, px.
    """
    cells: set[tuple[int, int]] = set()
    ends = np.hstack([boxes[:, :2] // side, -(-boxes[:, 2:] // side)])
    for left, upper, right, lower in ends.tolist():
        cells.update(product(range(upper, lower), range(left, right)))
    return sorted(cells)


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


def tiled_levels(
    path: Path, vendor: str, sizes: tuple[tuple[int, int], ...], downsamples: tuple[float, ...]
) -> list[TiledLevel | str]:
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
    list of TiledLevel or str
        For each level its tiles, or the reason why OpenSlide has to read it.
    """
    if vendor not in PLAIN_FORMATS:
        return [f"{vendor} files are not read by tiles"] * len(sizes)
    try:
        file = TiffFile(path)
        with tifffile.TiffFile(path) as tiff:
            pages = [page for page in tiff.pages if page.is_tiled]
            levels = [
                _level_or_reason(file, pages, size, downsample)
                for size, downsample in zip(sizes, downsamples, strict=True)
            ]
        if TiffFile(path).state != file.state:
            raise TileError("it was replaced meanwhile")
    except Exception as error:  # whatever a file makes tifffile raise; OpenSlide opened it
        return [f"tifffile cannot read it: {error}"] * len(sizes)
    return _without_patched_tiles(levels) if vendor == "aperio" else levels


def difference(level: TiledLevel, reference: Callable[[int, int, int, int], np.ndarray]) -> str:
    """Hold some tiles of a level against what OpenSlide reads in their place.

    They are the same each time: the corners', those with the most bytes, and some spread evenly.

    Parameters
    ----------
    level : TiledLevel
    reference : callable
        x, y, width, height in level px to the region's uint8 RGB, over white; may raise
        `SlideReadError`.

    Returns
    -------
    str
        The first difference; empty if there is none.
    """
    compared = 0
    for row, col in _probes(level):
        x, y = col * level.tile[0], row * level.tile[1]
        width, height = (
            min(side, whole - start)
            for side, whole, start in zip(level.tile, level.size, (x, y), strict=True)
        )
        decoded = np.empty((height, width, 3), np.uint8)
        failed = level.read(x, y, decoded, [(row, col)])
        try:
            expected = reference(x, y, width, height)
        except SlideReadError:
            if not failed:
                return f"the tile at level px ({x}, {y}) can be decoded, by OpenSlide it cannot"
            continue
        if failed:
            return f"the tile at level px ({x}, {y}) cannot be decoded: {failed[row, col]}"
        if not np.array_equal(decoded, expected):
            largest = np.abs(decoded.astype(int) - expected).max()
            return f"the tile at level px ({x}, {y}) differs from OpenSlide's by up to {largest}"
        compared += 1
    return "" if compared else "no tile can be held against OpenSlide's"


def _probes(level: TiledLevel) -> list[tuple[int, int]]:
    """Rows and columns of the tiles that `difference` looks at."""
    rows, cols = level.byte_counts.shape
    flat = level.byte_counts.ravel()
    detailed = np.argsort(-flat, kind="stable")[:DETAILED_PROBES]
    there = np.flatnonzero(flat)
    spread = there[np.linspace(0, len(there) - 1, SPREAD_PROBES + 2).astype(int)[1:-1]]
    corners = product((0, rows - 1), (0, cols - 1))
    chosen = [divmod(int(number), cols) for number in (*detailed, *spread)]
    return list(dict.fromkeys([*chosen, *corners]))


def _level_or_reason(file, pages, size, downsample) -> TiledLevel | str:
    if downsample != round(downsample):
        return f"OpenSlide interpolates: its downsample {downsample:.8g} is no whole number"
    matching = [page for page in pages if (page.imagewidth, page.imagelength) == size]
    if len(matching) != 1:
        return f"{len(matching)} tiled TIFF pages have its size, {size[0]} x {size[1]} px"
    (page,) = matching
    try:
        decode = _decoder(page)
    except TileError as refusal:
        return str(refusal)
    tile = (page.tilewidth, page.tilelength)
    grid = tuple(-(-length // side) for length, side in zip(size[::-1], tile[::-1], strict=True))
    offsets = np.array(page.dataoffsets, np.int64)
    byte_counts = np.array(page.databytecounts, np.int64)
    if not len(offsets) == len(byte_counts) == np.prod(grid) or not byte_counts.any():
        return f"the file lists {np.count_nonzero(byte_counts)} tiles for a grid of {grid}"
    if (offsets + byte_counts).max() > file.size:
        return "tiles lie beyond the end of the file"
    return TiledLevel(file, size, tile, offsets.reshape(grid), byte_counts.reshape(grid), decode)


def _without_patched_tiles(levels: list[TiledLevel | str]) -> list[TiledLevel | str]:
    """Leave Aperio levels that lack tiles, and all coarser ones, to OpenSlide.

    It paints the next finer level in their place, at coarser levels too: the scanner's software
    makes those of what is missing.
    """
    lacking = [isinstance(level, TiledLevel) and not level.byte_counts.all() for level in levels]
    reason = "tiles are missing at this or a finer level: OpenSlide paints these from finer ones"
    return [
        reason if any(lacking[: number + 1]) and isinstance(level, TiledLevel) else level
        for number, level in enumerate(levels)
    ]


def _decoder(page: tifffile.TiffPage) -> Decode:
    layout = (page.planarconfig, page.bitspersample, page.samplesperpixel, page.imagedepth)
    if layout != (PLANARCONFIG.CONTIG, 8, 3, 1):
        raise TileError("its pixels are not three interleaved channels of 8 bits")
    if page.photometric not in (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR):
        raise TileError(f"its photometric interpretation is {page.photometric}")
    if page.compression == COMPRESSION.JPEG:
        return _JpegDecoder(page.jpegtables, page.photometric)
    if page.compression == COMPRESSION.APERIO_JP2000_RGB:
        return _decode_jpeg2000
    raise TileError(f"its compression is {getattr(page.compression, 'name', page.compression)}")


def _decode_jpeg2000(data: bytes, memory: np.ndarray) -> np.ndarray:
    return imagecodecs.jpeg2k_decode(data, out=memory)


class _JpegDecoder:
    """Decodes JPEGs with the exact transforms, as OpenSlide does, and as strictly.

    Strict: a warning of libjpeg (bytes that make no sense, or too few) is an error.

    Parameters
    ----------
    tables : bytes or None
        TIFF keeps what the tiles share, and their colour space, apart from them.
    photometric : int
    """

    def __init__(self, tables: bytes | None, photometric: int):
        self._transform = 1 if photometric == PHOTOMETRIC.YCBCR else 0
        shared = tables[2:-2] if tables else b""
        self._start = START_OF_IMAGE + ADOBE + bytes([self._transform]) + shared
        self._head = START_OF_IMAGE + b"none yet"

    def __call__(self, data: bytes, memory: np.ndarray) -> np.ndarray:
        if not data.startswith(self._head):  # that of the tile before: most often they are alike
            self._head = _checked_head(data, self._transform)
        return simplejpeg.decode_jpeg(self._start + data[2:], "RGB", buffer=memory, strict=True)


def _checked_head(data: bytes, transform: int) -> bytes:
    """What a JPEG begins with, unless it names another colour transform than the TIFF page.

    libjpeg would follow the JPEG; OpenSlide follows the page.
    """
    if data[:2] != START_OF_IMAGE:
        raise TileError("no JPEG")
    at = 2
    while len(data) > at + 1 and data[at] == 0xFF and data[at + 1] != START_OF_SCAN:
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        content = data[at + 4 : end]
        if marker == APP14 and content[:5] == b"Adobe" and content[11:12] != bytes([transform]):
            raise TileError("its Adobe marker contradicts the page")
        if marker == APP0 and content[:4] == b"JFIF" and transform == 0:
            raise TileError("it is a JFIF, which is YCbCr, and the page says RGB")
        at = end
    if data[at : at + 2] != bytes([0xFF, START_OF_SCAN]):
        raise TileError("its head has no end")
    return data[: at + 2]
