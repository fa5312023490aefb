"""A level of a slide as OpenSlide reads it: the reference for every pixel."""

import threading
from collections.abc import Mapping
from itertools import groupby

import numpy as np
from PIL import Image

from wsi_pipeline.errors import SlideReadError
from wsi_pipeline.slides.boxes import bounding_box, cells_touched, clip_boxes
from wsi_pipeline.slides.level_reader import WHITE
from wsi_pipeline.slides.openslide_file import OpenSlideFile

# Largest request to OpenSlide, level px a side: it cuts larger regions itself and then rounds the
# pieces' corners down to whole level-0 px.
LARGEST_REQUEST_PX = 4096
# Smallest request to OpenSlide, px a side. Smaller wastes fewer pixels but costs more calls.
SMALLEST_REQUEST_PX = 512


class OpenSlideLevel:
    """A `LevelReader` that asks OpenSlide.

    Parameters
    ----------
    file : OpenSlideFile
    level : int

    Attributes
    ----------
    cell : (int, int)
        Width and height of the smallest request, px: whole tiles, if the file states their size.
    read_px : int
        Px that `read` and `read_box` have got of OpenSlide so far, in all threads.
    """

    def __init__(self, file: OpenSlideFile, level: int):
        self.cell = _cell(file.properties, level)
        self.read_px = 0
        self._file, self._level = file, level
        self._downsample = file.level_downsamples[level]
        self._lock = threading.Lock()  # of read_px

    def read(self, x: int, y: int, out: np.ndarray, boxes: np.ndarray) -> dict[int, str]:
        """Read boxes, those near each other together: see `LevelReader`.

        Each request is the bounding box of what is wanted in some cells. If it fails, boxes are
        requested one by one, since the damage may lie between them.
        """
        left, lost = boxes.copy(), {}
        for frame in _frames(cells_touched(left, self.cell), self.cell):
            positions, parts = clip_boxes(left, np.multiply(frame, 2 * self.cell))
            if not len(positions) or not (reason := self.read_box(x, y, out, bounding_box(parts))):
                continue
            for position, part in zip(positions.tolist(), parts.tolist(), strict=True):
                if why := reason if len(positions) == 1 else self.read_box(x, y, out, part):
                    lost[position] = why
                    left[position] = 0  # no more of it is wanted
        return lost

    def read_box(self, x: int, y: int, out: np.ndarray, box: tuple[int, int, int, int]) -> str:
        """Read one box of a region in one request: see `LevelReader.read`.

        Returns
        -------
        str
            Why it cannot be decoded; empty if it was.
        """
        left, upper, right, lower = box
        width, height = right - left, lower - upper
        try:
            found = self.region(left, upper, width, height)
        except SlideReadError as error:
            return str(error)
        out[upper - y : lower - y, left - x : right - x] = found
        with self._lock:
            self.read_px += width * height
        return ""

    def region(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Pixels of a region over white.

        Parameters
        ----------
        x, y, width, height : int
            Level px. All of it must lie inside the level: OpenSlide rounds negative corners
            roughly.

        Returns
        -------
        uint8 array, shape (height, width, 3)

        Raises
        ------
        SlideReadError
            If OpenSlide fails twice, the second time with a new handle.
        """
        canvas = Image.new("RGB", (width, height), (WHITE, WHITE, WHITE))
        if min(width, height) > 0:
            location = round(x * self._downsample), round(y * self._downsample)
            stored = self._file.read_region(location, self._level, (width, height))
            canvas.paste(stored, mask=stored)
        return np.asarray(canvas)


def _cell(properties: Mapping[str, str], level: int) -> tuple[int, int]:
    names = (f"openslide.level[{level}].tile-{side}" for side in ("width", "height"))
    least = SMALLEST_REQUEST_PX
    width, height = (
        -(-least // side) * side if side <= LARGEST_REQUEST_PX else least
        for side in (int(properties.get(name, 1)) for name in names)
    )
    return width, height


def _frames(cells: list[tuple[int, int]], cell: tuple[int, int]) -> np.ndarray:
    """What to request at once: edges, int64 (M, 4), in cells of a level.

    Cells, rows and columns, are taken in squares of `LARGEST_REQUEST_PX`, since those near each
    other share what OpenSlide decodes and keeps for a while; together where they fill a rectangle.
    """

    def square(at: tuple[int, int]) -> tuple[int, int]:
        return at[0] * cell[1] // LARGEST_REQUEST_PX, at[1] * cell[0] // LARGEST_REQUEST_PX

    frames = []
    for _, near in groupby(sorted(cells, key=square), square):
        corners = np.array(list(near))[:, ::-1]
        edges = np.hstack([corners, corners + 1])
        around = bounding_box(edges)
        filled = (around[2] - around[0]) * (around[3] - around[1]) == len(edges)
        frames.append([around] if filled else edges)
    return np.concatenate(frames)
