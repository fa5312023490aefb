"""Decoders of the tiles of a TIFF page: JPEG, as strictly as OpenSlide's, and JPEG 2000 RGB."""

from collections.abc import Callable

import imagecodecs
import numpy as np
import simplejpeg
import tifffile
from tifffile import COMPRESSION, PHOTOMETRIC, PLANARCONFIG

# Marker APP14: the colour transform that a decoder undoes, its last byte (0: RGB, 1: YCbCr).
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
START_OF_IMAGE = b"\xff\xd8"
START_OF_SCAN, APP0, APP14 = 0xDA, 0xE0, 0xEE

Decode = Callable[[bytes, np.ndarray], np.ndarray]


class TileError(Exception):
    """Tiles cannot be had without OpenSlide, for the reason it states. Never shown to a user."""


def tile_decoder(page: tifffile.TiffPage) -> Decode:
    """Give the decoder of a page's tiles: see `TiledLevel.decode`.

    Raises
    ------
    TileError
        If none of these fits.
    """
    layout = (page.planarconfig, page.bitspersample, page.samplesperpixel, page.imagedepth)
    if layout != (PLANARCONFIG.CONTIG, 8, 3, 1):
        raise TileError("its pixels are not three interleaved channels of 8 bits")
    if page.photometric not in (PHOTOMETRIC.RGB, PHOTOMETRIC.YCBCR):
        raise TileError(f"its photometric interpretation is {page.photometric}")
    if page.compression == COMPRESSION.JPEG:
        return JpegDecoder(page.jpegtables, page.photometric)
    if page.compression == COMPRESSION.APERIO_JP2000_RGB:
        return _decode_jpeg2000
    raise TileError(f"its compression is {getattr(page.compression, 'name', page.compression)}")


def _decode_jpeg2000(data: bytes, memory: np.ndarray) -> np.ndarray:
    return imagecodecs.jpeg2k_decode(data, out=memory)


class JpegDecoder:
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
        """Decode a tile: see `TiledLevel.decode`."""
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
