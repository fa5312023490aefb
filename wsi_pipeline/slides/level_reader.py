"""The backends that read a level of a slide: what they share, and which one was selected."""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

WHITE = 255
"""Of each channel: numpy fills arrays with one number 50 times as fast as with three."""


@dataclass(frozen=True)
class BackendSelection:
    """Which backend reads a level, and why. As a text: ``"openslide: its compression is NONE"``.

    Parameters
    ----------
    name : {"tiles", "openslide"}
    reason : str
        What was found out about the level's tiles, which are tried first.
    """

    name: Literal["tiles", "openslide"]
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class LevelReader(Protocol):
    """A backend for one level: `OpenSlideLevel`, `TileReader`. Any number of threads may read."""

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height, px, of what is decoded at once, from the level's corner on.

        Regions that are cut along the edges of cells are read without decoding anything twice.
        """

    def read(self, x: int, y: int, out: np.ndarray, boxes: np.ndarray) -> dict[int, str]:
        """Read what boxes hold of a region that lies inside the level.

        Parameters
        ----------
        x, y : int
            Upper left corner of the region, level px.
        out : uint8 array, shape (h, w, 3)
            The region; gets RGB, white where the slide has no pixels. What lies under no box
            afterwards is not defined.
        boxes : int64 array, shape (N, 4)
            Edges, level px, all in the region; N >= 1.

        Returns
        -------
        dict of int to str
            Positions of the boxes that cannot be decoded whole, and why; all others are filled.
        """
