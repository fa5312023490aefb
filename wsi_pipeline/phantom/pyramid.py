"""Strips of pixels to a tiled TIFF, without ever holding a level in memory.

Level 0 goes to the file as it comes. Each strip is halved on the way and collected for the next
level as JPEG bytes, which go to temporary files beside the slide's once there are many: memory
holds the strips of all levels, less than twice one of level 0 (256 rows of 100,000 px: 77 MB).
"""

import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import SpooledTemporaryFile

import imagecodecs
import numpy as np
import tifffile

from wsi_pipeline.files import replace_atomically

TILE_PX = 256
SMALLEST_LEVEL_PX = 1024
JPEG_QUALITY = 90
SPOOL_BYTES = 4 << 20  # tiles of a smaller level that stay in memory

Encode = Callable[[np.ndarray], bytes]


def write_slide_pyramid(
    path: Path, size: tuple[int, int], mpp: float, strips: Iterable[np.ndarray]
) -> None:
    """Write a pyramidal, tiled JPEG TIFF that OpenSlide opens as generic-tiff.

    Levels are halved until the longest side is under 1024 px.

    Parameters
    ----------
    path : Path
        Complete once it is there: written aside, then renamed.
    size : (int, int)
        Width and height, px.
    mpp : float
        Micrometres per px, for the resolution tags.
    strips : iterable of uint8 arrays, shape (256, width, 3)
        From top to bottom; the last may have fewer rows.
    """
    with ExitStack() as stack:
        levels = []
        for width, height in _level_sizes(size):
            file = stack.enter_context(SpooledTemporaryFile(SPOOL_BYTES, dir=str(path.parent)))
            levels.append(_Level(width, height, file))
        for level, smaller in pairwise(levels):
            level.smaller = smaller
        part = stack.enter_context(replace_atomically(path))
        tiff = stack.enter_context(tifffile.TiffWriter(part, bigtiff=True))
        for number, level in enumerate(levels):
            tiff.write(
                level.stream(strips) if number == 0 else level.tiles(),
                shape=(level.height, level.width, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="rgb",
                compression="jpeg",
                subsampling=(2, 2),
                subfiletype=int(number > 0),
                **_resolution(mpp * 2**number),
            )


def write_mask(path: Path, size: tuple[int, int], mpp: float, strips: Iterable[np.ndarray]) -> None:
    """Write a tiled, deflated uint8 TIFF of one level.

    Parameters
    ----------
    path, size, mpp
        As for `write_slide_pyramid`.
    strips : iterable of uint8 arrays, shape (256, width)
    """
    with replace_atomically(path) as part, tifffile.TiffWriter(part, bigtiff=True) as tiff:
        tiff.write(
            (tile for strip in strips for tile in _encoded_tiles(strip, _deflate)),
            shape=size[::-1],
            dtype=np.uint8,
            tile=(TILE_PX, TILE_PX),
            photometric="minisblack",
            compression="zlib",
            **_resolution(mpp),
        )


class _Level:
    """A level while it is written: rows that wait for a full row of tiles, tiles encoded."""

    def __init__(self, width: int, height: int, file: SpooledTemporaryFile):
        self.width, self.height = width, height
        self.smaller: _Level | None = None
        self._file = file
        self._tile_bytes: list[int] = []
        self._waiting: list[np.ndarray] = []
        self._rows_seen = 0

    def stream(self, strips: Iterable[np.ndarray]) -> Iterator[bytes]:
        """Encode strips of whole tile rows; smaller levels take theirs on the way."""
        for strip in strips:
            if self.smaller is not None:  # first: after its last tile no one asks for more
                self.smaller._add(_halved(strip))
            yield from _encoded_tiles(strip, _jpeg)

    def tiles(self) -> Iterator[bytes]:
        """What was collected."""
        self._file.seek(0)
        yield from map(self._file.read, self._tile_bytes)

    def _add(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        self._waiting.append(rows)
        self._rows_seen += len(rows)
        if self._rows_seen % TILE_PX == 0 or self._rows_seen == self.height:
            strip, self._waiting = np.concatenate(self._waiting), []
            for tile in self.stream([strip]):
                self._file.write(tile)
                self._tile_bytes.append(len(tile))


def _level_sizes(size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    yield size
    while max(size) >= SMALLEST_LEVEL_PX and min(size) >= 2:
        size = (size[0] // 2, size[1] // 2)
        yield size


def _halved(strip: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 px; an odd last row or column is dropped."""
    height, width = strip.shape[0] // 2 * 2, strip.shape[1] // 2 * 2
    rows = np.add(strip[:height:2, :width], strip[1:height:2, :width], dtype=np.uint16)
    channels = np.moveaxis(rows, -1, 0)  # numpy's inner loop is then a row, not a pixel
    halves = [(channel[:, ::2] + channel[:, 1::2] + 2) >> 2 for channel in channels]
    return np.stack(halves, axis=-1, dtype=np.uint8, casting="unsafe")


def _encoded_tiles(strip: np.ndarray, encode: Encode) -> Iterator[bytes]:
    """Tiles of a strip from left to right; one of a single colour is encoded only once."""
    missing = [-side % TILE_PX for side in strip.shape[:2]] + [0] * (strip.ndim - 2)
    if any(missing):
        strip = np.pad(strip, [(0, count) for count in missing], mode="edge")
    for x in range(0, strip.shape[1], TILE_PX):
        tile = np.ascontiguousarray(strip[:, x : x + TILE_PX])
        pixels = tile.tobytes()
        colour = pixels[: tile[0, 0].nbytes]
        if pixels == colour * TILE_PX**2:
            yield _encoded_plain(tuple(colour), encode)
        else:
            yield encode(tile)


@cache
def _encoded_plain(colour: tuple[int, ...], encode: Encode) -> bytes:
    tile = np.full((TILE_PX, TILE_PX, len(colour)), colour, np.uint8)
    return encode(tile)


def _jpeg(tile: np.ndarray) -> bytes:
    return bytes(
        imagecodecs.jpeg8_encode(
            tile, level=JPEG_QUALITY, colorspace="rgb", outcolorspace="ycbcr", subsampling="420"
        )
    )


def _deflate(tile: np.ndarray) -> bytes:
    return zlib.compress(tile.tobytes(), 1)


def _resolution(mpp: float) -> dict:
    return {
        "resolution": (1e4 / mpp, 1e4 / mpp),
        "resolutionunit": "CENTIMETER",
        "metadata": None,
        "software": False,
    }
