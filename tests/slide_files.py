"""Slide files with known pixels, made for tests."""

import io
import struct
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from wsi_pipeline.errors import SlideReadError


def write_pyramid_tiff(path, level_arrays, tile=256, mpp=None, compression="jpeg") -> Path:
    """Write arrays, finest first, as the levels of a tiled TIFF (OpenSlide's generic-tiff).

    The levels may have any sizes: OpenSlide takes their downsamples from those. `mpp` goes into
    the resolution tags. Pixels survive exactly with ``compression=None`` or ``"zlib"``.
    """
    options = {"tile": (tile, tile), "photometric": "rgb", "compression": compression}
    if compression == "jpeg":
        options |= {"compressionargs": {"level": 95}, "subsampling": (1, 1)}
    resolution = {}
    if mpp is not None:
        resolution = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level, pixels in enumerate(level_arrays):
            file.write(
                np.ascontiguousarray(pixels, np.uint8),
                subfiletype=1 if level else 0,
                metadata=None,
                **options,
                **({} if level else resolution),
            )
    return Path(path)


def damage_tile(path, tile) -> None:
    """Write zeros over a tile of level 0; tiles count from 0, row by row."""
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[tile], file.pages[0].databytecounts[tile]
    with Path(path).open("r+b") as file:
        file.seek(offset)
        file.write(bytes(count))


def write_mrxs(path, pixels, bounds_x, bounds_y, tile=100, levels=3, mpp=0.25) -> Path:
    """Write a MIRAX slide whose frame is larger than the scanned `pixels`.

    The scanned part begins at (`bounds_x`, `bounds_y`) of the frame; beyond it on every side the
    frame holds no tiles, so OpenSlide states bounds. Pixels survive exactly (PNG tiles). Level k
    is reduced 2**k times by averaging. Offsets and sizes must be multiples of `tile`, and the
    frame gets whole tiles of the coarsest level.
    """
    path = Path(path)
    height, width = pixels.shape[:2]
    assert not any(length % tile for length in (height, width, bounds_x, bounds_y))
    coarse = tile * 2 ** (levels - 1)
    frame_height = (bounds_y + height) // coarse * coarse + coarse
    frame_width = (bounds_x + width) // coarse * coarse + coarse
    frame = np.full((frame_height, frame_width, 3), 255, np.uint8)
    frame[bounds_y : bounds_y + height, bounds_x : bounds_x + width] = pixels
    scanned = np.zeros(frame.shape[:2], bool)
    scanned[bounds_y : bounds_y + height, bounds_x : bounds_x + width] = True

    folder = path.with_suffix("")
    folder.mkdir()
    path.touch()
    images_x = frame_width // tile
    data, level_records = io.BytesIO(), []
    for level in range(levels):
        step = 2**level
        reduced = _block_means(frame, step)
        records = []
        for y in range(0, frame_height // tile, step):
            for x in range(0, images_x, step):
                side = step * tile
                if not scanned[y * tile : y * tile + side, x * tile : x * tile + side].any():
                    continue
                row, col = y // step * tile, x // step * tile
                offset = data.tell()
                Image.fromarray(reduced[row : row + tile, col : col + tile]).save(data, "PNG")
                records.append((y * images_x + x, offset, data.tell() - offset, 0))
        level_records.append(records)
    (folder / "Data0000.dat").write_bytes(data.getvalue())
    (folder / "Index.dat").write_bytes(_mirax_index("synthetic", level_records))
    (folder / "Slidedat.ini").write_text(
        _mirax_ini("synthetic", images_x, frame_height // tile, tile, levels, mpp)
    )
    return path


def _block_means(pixels, step):
    height, width = pixels.shape[:2]
    blocks = pixels.reshape(height // step, step, width // step, step, 3)
    return np.round(blocks.mean((1, 3))).astype(np.uint8)


def _mirax_index(slide_id, level_records) -> bytes:
    """Index.dat as OpenSlide's MIRAX driver walks it: roots, level pointers, pages of records."""
    head = b"01.02" + slide_id.encode()
    levels_at = len(head) + 8
    at = levels_at + 4 * len(level_records)
    pointers, pages = b"", b""
    for records in level_records:
        pointers += struct.pack("<i", at)
        page = struct.pack("<4i", 0, at + 8, len(records), 0)
        page += b"".join(struct.pack("<4i", *record) for record in records)
        pages += page
        at += len(page)
    return head + struct.pack("<2i", levels_at, 0) + pointers + pages


def _mirax_ini(slide_id, images_x, images_y, tile, levels, mpp) -> str:
    sections = [
        f"[GENERAL]\nSLIDE_ID={slide_id}\nIMAGENUMBER_X={images_x}\nIMAGENUMBER_Y={images_y}\n",
        "[HIERARCHICAL]\nHIER_COUNT=1\nNONHIER_COUNT=0\nINDEXFILE=Index.dat\n"
        f"HIER_0_NAME=Slide zoom level\nHIER_0_COUNT={levels}\n"
        + "".join(f"HIER_0_VAL_{level}_SECTION=LEVEL_{level}\n" for level in range(levels)),
        "[DATAFILE]\nFILE_COUNT=1\nFILE_0=Data0000.dat\n",
    ]
    sections += [
        f"[LEVEL_{level}]\nIMAGE_CONCAT_FACTOR={min(level, 1)}\nOVERLAP_X=0\nOVERLAP_Y=0\n"
        f"MICROMETER_PER_PIXEL_X={mpp * 2**level}\nMICROMETER_PER_PIXEL_Y={mpp * 2**level}\n"
        f"IMAGE_FILL_COLOR_BGR=16777215\nDIGITIZER_WIDTH={tile}\nDIGITIZER_HEIGHT={tile}\n"
        "IMAGE_FORMAT=PNG\n"
        for level in range(levels)
    ]
    return "\n".join(sections)


class ArraySlide:
    """The part of Slide's interface that prediction needs, over an array at downsample 1."""

    def __init__(self, pixels, unreadable=None, tile_px=None):
        self.pixels = pixels
        self.unreadable = unreadable  # x0, y0, x1, y1
        self.tile_px = tile_px
        self.reads = []

    def as_read(self, downsample):
        return downsample

    def row_edges(self, y, width_px, height_px, downsample):
        step = self.tile_px or 999
        return np.unique([0, *range(int(-y % step), height_px, step), height_px])

    def read(self, x, y, width_px, height_px, downsample, out=None):
        assert downsample == 1.0
        self.reads.append((x, y, width_px, height_px))
        if self.unreadable:
            x0, y0, x1, y1 = self.unreadable
            if x < x1 and y < y1 and x0 < x + width_px and y0 < y + height_px:
                raise SlideReadError("tile (3, 1) is damaged")
        found = np.empty((height_px, width_px, 3), np.uint8) if out is None else out
        found[:] = 255
        x0, y0 = max(int(x), 0), max(int(y), 0)
        inside = found[y0 - int(y) :, x0 - int(x) :]
        shown = self.pixels[y0 : y0 + inside.shape[0], x0 : x0 + inside.shape[1]]
        inside[: shown.shape[0], : shown.shape[1]] = shown
        return found

    def read_under(self, x, y, boxes, downsample, out):
        """Tile by tile where there are boxes; under a tile that fails, box by box."""
        failed = {}
        height, width = out.shape[:2]
        rows, columns = self.row_edges(y, 0, height, 1), self.row_edges(x, 0, width, 1)
        for (top, lower), (left, right) in product(pairwise(rows), pairwise(columns)):

            def read(x0, y0, x1, y1, here=(left, top, right, lower)):
                x0, y0 = max(x0, here[0]), max(y0, here[1])
                x1, y1 = min(x1, here[2]), min(y1, here[3])
                size = x1 - x0, y1 - y0
                return self.read(x + x0, y + y0, *size, downsample, out=out[y0:y1, x0:x1])

            over = [
                (number, (x0, y0, x1, y1))
                for number, (x0, y0, x1, y1) in enumerate(boxes.tolist())
                if x0 < right and left < x1 and y0 < lower and top < y1
            ]
            try:
                if over:
                    read(left, top, right, lower)
            except SlideReadError:
                for number, box in over:
                    try:
                        read(*box)
                    except SlideReadError as error:
                        failed[number] = str(error)
        return failed
